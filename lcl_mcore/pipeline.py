"""1F1B over pipeline stages, with contrastive negatives that still span the whole global batch.

A first pass without gradients runs all micro-batches through the stages. The unit vectors of the images stand
on the first stage then, those of their contexts on the last. The images' travel to the last stage, the loss is
formed there once, and their gradient travels back while the second pass, megatron's 1F1B schedule with
gradients, has begun. The first stage adds it where its output is differentiated, the last stage as in
`training.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from torch import Tensor

from lcl_mcore.config.run import RunConfig
from lcl_mcore.distributed.groups import Groups
from lcl_mcore.forward_backward import Gradients, OnDevice, Work
from lcl_mcore.models.lcl import ImageFeatures, LclModel


@dataclass
class Returned:
    """Gradients that the contrastive loss gives this stage.

    sides   d loss / d unit vectors [m, D] of all micro-batches: of the images on the first stage, of the
            contexts on the last;  scale  d loss / d scale, last stage
    arrival the transfer still under way, to be waited for before `sides` is read
    """

    sides: tuple[Tensor, ...] = ()
    scale: Tensor | None = None
    arrival: dist.Work | None = None

    def side(self, index: int) -> Tensor:
        """The gradient of one micro-batch's vectors."""
        if self.arrival is not None:
            self.arrival.wait()
        return self.sides[index]


