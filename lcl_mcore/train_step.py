"""One optimizer step: forward, both losses, backward, update. The host never waits for the device here."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from lcl_mcore.batch import StepBatch
from lcl_mcore.config.run import RunConfig
from lcl_mcore.distributed.groups import Groups
from lcl_mcore.forward_backward import Gradients, OneStage
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.optimizer import Optimizer
from lcl_mcore.pipeline import Pipelined


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
        self.model, self.ddp, self.optimizer, self.groups = model, ddp, optimizer, groups
        schedule = OneStage if model.stage.count == 1 else Pipelined
        self.gradients: Gradients = schedule(config, model, ddp, groups)

    @property
    def finite(self) -> Tensor:
        """Whether what this rank computed in the last step was finite: bool scalar on the device."""
        return self.gradients.finite

    def run(self, step: int, batch: StepBatch, lr: float, requests: float) -> Tensor:
        """Train on one global batch.

        Args:
            step: 0-based number of the step, part of the key of its random masks.
            requests: what this rank asks of all: 1 to end the run after this step, 0.5 to save.

        Returns:
            Device vector [grad norm, skipped, non-finite ranks, requests, contrastive loss,
            generation loss, scale]; the losses are those of the global batch, unweighted, and the scale is
            the one they were formed with.
        """
        self.ddp.train()
        self.optimizer.zero_grad()
        contrastive, generation = self.accumulate_gradients(step, batch)
        finalize_model_grads([self.ddp], pg_collection=self.groups.megatron)
        copies = self.groups.tp.size()
        everyone = copies * self.groups.dp.size()  # of the ranks that know the contrastive loss and the scale
        scale = torch.zeros((), device=contrastive.device)
        if self.model.stage.last:
            # Not by calling the module: its hook would gather parameters that are about to change.
            scale = self.model.temperature.log_scale.detach().exp().squeeze(0)
        local = torch.stack(
            (
                (~self.finite).float(),
                torch.full((), float(requests), device=contrastive.device),
                contrastive / everyone,
                generation / copies,
                scale / everyone,
            )
        )
        stats = self.optimizer.step(lr, local)
        if self.model.stage.last:
            self.model.temperature.clamp()
        return stats

    def accumulate_gradients(self, step: int, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Forward and backward of all micro-batches, see `Gradients.accumulate`."""
        return self.gradients.accumulate(step, batch)
