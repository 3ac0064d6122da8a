"""megatron's distributed optimizer around a fused AdamW (`training.adam`), clipped and guarded on the device.

The update takes a gradient divisor and a skip flag as device scalars. Both come from the gradient norm without
the host ever waiting for it: clipping is the divisor, and a norm that is not finite is the skip flag, so bad
gradients leave parameters and moments bitwise unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from lcl_mcore.config.schema import OptimConfig, ParallelConfig
from lcl_mcore.distributed.groups import Groups
from lcl_mcore.fused_adam import build_adam
from lcl_mcore.models.lcl import LclModel

# megatron's default grows with the data-parallel size: at 512 ranks the whole of ViT-L/14 + OPT-125M would be one
# bucket, and nothing would be left to overlap with.
BUCKET_PARAMETERS = 40_000_000


class DataParallel(DistributedDataParallel):
    """megatron's gradient buffers; alone in its group, a rank neither reduces gradients nor gathers parameters."""

    @property
    def alone(self) -> bool:
        return bool(self.dp_cp_group.size() == 1)

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        if not self.alone:
            super().finish_grad_sync(*args, **kwargs)

    def start_param_sync(self, *args: Any, **kwargs: Any) -> None:
        if not self.alone:
            super().start_param_sync(*args, **kwargs)


def wrap_data_parallel(model: LclModel, parallel: ParallelConfig, groups: Groups) -> DistributedDataParallel:
    """Gradient buffers in fp32, reduced (summed: the losses carry their own means) while backward runs."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce and groups.dp.size() > 1,
        overlap_param_gather=parallel.overlap_param_gather and groups.dp.size() > 1,
        use_distributed_optimizer=True,
        average_in_collective=False,
        bucket_size=BUCKET_PARAMETERS,
    )
    return DataParallel(model.config, config, model, pg_collection=groups.megatron)


class Optimizer:
    """AdamW over shards of the parameters; `step` never waits for the device."""

    def __init__(self, ddp: DistributedDataParallel, optim: OptimConfig, dtype: torch.dtype, groups: Groups) -> None:
        config = OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=0.0,  # done here, on the device
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=ddp.ddp_config.overlap_param_gather,
        )
        optimizer = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False, pg_collection=groups.megatron)
        chained = getattr(optimizer, "chained_optimizers", [optimizer])
        self.shards: Any = chained[0]  # dense parameters: the only kind there is
        self.device = next(ddp.parameters()).device
        self.update = build_adam(self.shards.optimizer.param_groups, optim, self.device)
        self.adam = self.update.inner
        self.shards.optimizer = self.adam
        # Renamed in megatron-core 0.17; under both names it leaves out what other ranks count already.
        new, old = "get_grads_for_grad_norm", "get_main_grads_for_grad_norm"
        self._grads_for_norm = getattr(self.shards, new if hasattr(self.shards, new) else old)
        self.ddp, self.clip = ddp, optim.clip_grad
        model: LclModel = ddp.module
        self.tp_group = groups.tp
        self.vision_copies = self._shards_of(model.vision_parameters()) if model.vision_data else []
        self.skipped = torch.zeros((), device=self.device)  # sticky: 1 once anything was not finite
        self.all_ranks: dist.ProcessGroup = self.shards.get_grad_stats_parallel_group()

    @torch.no_grad()
    def set_masters(self, exact: Mapping[nn.Parameter, Tensor]) -> None:
        """Give this rank's fp32 master weights their exact values: megatron makes them from the rounded parameters.

        Args:
            exact: fp32 values of the parameters that were rounded.
        """
        for parameter, start, (master, _, _) in self.owned():
            if parameter in exact:
                master.copy_(exact[parameter].view(-1)[start : start + master.numel()])

    def zero_grad(self) -> None:
        """Clear gradients and gradient buffers before a step."""
        self.ddp.zero_grad_buffer()
        self.shards.zero_grad()

    def step(self, lr: float, local: Tensor) -> Tensor:
        """Update the parameters unless something is not finite.

        Args:
            lr: learning rate of this step.
            local: [c] fp32 numbers of this rank to be summed over all ranks with the norm; the first one is
                the count of non-finite losses.

        Returns:
            [2 + c] on the device: gradient norm before clipping, 1 if the update was skipped, the sums.
        """
        self.shards.prepare_grads()
        self.sum_vision_copies()
        grads = self._grads_for_norm()
        square = torch.zeros((), device=self.device)
        if grads:
            square = torch.stack(torch._foreach_norm(grads)).float().square().sum()
        sums = torch.cat((square[None], local))
        dist.all_reduce(sums, group=self.all_ranks)
        norm = sums[0].sqrt()
        bad = (~torch.isfinite(norm)).float() + sums[1]
        self.skipped = torch.clamp(self.skipped + bad, max=1.0)
        divisor = torch.clamp(norm / self.clip, min=1.0) if self.clip > 0 else torch.ones_like(norm)
        self.update.prepare(lr, torch.where(torch.isfinite(divisor), divisor, 1.0), self.skipped)
        self.shards.step_with_ready_grads()
        return torch.cat((norm[None], self.skipped[None], sums[1:]))

    def sum_vision_copies(self) -> None:
        """Add up the gradients of a ViT that every TP rank holds whole and fed with its share of the images.

        All those ranks have the same shards, so only the shards travel.
        """
        grads = [main.grad for main in self.vision_copies if main.grad is not None]
        if grads:
            flat = _flatten_dense_tensors(grads)
            dist.all_reduce(flat, group=self.tp_group)
            for grad, total in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
                grad.copy_(total)

    def _shards_of(self, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
        """This rank's shards of the parameters, as far as it has any, in the parameters' order."""
        places = self.shards.model_param_group_index_map
        groups = self.adam.param_groups
        return [groups[places[p][0]]["params"][places[p][1]] for p in parameters if p in places]

    # --- state: what a checkpoint holds (see `training.checkpoint_state`) ---

    def owned(self) -> Iterator[tuple[nn.Parameter, int, tuple[Tensor, Tensor, Tensor]]]:
        """This rank's shards: parameter, first element of the range, and fp32 [n] weights and both moments."""
        for parameter in self.shards.model_param_group_index_map:
            start = self.shards._get_model_param_range_map(parameter)["param"].start
            tensors = self.shards._get_main_param_and_optimizer_states(parameter)
            yield parameter, start, (tensors["param"], tensors["exp_avg"], tensors["exp_avg_sq"])

    def restored(self, steps: int) -> None:
        """Take over new values of `owned`, which have seen `steps` updates. Collective: gathers parameters."""
        self.update.count_from(steps)
        self.skipped.zero_()
        self.shards._copy_main_params_to_model_params()
        self.ddp.start_param_sync(force_sync=True)
