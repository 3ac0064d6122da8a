"""One optimizer step: forward, both losses, backward, update. The host never waits for the device here.

With several micro-batches the contrastive negatives still span the whole global batch, by `losses.gradcache`. All
randomness is keyed by (seed, step, identity), so the feature pass and the second forward pass draw the same masks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from lcl_mcore.batch import MicroBatch, StepBatch
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.distributed.context import Context
from lcl_mcore.losses.contrastive import PendingLoss, make_contrastive
from lcl_mcore.losses.generation import generation_loss_sum, generation_weight
from lcl_mcore.losses.gradcache import CachedGradients, cache_gradients
from lcl_mcore.metrics import StepOutput
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.optimizer import Optimizer
from lcl_mcore.rng import key63


class StepObserver(Protocol):
    """Watches the parts of a step as they run, for counters and profilers; changes nothing."""

    def region(self, name: str) -> AbstractContextManager[object]:
        """Entered around "encode_images", "forward_language", "image_embeds", "context_embeds",
        "contrastive_loss", "generation_loss", "parameter_gather", "gradient_sync", "optimizer" and
        "pipeline_transfer"."""


class NoObserver:
    """Watches nothing."""

    def region(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()


class RegionTimer:
    """A region whose beginning and end are two calls of torch or megatron, with arguments of theirs."""

    def __init__(self, observe: Callable[[str], AbstractContextManager[object]] | None = None, name: str = "") -> None:
        """`observe` is an observer's `region`; None: the calls do nothing."""
        self.observe, self.name = observe, name
        self.entered = ExitStack()

    def start(self, *_: object, **options: object) -> None:
        if self.observe is not None:
            self.entered.enter_context(self.observe(self.name))

    def stop(self, *_: object, **options: object) -> None:
        self.entered.close()


@dataclass(frozen=True)
class DeviceMicroBatch:
    """A micro-batch on the device, with the identities of its sequences still on the host."""

    batch: MicroBatch
    sequence_keys: tuple[int, ...]


@dataclass(frozen=True)
class StepInput:
    """One step's input on this rank.

    Attributes:
        micro_batches: this rank's share of the global batch.
        seed: key of all masks of the step.
        generation_weight: turns this rank's sum of target losses into its part of the global mean.
        batch: what the loader gave, with the counts of all ranks.
    """

    micro_batches: list[DeviceMicroBatch]
    seed: int
    generation_weight: float
    batch: StepBatch


