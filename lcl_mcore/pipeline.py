"""1F1B over pipeline stages, with contrastive negatives that still span the whole global batch.

GradCache (`losses.gradcache`) across stages. A feature pass without gradients runs all micro-batches through the
stages; afterwards the image embeddings are on the first stage, those of their contexts on the last. The images'
embeddings travel to the last stage, the loss is formed there once, and their gradient travels back while the second
pass, megatron's 1F1B schedule with gradients, has begun. The first stage adds it where its output is differentiated,
the last stage through the surrogate loss.

Shape legend
    m   images with a context in a micro-batch;  t  packed positions;  D  LM width
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

from lcl_mcore.config.schema import RunConfig
from lcl_mcore.distributed.context import Context
from lcl_mcore.losses.gradcache import cache_gradients
from lcl_mcore.models.lcl import ImageFeatures, LclModel
from lcl_mcore.optimizer import Optimizer
from lcl_mcore.train_step import DeviceMicroBatch, RegionTimer, StepInput, StepObserver, TrainStep


@dataclass
class StageGradients:
    """Gradients that the contrastive loss gives this stage.

    Attributes:
        embeds: d loss / d embeddings, one [m, D] per micro-batch: of the images on the first stage, of the
            contexts on the last.
        scale: d loss / d scale, on the last stage.
        arrival: the transfer still under way, to be waited for before `embeds` is read.
    """

    embeds: tuple[Tensor, ...] = ()
    scale: Tensor | None = None
    arrival: dist.Work | None = None

    def of(self, index: int) -> Tensor:
        """The gradient of one micro-batch's embeddings."""
        if self.arrival is not None:
            self.arrival.wait()
        return self.embeds[index]


