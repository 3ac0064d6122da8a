"""Forward and backward of one step on one pipeline stage: what ends up in the gradient buffers.

With several micro-batches the contrastive negatives still span the whole global batch: a first pass without
gradients collects the unit vectors, the loss is computed once over all of them, and a second pass
back-propagates its gradient with the generation loss (GradCache, arXiv:2101.06983). All randomness is keyed by
(seed, step, identity), so both passes draw the same masks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from lcl_mcore.batch import MicroBatch, StepBatch
from lcl_mcore.config.run import RunConfig
from lcl_mcore.distributed.groups import Groups
from lcl_mcore.losses.contrastive import make_contrastive
from lcl_mcore.losses.generation import generation_loss_sum, generation_weight
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.rng import key_of


@dataclass(frozen=True)
class OnDevice:
    """A micro-batch on the device, with the row identities still on the host."""

    batch: MicroBatch
    sequence_keys: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """One step's input on this rank.

    micros   its micro-batches;  seed  of all masks of the step
    weight   turns this rank's sum of target losses into its part of the global mean
    """

    micros: list[OnDevice]
    seed: int
    weight: float
    batch: StepBatch


class Gradients(ABC):
    """What the schedules share: the losses, and the rule that every parameter gets a gradient."""

    def __init__(
        self, config: RunConfig, model: LclModel, ddp: DistributedDataParallel, groups: Groups
    ) -> None:
        self.config, self.loss = config, config.loss
        self.model, self.ddp, self.groups = model, ddp, groups
        self.device = next(model.parameters()).device
        self.contrastive = make_contrastive(
            config.loss,
            groups.loss,
            groups.tp,
            half=self.device.type == "cuda" and config.train.precision != "fp32",
        )
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        """Whether what this rank computed in the last step was finite; on the device, read only after a failure."""
        self.trains_contrastive = self.loss.contrastive_weight > 0
        self.trains_generation = self.loss.generation_weight > 0

    def accumulate(self, step: int, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Forward and backward of all micro-batches.

        Returns:
            The global contrastive loss and this rank's part of the global generation loss, detached; zeros
            on pipeline stages that do not form the losses.
        """
        self.finite = torch.ones_like(self.finite)
        micros = [
            OnDevice(micro.to(self.device), tuple(micro.sequence_keys.tolist()))
            for micro in batch.micro_batches
        ]
        seed = key_of(self.config.train.seed, "step", step)
        weight = generation_weight(batch.counts.targets, self.groups.dp.rank(), self.loss.averaging)
        return self._run(Work(micros, seed, weight, batch))

    @abstractmethod
    def _run(self, work: Work) -> tuple[Tensor, Tensor]:
        """What `accumulate` returns, for input that is on the device."""

    def _check(self, *own: Tensor) -> None:
        """Note on the device whether all of what this rank itself computed is finite."""
        for value in own:
            self.finite = self.finite & torch.isfinite(value.detach().sum())

    def _generation(self, batch: MicroBatch, hidden: Tensor) -> Tensor:
        """Sum of this micro-batch's target losses; with weight 0 a zero that still reaches every parameter."""
        if not self.trains_generation:
            return self._touch_all()
        language = self.model.language
        return generation_loss_sum(
            language.targets(hidden, batch.target_positions),
            language.head_weight,
            batch.target_labels,
            vocab_start=language.vocab_range[0],
            vocab_size=self.config.model.language.vocab_size,
            tp_group=self.groups.tp,
            impl=self.loss.generation_impl,
        )

    def _weighted(self, contrastive: Tensor, generation: Tensor) -> Tensor:
        """The sum to back-propagate; a loss that is switched off is a plain zero here."""
        if self.trains_contrastive:
            contrastive = self.loss.contrastive_weight * contrastive
        if self.trains_generation:
            generation = self.loss.generation_weight * generation
        return contrastive + generation

    def _touch_all(self) -> Tensor:
        """Zero that gives every parameter a zero gradient: the gradient reduction waits for all of them."""
        return sum(
            (0.0 * p.flatten()[0].float() for p in self.model.parameters()),
            torch.zeros((), device=self.device),
        )

    def _group_ids(self, micros: Sequence[OnDevice]) -> Tensor | None:
        """Document numbers of the images in the loss, where images of one document are masked."""
        if not self.loss.mask_same_document:
            return None
        return torch.cat([micro.batch.group_ids for micro in micros])