class TrainStep(ABC):
    """Optimizer steps of one data-parallel rank on one pipeline stage; the schedules are its subclasses."""

    def __init__(
        self,
        config: RunConfig,
        context: Context,
        model: LclModel,
        ddp: DistributedDataParallel,
        optimizer: Optimizer,
        observer: StepObserver | None = None,
    ) -> None:
        self.config, self.loss = config, config.loss
        self.groups, self.device = context.groups, context.device.device
        self.model, self.ddp, self.optimizer = model, ddp, optimizer
        self.observe = (observer or NoObserver()).region
        if observer is not None and ddp.ddp_config.overlap_param_gather:
            self.observe_parameter_gather()
        self.contrastive = make_contrastive(
            config.loss, self.groups, half=context.device.is_cuda and config.train.precision != "fp32"
        )
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        """Whether what this rank computed in the last step was finite; on the device, read only after a failure."""
        self.trains_contrastive = self.loss.contrastive_weight > 0
        self.trains_generation = self.loss.generation_weight > 0

    def observe_parameter_gather(self) -> None:
        """Observe megatron's hooks, which wait before a module's forward for the parameters of other ranks."""
        timer = RegionTimer(self.observe, "parameter_gather")
        for module in self.model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(timer.start, prepend=True)
                module.register_forward_pre_hook(timer.stop)

    def run(self, step: int, batch: StepBatch, lr: float, *, stop: bool = False, save: bool = False) -> StepOutput:
        """Train on one global batch.

        Args:
            step: 0-based number of the step, part of the key of its random masks.
            batch: this data-parallel rank's share, with the counts of all.
            lr: learning rate.
            stop: this rank asks all to end the run after this step.
            save: this rank asks all for a checkpoint after this step.

        Returns:
            Numbers of the whole job, on the device; losses are those of the global batch, unweighted, and the
            scale is the one they were formed with.
        """
        self.ddp.train()
        self.optimizer.zero_grad()
        contrastive, generation = self.forward_backward(self.prepare(step, batch))
        with self.observe("gradient_sync"):
            finalize_model_grads([self.ddp], pg_collection=self.groups.megatron)
        copies = self.groups.tp.size()
        everyone = copies * self.groups.dp.size()  # of the ranks that know the contrastive loss and the scale
        scale = torch.zeros((), device=self.device)
        if self.model.stage.last:
            # Not by calling the module: its hook would gather parameters that are about to change.
            scale = self.model.temperature.log_scale.detach().exp().squeeze(0)
        local = torch.stack(
            (
                (~self.finite).float(),
                torch.full((), float(stop), device=self.device),
                torch.full((), float(save), device=self.device),
                contrastive / everyone,
                generation / copies,
                scale / everyone,
            )
        )
        with self.observe("optimizer"):
            output = StepOutput(self.optimizer.step(lr, local))
        if self.model.stage.last:
            self.model.temperature.clamp()
        return output

    def prepare(self, step: int, batch: StepBatch) -> StepInput:
        """Start the copies to the device and derive the step's key and weight."""
        self.finite = torch.ones_like(self.finite)
        micro_batches = [
            DeviceMicroBatch(micro.to(self.device), tuple(micro.sequence_keys.tolist()))
            for micro in batch.micro_batches
        ]
        seed = key63(self.config.train.seed, "step", step)
        weight = generation_weight(batch.counts.targets, self.groups.dp.rank(), self.loss.averaging)
        return StepInput(micro_batches, seed, weight, batch)

    @abstractmethod
    def forward_backward(self, inputs: StepInput) -> tuple[Tensor, Tensor]:
        """Forward and backward of all micro-batches; gradients end up in the gradient buffers.

        Returns:
            The global contrastive loss and this rank's part of the global generation loss, detached; zeros
            on pipeline stages that do not form the losses.
        """

    def check_finite(self, *own: Tensor) -> None:
        """Record on the device whether all of what this rank itself computed is finite."""
        for value in own:
            self.finite = self.finite & torch.isfinite(value.detach().sum())

    def generation_loss(self, batch: MicroBatch, hidden: Tensor) -> Tensor:
        """Sum of this micro-batch's target losses; with weight 0 a zero that still reaches every parameter.

        Args:
            hidden: [t, D] from the LM's last stage.
        """
        if not self.trains_generation:
            return self.touch_all_parameters()
        language = self.model.language
        with self.observe("generation_loss"):
            return generation_loss_sum(
                language.targets(hidden, batch.target_positions),
                language.head_weight,
                batch.target_labels,
                vocab_start=language.vocab_range[0],
                vocab_size=self.config.model.language.vocab_size,
                tp_group=self.groups.tp,
                impl=self.loss.generation_impl,
                elementwise=language.elementwise,
            )

    def weighted_sum(self, contrastive: Tensor, generation: Tensor) -> Tensor:
        """The scalar to back-propagate; a loss that is switched off is a plain zero here."""
        if self.trains_contrastive:
            contrastive = self.loss.contrastive_weight * contrastive
        if self.trains_generation:
            generation = self.loss.generation_weight * generation
        return contrastive + generation

    def touch_all_parameters(self) -> Tensor:
        """Zero that gives every parameter a zero gradient: the gradient reduction waits for all of them."""
        return sum((0.0 * p.flatten()[0].float() for p in self.model.parameters()), torch.zeros((), device=self.device))

    def group_ids(self, micro_batches: Sequence[DeviceMicroBatch]) -> Tensor | None:
        """Document numbers [m] of the images in the loss, where images of one document are masked."""
        if not self.loss.mask_same_document:
            return None
        return torch.cat([micro.batch.group_ids for micro in micro_batches])

    def begin_contrastive(self, counts: Sequence[int], micro_batches: Sequence[DeviceMicroBatch]) -> PendingLoss:
        """Open the contrastive loss over these micro-batches; `counts` are the contexts of every rank."""
        width = self.config.model.language.width
        with self.observe("contrastive_loss"):
            return self.contrastive.begin(counts, width, group_ids=self.group_ids(micro_batches))