class _AddGradient(torch.autograd.Function):
    """Passes the stream on; in backward, gives the image embeddings the gradient that came from the last stage."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, image: Tensor, gradients: StageGradients, index: int, weight: float
    ) -> Tensor:
        ctx.gradients, ctx.index, ctx.weight = gradients, index, weight
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return grads[0], ctx.weight * ctx.gradients.of(ctx.index), None, None, None


class PipelineStage(TrainStep):
    """One stage of several."""

    def __init__(
        self,
        config: RunConfig,
        context: Context,
        model: LclModel,
        ddp: DistributedDataParallel,
        optimizer: Optimizer,
        observer: StepObserver | None = None,
    ) -> None:
        super().__init__(config, context, model, ddp, optimizer, observer)
        self.stage = model.stage
        transfer, other = RegionTimer(self.observe, "pipeline_transfer"), RegionTimer()

        def timers(name: str, log_level: int | None = None) -> RegionTimer:
            return transfer if name.endswith(("-recv", "-send")) else other

        model.config.timers = timers  # megatron's own way to say where its schedule waits for another stage
        self.p2p = P2PCommunicator(context.groups.pp, model.config)

    def forward_backward(self, inputs: StepInput) -> tuple[Tensor, Tensor]:
        """Feature pass, contrastive loss once, then 1F1B with gradients."""
        contrastive, gradients = torch.zeros((), device=self.device), StageGradients()
        if self.trains_contrastive:
            contrastive, gradients = self.contrastive_gradients(inputs, self.feature_pass(inputs))
        return contrastive, self.back_propagate(inputs, gradients)

    @torch.no_grad()
    def feature_pass(self, inputs: StepInput) -> list[Tensor]:
        """Embeddings [m, D] of each micro-batch, of images (first stage) or contexts (last)."""
        embeds: list[Tensor] = []

        def forward(micro: DeviceMicroBatch, index: int) -> Tensor:
            features, out = self.forward_stage(micro, inputs.seed)
            if features is not None:
                with self.observe("image_embeds"):
                    embeds.append(self.model.image_embeds(micro.batch, features.vectors))
            if self.stage.last:
                with self.observe("context_embeds"):
                    embeds.append(self.model.context_embeds(micro.batch, out))
                return torch.zeros((), device=self.device)  # the schedule keeps what the last stage returns
            return out

        self.run_schedule(inputs.micro_batches, forward, forward_only=True)
        return embeds

    def contrastive_gradients(self, inputs: StepInput, embeds: Sequence[Tensor]) -> tuple[Tensor, StageGradients]:
        """The loss on the last stage, and on both ends the gradient of what they contributed."""
        ends, none = self.groups.pipeline_ends, torch.zeros((), device=self.device)
        if ends is None:
            return none, StageGradients()
        own, sizes = torch.cat(list(embeds)), [len(part) for part in embeds]
        if self.stage.first:
            arrival = None
            d_image = torch.empty_like(own)
            if len(own):
                with self.observe("pipeline_transfer"):
                    dist.broadcast(own, group_src=0, group=ends)
                arrival = dist.broadcast(d_image, group_src=1, group=ends, async_op=True)
            return none, StageGradients(d_image.split(sizes), arrival=arrival)
        images = torch.empty_like(own)
        if len(own):
            with self.observe("pipeline_transfer"):
                dist.broadcast(images, group_src=0, group=ends)
        pending = self.begin_contrastive(inputs.batch.counts.contexts, inputs.micro_batches)

        def loss(image: Tensor, context: Tensor, scale: Tensor) -> Tensor:
            with self.observe("contrastive_loss"):
                pending.start_image(image)
                pending.start_text(context)
                return pending.finish(scale)

        cached = cache_gradients(loss, images.split(sizes), embeds, self.model.temperature())
        if len(own):
            dist.broadcast(torch.cat(cached.image), group_src=1, group=ends)
        return cached.loss, StageGradients(cached.context, cached.scale)

    def back_propagate(self, inputs: StepInput, gradients: StageGradients) -> Tensor:
        """Second pass, 1F1B; returns this rank's part of the generation loss."""
        generation_sum = torch.zeros((), device=self.device)
        last = len(inputs.micro_batches) - 1

        def forward(micro: DeviceMicroBatch, index: int) -> Tensor:
            nonlocal generation_sum
            features, out = self.forward_stage(micro, inputs.seed)
            if not self.stage.last:
                self.check_finite(out)
                return self.attach_image_gradient(micro, features, out, gradients, index)
            generation = inputs.generation_weight * self.generation_loss(micro.batch, out)
            generation_sum = generation_sum + generation.detach()
            if not self.trains_contrastive:
                self.check_finite(generation)
                return self.weighted_sum(self.touch_all_parameters(), generation)
            with self.observe("context_embeds"):
                context = self.model.context_embeds(micro.batch, out)
            self.check_finite(context, generation)
            # Its gradient is the chain rule through the cached derivatives; its value means nothing.
            surrogate = (context * gradients.of(index)).sum()
            if index == last and gradients.scale is not None:
                surrogate = surrogate + self.model.temperature() * gradients.scale
            return self.weighted_sum(surrogate, generation)

        self.run_schedule(inputs.micro_batches, forward, forward_only=False)
        return generation_sum

    def attach_image_gradient(
        self,
        micro: DeviceMicroBatch,
        features: ImageFeatures | None,
        out: Tensor,
        gradients: StageGradients,
        index: int,
    ) -> Tensor:
        """The stream [t, 1, D], with the images' part of the contrastive gradient attached on the first stage."""
        if features is None or not self.trains_contrastive:
            return out
        with self.observe("image_embeds"):
            image = self.model.image_embeds(micro.batch, features.vectors)
        self.check_finite(image)
        attached: Tensor = _AddGradient.apply(out, image, gradients, index, self.loss.contrastive_weight)
        return attached

    def forward_stage(self, micro: DeviceMicroBatch, seed: int) -> tuple[ImageFeatures | None, Tensor]:
        """This stage's part of the model; the features of the images on the first stage."""
        model, batch, keys = self.model, micro.batch, micro.sequence_keys
        if not self.stage.first:
            assert model.received is not None
            with self.observe("forward_language"):
                return None, model.forward_language(batch, model.received, keys, seed, received=True)
        with self.observe("encode_images"):
            features = model.encode_images(batch.images, batch.image_keys, seed)
        with self.observe("forward_language"):
            return features, model.forward_language(batch, features.latents, keys, seed)

    def run_schedule(
        self,
        micro_batches: Sequence[DeviceMicroBatch],
        forward: Callable[[DeviceMicroBatch, int], Tensor],
        *,
        forward_only: bool,
    ) -> None:
        """Run megatron's schedule. What `forward` returns on the last stage is the loss."""

        def step(data: Iterator[tuple[int, DeviceMicroBatch]], model: Any) -> tuple[Tensor, Any]:
            index, micro = next(data)
            return forward(micro, index), as_is

        def as_is(loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), {}

        # Gradients are reduced with the last micro-batch. A pass without any would enter `no_sync` and not leave it.
        self.model.config.no_sync_func = None if forward_only else self.ddp.no_sync
        forward_backward_pipelining_without_interleaving(
            forward_step_func=step,
            data_iterator=iter(enumerate(micro_batches)),
            model=self.model,
            num_microbatches=len(micro_batches),
            # Sequences have one length, and micro-batches as many sequences.
            seq_length=micro_batches[0].batch.tokens.shape[0],
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=self.p2p,
            pg_collection=self.groups.megatron,
        )
