"""One optimizer step: forward, both losses, backward, update. The host never waits for the device here.

With several micro-batches the contrastive negatives still span the whole global batch: a first pass without
gradients collects the unit vectors, the loss is computed once over all of them, and a second pass
back-propagates its gradient with the generation loss (GradCache, arXiv:2101.06983). All randomness is keyed by
(seed, step, identity), so both passes draw the same masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from lcl_mcore.config.run import RunConfig
from lcl_mcore.data.batch import MicroBatch, StepBatch
from lcl_mcore.losses.contrastive import make_contrastive
from lcl_mcore.losses.generation import generation_loss_sum, generation_weight
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.models.randomness import key_of
from lcl_mcore.parallel.groups import Groups
from lcl_mcore.training.optimizer import Optimizer


@dataclass(frozen=True)
class OnDevice:
    """A micro-batch on the device, with the row identities still on the host."""

    batch: MicroBatch
    row_keys: tuple[int, ...]


class TrainStep:
    """Runs optimizer steps of one data-parallel rank on one pipeline stage.

    Besides the updated parameters, `run` returns a device vector that `training.metrics` reads later.
    """

    def __init__(
        self,
        config: RunConfig,
        model: LclModel,
        ddp: DistributedDataParallel,
        optimizer: Optimizer,
        groups: Groups,
    ) -> None:
        self.config, self.loss = config, config.loss
        self.model, self.ddp, self.optimizer, self.groups = model, ddp, optimizer, groups
        self.device = next(model.parameters()).device
        self.contrastive = make_contrastive(
            config.loss,
            groups.loss,
            groups.tp,
            half=self.device.type == "cuda" and config.train.precision != "fp32",
        )
        self.dp_rank = groups.dp.rank()
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        """Whether what this rank computed in the last step was finite; on the device, read only after a failure."""
        self.trains_contrastive = self.loss.contrastive_weight > 0
        self.trains_generation = self.loss.generation_weight > 0

    def run(self, step: int, batch: StepBatch, lr: float, stop_requested: bool) -> Tensor:
        """Train on one global batch.

        Args:
            step: 0-based number of the step, part of the key of its random masks.
            stop_requested: whether this rank wants the run to end after this step.

        Returns:
            Device vector [grad norm, skipped, non-finite ranks, stop requests, contrastive loss,
            generation loss, scale]; the losses are those of the global batch, unweighted.
        """
        self.ddp.train()
        self.optimizer.zero_grad()
        contrastive, generation = self.accumulate_gradients(step, batch)
        finalize_model_grads([self.ddp], pg_collection=self.groups.megatron)
        copies = self.groups.tp.size()
        local = torch.stack((
            (~self.finite).float(),
            torch.full((), float(stop_requested), device=self.device),
            contrastive / (copies * self.groups.dp.size()),
            generation / copies,
        ))  # fmt: skip
        stats = self.optimizer.step(lr, local)
        self.model.temperature.clamp()
        return torch.cat((stats, self.model.temperature().detach()[None]))

    def accumulate_gradients(self, step: int, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Forward and backward of all micro-batches.

        Returns:
            The global contrastive loss and this rank's part of the global generation loss, detached.
        """
        seed = key_of(self.config.train.seed, "step", step)
        self.finite = torch.ones_like(self.finite)
        moved = [
            OnDevice(micro.to(self.device), tuple(micro.row_keys.tolist())) for micro in batch.micro_batches
        ]
        weight = generation_weight(batch.counts.targets, self.dp_rank, self.loss.mean)
        if not self.trains_contrastive:
            return self._generation_only(moved, seed, weight)
        if len(moved) > 1 and self.loss.negatives == "global_batch":
            return self._two_passes(moved, seed, weight, batch.counts.contexts)
        counts = batch.counts.micro_contexts if len(moved) > 1 else (batch.counts.contexts,)
        return self._one_pass(moved, seed, weight, counts)

    def _one_pass(
        self, moved: Sequence[OnDevice], seed: int, weight: float, counts: tuple[tuple[int, ...], ...]
    ) -> tuple[Tensor, Tensor]:
        """Negatives come from the micro-batch, which is the whole batch when there is only one."""
        contrastive_sum = torch.zeros((), device=self.device)
        generation_sum = torch.zeros((), device=self.device)
        for index, micro in enumerate(moved):
            with self._sync(index == len(moved) - 1):
                pending = self.contrastive.begin(
                    counts[index],
                    self.config.model.language.width,
                    group_ids=micro.batch.group_ids if self.loss.mask_same_document else None,
                )
                features = self.model.encode_images(micro.batch.images, micro.batch.image_keys, seed)
                # The gathers start as soon as their operands exist and run beside what follows.
                image = self.model.image_side(micro.batch, features.vectors)
                pending.start_image(image)
                hidden = self.model.read(micro.batch, features.latents, micro.row_keys, seed)
                context = self.model.context_side(micro.batch, hidden)
                pending.start_text(context)
                generation = weight * self._generation(micro.batch, hidden)
                self._check(image, context, generation)
                contrastive = pending.finish(self.model.temperature()) / len(moved)
                self._backward(contrastive, generation)
            contrastive_sum += contrastive.detach()
            generation_sum += generation.detach()
        return contrastive_sum, generation_sum

    def _two_passes(
        self, moved: Sequence[OnDevice], seed: int, weight: float, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Exact negatives over all micro-batches, at the price of a second forward pass."""
        with torch.no_grad():
            sides = [self._sides(micro, seed)[:2] for micro in moved]
        image, context = (torch.cat(side).requires_grad_() for side in zip(*sides, strict=True))
        scale = self.model.temperature().detach().requires_grad_()
        group_ids = (
            torch.cat([micro.batch.group_ids for micro in moved]) if self.loss.mask_same_document else None
        )
        pending = self.contrastive.begin(counts, image.shape[1], group_ids=group_ids)
        pending.start_image(image)
        pending.start_text(context)
        contrastive = pending.finish(scale)
        d_image, d_context, d_scale = torch.autograd.grad(contrastive, (image, context, scale))
        sizes = [side[0].shape[0] for side in sides]
        parts = zip(moved, d_image.split(sizes), d_context.split(sizes), strict=True)
        generation_sum = torch.zeros((), device=self.device)
        for index, (micro, d_image_part, d_context_part) in enumerate(parts):
            with self._sync(index == len(moved) - 1):
                image, context, hidden = self._sides(micro, seed)
                generation = weight * self._generation(micro.batch, hidden)
                self._check(image, context, generation)
                # Its gradient is the chain rule through the cached derivatives; its value means nothing.
                surrogate = (image * d_image_part).sum() + (context * d_context_part).sum()
                if index == len(moved) - 1:  # where the gradient reduction expects every parameter
                    surrogate = surrogate + self.model.temperature() * d_scale
                self._backward(surrogate, generation)
            generation_sum += generation.detach()
        return contrastive.detach(), generation_sum

    def _generation_only(self, moved: Sequence[OnDevice], seed: int, weight: float) -> tuple[Tensor, Tensor]:
        generation_sum = torch.zeros((), device=self.device)
        for index, micro in enumerate(moved):
            with self._sync(index == len(moved) - 1):
                features = self.model.encode_images(micro.batch.images, micro.batch.image_keys, seed)
                hidden = self.model.read(micro.batch, features.latents, micro.row_keys, seed)
                generation = weight * self._generation(micro.batch, hidden)
                self._check(generation)
                self._backward(self._touch_all(), generation)
            generation_sum += generation.detach()
        return torch.zeros((), device=self.device), generation_sum

    def _check(self, *own: Tensor) -> None:
        """Note on the device whether all of what this rank itself computed is finite."""
        for value in own:
            self.finite = self.finite & torch.isfinite(value.detach().sum())

    def _sides(self, micro: OnDevice, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of images and contexts [m, D], and the hidden states [t, D]."""
        features = self.model.encode_images(micro.batch.images, micro.batch.image_keys, seed)
        hidden = self.model.read(micro.batch, features.latents, micro.row_keys, seed)
        image = self.model.image_side(micro.batch, features.vectors)
        return image, self.model.context_side(micro.batch, hidden), hidden

    def _generation(self, batch: MicroBatch, hidden: Tensor) -> Tensor:
        """Sum of this micro-batch's target losses; with weight 0 a zero that still reaches every parameter."""
        if not self.trains_generation:
            return self._touch_all()
        language = self.model.language
        return generation_loss_sum(
            language.targets(hidden, batch.target_rows),
            language.head_weight,
            batch.target_labels,
            vocab_start=language.vocab_range[0],
            vocab_size=self.config.model.language.vocab_size,
            tp_group=self.groups.tp,
            impl=self.loss.generation_impl,
        )

    def _backward(self, contrastive: Tensor, generation: Tensor) -> None:
        weighted = self.loss.contrastive_weight * contrastive if self.trains_contrastive else contrastive
        total = weighted + (
            self.loss.generation_weight * generation if self.trains_generation else generation
        )
        total.backward()

    def _touch_all(self) -> Tensor:
        """Zero that gives every parameter a zero gradient: the gradient reduction waits for all of them."""
        return sum(
            (0.0 * p.flatten()[0].float() for p in self.model.parameters()),
            torch.zeros((), device=self.device),
        )

    def _sync(self, last: bool) -> AbstractContextManager[object]:
        """Reduce gradients with the last micro-batch only."""
        return nullcontext() if last else self.ddp.no_sync()