class SingleStage(TrainStep):
    """The whole model on this rank's tensor-parallel group."""

    def forward_backward(self, inputs: StepInput) -> tuple[Tensor, Tensor]:
        """Each micro-batch forward and backward in turn; gradients are reduced with the last one."""
        micro_batches, counts = inputs.micro_batches, inputs.batch.counts
        several = len(micro_batches) > 1
        cached = None
        if self.trains_contrastive and several and self.loss.negatives == "global_batch":
            cached = self.feature_pass(inputs)
        contrastive_sum = torch.zeros((), device=self.device) if cached is None else cached.loss
        generation_sum = torch.zeros((), device=self.device)
        for index, micro in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.ddp.no_sync():
                pending = None
                if self.trains_contrastive and cached is None:  # negatives come from this micro-batch alone
                    contexts = counts.micro_contexts[index] if several else counts.contexts
                    pending = self.begin_contrastive(contexts, [micro])
                embeds, hidden = self.forward(micro, inputs.seed, pending)
                generation = inputs.generation_weight * self.generation_loss(micro.batch, hidden)
                self.check_finite(*embeds, generation)
                if cached is not None:
                    contrastive = cached.surrogate(index, *embeds)
                    if last:  # where the gradient reduction expects every parameter
                        contrastive = contrastive + self.model.temperature() * cached.scale
                elif pending is not None:
                    with self.observe("contrastive_loss"):
                        contrastive = pending.finish(self.model.temperature())
                    contrastive = contrastive / len(micro_batches)
                    contrastive_sum = contrastive_sum + contrastive.detach()
                else:
                    contrastive = self.touch_all_parameters()
                loss = self.weighted_sum(contrastive, generation)
                loss.backward()
            generation_sum += generation.detach()
        return contrastive_sum, generation_sum

    def forward(
        self, micro: DeviceMicroBatch, seed: int, pending: PendingLoss | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The model on one micro-batch.

        Args:
            pending: contrastive loss to hand the embeddings to as soon as they exist, so that its gathers
                run beside what follows.

        Returns:
            L2-normalised embeddings of images and contexts, [m, D] each (none where the contrastive loss is
            switched off), and the LM's hidden states [t, D].
        """
        model, batch = self.model, micro.batch
        with self.observe("encode_images"):
            features = model.encode_images(batch.images, batch.image_keys, seed)
        embeds: list[Tensor] = []
        if self.trains_contrastive:
            with self.observe("image_embeds"):
                embeds.append(model.image_embeds(batch, features.vectors))
            if pending is not None:
                with self.observe("contrastive_loss"):
                    pending.start_image(embeds[0])
        with self.observe("forward_language"):
            hidden = model.forward_language(batch, features.latents, micro.sequence_keys, seed)
        if self.trains_contrastive:
            with self.observe("context_embeds"):
                embeds.append(model.context_embeds(batch, hidden))
            if pending is not None:
                with self.observe("contrastive_loss"):
                    pending.start_text(embeds[1])
        return tuple(embeds), hidden

    @torch.no_grad()
    def feature_pass(self, inputs: StepInput) -> CachedGradients:
        """Exact negatives over all micro-batches, at the price of one more forward pass."""
        embeds = [self.forward(micro, inputs.seed)[0] for micro in inputs.micro_batches]
        images, contexts = zip(*embeds, strict=True)
        pending = self.begin_contrastive(inputs.batch.counts.contexts, inputs.micro_batches)

        def loss(image: Tensor, context: Tensor, scale: Tensor) -> Tensor:
            with self.observe("contrastive_loss"):
                pending.start_image(image)
                pending.start_text(context)
                return pending.finish(scale)

        with torch.enable_grad():
            return cache_gradients(loss, images, contexts, self.model.temperature())