class _AddGradient(torch.autograd.Function):
    """Passes the stream on; in backward, gives the images' vectors the gradient that came from the last stage."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, image: Tensor, returned: Returned, index: int, weight: float
    ) -> Tensor:
        ctx.returned, ctx.index, ctx.weight = returned, index, weight
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return grads[0], ctx.weight * ctx.returned.side(ctx.index), None, None, None


class Pipelined(Gradients):
    """One stage of several."""

    def __init__(
        self, config: RunConfig, model: LclModel, ddp: DistributedDataParallel, groups: Groups
    ) -> None:
        super().__init__(config, model, ddp, groups)
        self.stage, self.width = model.stage, config.model.language.width
        model.config.no_sync_func = (
            ddp.no_sync
        )  # megatron's schedule reduces gradients with the last micro-batch
        self.p2p = P2PCommunicator(groups.pp, model.config)

    def _run(self, work: Work) -> tuple[Tensor, Tensor]:
        contrastive, returned = torch.zeros((), device=self.device), Returned()
        if self.trains_contrastive:
            contrastive, returned = self._contrastive(work, self._collect(work))
        return contrastive, self._back_propagate(work, returned)

    def _collect(self, work: Work) -> list[Tensor]:
        """First pass: unit vectors [m, D] of each micro-batch, of images (first stage) or contexts (last)."""
        sides: list[Tensor] = []

        def forward(micro: OnDevice, index: int) -> Tensor:
            features, out = self._stage_forward(micro, work.seed)
            if features is not None:
                sides.append(self.model.image_embeds(micro.batch, features.vectors))
            if self.stage.last:
                sides.append(self.model.context_embeds(micro.batch, out))
                return torch.zeros((), device=self.device)  # the schedule keeps what the last stage returns
            return out

        with torch.no_grad():
            self._schedule(work.micros, forward, forward_only=True)
        return sides

    def _contrastive(self, work: Work, sides: Sequence[Tensor]) -> tuple[Tensor, Returned]:
        """The loss on the last stage, and on both ends the gradient of what they contributed."""
        ends, counts = self.groups.pipeline_ends, work.batch.counts.contexts
        none = torch.zeros((), device=self.device)
        if ends is None:
            return none, Returned()
        own, sizes = torch.cat(list(sides)), [side.shape[0] for side in sides]
        if self.stage.first:
            arrival = None
            d_image = torch.empty_like(own)
            if len(own):
                dist.broadcast(own, group_src=0, group=ends)
                arrival = dist.broadcast(d_image, group_src=1, group=ends, async_op=True)
            return none, Returned(d_image.split(sizes), arrival=arrival)
        image = torch.empty_like(own)
        if len(own):
            dist.broadcast(image, group_src=0, group=ends)
        context, scale = own.requires_grad_(), self.model.temperature().detach().requires_grad_()
        pending = self.contrastive.begin(counts, self.width, group_ids=self._group_ids(work.micros))
        pending.start_image(image.requires_grad_())
        pending.start_text(context)
        loss = pending.finish(scale)
        d_image, d_context, d_scale = torch.autograd.grad(loss, (image, context, scale))
        if len(own):
            dist.broadcast(d_image.contiguous(), group_src=1, group=ends)
        return loss.detach(), Returned(d_context.split(sizes), d_scale)

    def _back_propagate(self, work: Work, returned: Returned) -> Tensor:
        """Second pass, 1F1B; returns this rank's part of the generation loss."""
        generation_sum = torch.zeros((), device=self.device)
        last = len(work.micros) - 1

        def forward(micro: OnDevice, index: int) -> Tensor:
            nonlocal generation_sum
            features, out = self._stage_forward(micro, work.seed)
            if not self.stage.last:
                self._check(out)
                return self._with_images(micro, features, out, returned, index)
            generation = work.weight * self._generation(micro.batch, out)
            generation_sum = generation_sum + generation.detach()
            if not self.trains_contrastive:
                self._check(generation)
                return self._weighted(self._touch_all(), generation)
            context = self.model.context_embeds(micro.batch, out)
            self._check(context, generation)
            # Its gradient is the chain rule through the cached derivatives; its value means nothing.
            surrogate = (context * returned.side(index)).sum()
            if index == last and returned.scale is not None:
                surrogate = surrogate + self.model.temperature() * returned.scale
            return self._weighted(surrogate, generation)

        self._schedule(work.micros, forward, forward_only=False)
        return generation_sum

    def _with_images(
        self, micro: OnDevice, features: ImageFeatures | None, out: Tensor, returned: Returned, index: int
    ) -> Tensor:
        """The stream, with the images' part of the contrastive gradient attached on the first stage."""
        if features is None or not self.trains_contrastive:
            return out
        image = self.model.image_embeds(micro.batch, features.vectors)
        self._check(image)
        attached: Tensor = _AddGradient.apply(out, image, returned, index, self.loss.contrastive_weight)
        return attached

    def _stage_forward(self, micro: OnDevice, seed: int) -> tuple[ImageFeatures | None, Tensor]:
        """This stage's part of the model; the features of the images on the first stage."""
        batch = micro.batch
        if not self.stage.first:
            assert self.model.received is not None
            return None, self.model.forward_language(
                batch, self.model.received, micro.sequence_keys, seed, received=True
            )
        features = self.model.encode_images(batch.images, batch.image_keys, seed)
        return features, self.model.forward_language(batch, features.latents, micro.sequence_keys, seed)

    def _schedule(
        self, micros: Sequence[OnDevice], forward: Callable[[OnDevice, int], Tensor], *, forward_only: bool
    ) -> None:
        """Run megatron's schedule over the micro-batches. What `forward` returns on the last stage is the loss."""

        def step(data: Iterator[tuple[int, OnDevice]], model: Any) -> tuple[Tensor, Any]:
            index, micro = next(data)
            return forward(micro, index), as_is

        def as_is(loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), {}

        # Gradients are reduced with the last micro-batch. A pass without any would enter `no_sync` and not leave it.
        self.model.config.no_sync_func = None if forward_only else self.ddp.no_sync
        forward_backward_pipelining_without_interleaving(
            forward_step_func=step,
            data_iterator=iter(enumerate(micros)),
            model=self.model,
            num_microbatches=len(micros),
            seq_length=micros[0].batch.tokens.shape[
                0
            ],  # rows have one length, and micro-batches as many rows
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=self.p2p,
            pg_collection=self.groups.megatron,
        )