class OneStage(Gradients):
    """The whole model on this rank's tensor-parallel group."""

    def _run(self, work: Work) -> tuple[Tensor, Tensor]:
        counts, several = work.batch.counts, len(work.micros) > 1
        if not self.trains_contrastive:
            return self._generation_only(work)
        if several and self.loss.negatives == "global_batch":
            return self._two_passes(work)
        return self._one_pass(work, counts.micro_contexts if several else (counts.contexts,))

    def _one_pass(self, work: Work, counts: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
        """Negatives come from the micro-batch, which is the whole batch when there is only one."""
        contrastive_sum = torch.zeros((), device=self.device)
        generation_sum = torch.zeros((), device=self.device)
        for index, micro in enumerate(work.micros):
            with self._sync(index == len(work.micros) - 1):
                pending = self.contrastive.begin(
                    counts[index],
                    self.config.model.language.width,
                    group_ids=self._group_ids([micro]),
                )
                features = self.model.encode_images(micro.batch.images, micro.batch.image_keys, work.seed)
                # The gathers start as soon as their operands exist and run beside what follows.
                image = self.model.image_embeds(micro.batch, features.vectors)
                pending.start_image(image)
                hidden = self.model.forward_language(
                    micro.batch, features.latents, micro.sequence_keys, work.seed
                )
                context = self.model.context_embeds(micro.batch, hidden)
                pending.start_text(context)
                generation = work.weight * self._generation(micro.batch, hidden)
                self._check(image, context, generation)
                contrastive = pending.finish(self.model.temperature()) / len(work.micros)
                self._weighted(contrastive, generation).backward()
            contrastive_sum += contrastive.detach()
            generation_sum += generation.detach()
        return contrastive_sum, generation_sum

    def _two_passes(self, work: Work) -> tuple[Tensor, Tensor]:
        """Exact negatives over all micro-batches, at the price of a second forward pass."""
        with torch.no_grad():
            sides = [self._sides(micro, work.seed)[:2] for micro in work.micros]
        image, context = (torch.cat(side).requires_grad_() for side in zip(*sides, strict=True))
        scale = self.model.temperature().detach().requires_grad_()
        counts, group_ids = work.batch.counts.contexts, self._group_ids(work.micros)
        pending = self.contrastive.begin(counts, image.shape[1], group_ids=group_ids)
        pending.start_image(image)
        pending.start_text(context)
        contrastive = pending.finish(scale)
        d_image, d_context, d_scale = torch.autograd.grad(contrastive, (image, context, scale))
        sizes = [side[0].shape[0] for side in sides]
        parts = zip(work.micros, d_image.split(sizes), d_context.split(sizes), strict=True)
        generation_sum = torch.zeros((), device=self.device)
        for index, (micro, d_image_part, d_context_part) in enumerate(parts):
            with self._sync(index == len(work.micros) - 1):
                image, context, hidden = self._sides(micro, work.seed)
                generation = work.weight * self._generation(micro.batch, hidden)
                self._check(image, context, generation)
                # Its gradient is the chain rule through the cached derivatives; its value means nothing.
                surrogate = (image * d_image_part).sum() + (context * d_context_part).sum()
                if index == len(work.micros) - 1:  # where the gradient reduction expects every parameter
                    surrogate = surrogate + self.model.temperature() * d_scale
                self._weighted(surrogate, generation).backward()
            generation_sum += generation.detach()
        return contrastive.detach(), generation_sum

    def _generation_only(self, work: Work) -> tuple[Tensor, Tensor]:
        generation_sum = torch.zeros((), device=self.device)
        for index, micro in enumerate(work.micros):
            with self._sync(index == len(work.micros) - 1):
                features = self.model.encode_images(micro.batch.images, micro.batch.image_keys, work.seed)
                hidden = self.model.forward_language(
                    micro.batch, features.latents, micro.sequence_keys, work.seed
                )
                generation = work.weight * self._generation(micro.batch, hidden)
                self._check(generation)
                self._weighted(self._touch_all(), generation).backward()
            generation_sum += generation.detach()
        return torch.zeros((), device=self.device), generation_sum

    def _sides(self, micro: OnDevice, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of images and contexts [m, D], and the hidden states [t, D]."""
        features = self.model.encode_images(micro.batch.images, micro.batch.image_keys, seed)
        hidden = self.model.forward_language(micro.batch, features.latents, micro.sequence_keys, seed)
        image = self.model.image_embeds(micro.batch, features.vectors)
        return image, self.model.context_embeds(micro.batch, hidden), hidden

    def _sync(self, last: bool) -> AbstractContextManager[object]:
        """Reduce gradients with the last micro-batch only."""
        return nullcontext() if last else self.ddp.no_sync()
