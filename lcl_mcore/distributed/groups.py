"""Process groups, made once and passed to whoever communicates. Nothing here uses WORLD.

Rank order is megatron's: tensor-parallel ranks are neighbours, then data-parallel, then pipeline stages.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

T = TypeVar("T")


@dataclass(frozen=True)
class Groups:
    """The groups of this rank.

    megatron      everything megatron-core's modules ask for (tp, pp, dp, ...)
    tp, pp, dp    tensor-, pipeline- and data-parallel groups on the compute backend
    vision        megatron's groups for a ViT that every tensor-parallel rank holds whole: tp is this rank alone
    pipeline_ends the first and the last stage of this rank's pipeline, for the vectors of the contrastive loss;
                  None on the stages between, and without a pipeline
    loss          the data-parallel ranks again, for the contrastive loss alone: its collectives never
                  queue behind the gradient reduction
    host_counts   the data-parallel ranks over gloo: counts of the next batch, from the loader's thread
    host_model    the model-parallel ranks (tp x pp) of this data-parallel index over gloo
    host_control  all ranks over gloo: agreements between steps
    host_checkpoint  all ranks over gloo: for the thread that writes checkpoints, alone
    """

    megatron: ProcessGroupCollection
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    vision: ProcessGroupCollection
    pipeline_ends: dist.ProcessGroup | None
    loss: dist.ProcessGroup
    host_counts: dist.ProcessGroup
    host_model: dist.ProcessGroup
    host_control: dist.ProcessGroup
    host_checkpoint: dist.ProcessGroup


def _make(members: list[list[int]], backend: str | None, timeout: timedelta, name: str) -> dist.ProcessGroup | None:
    """One group per list; every rank takes part in making all of them, in the same order. This rank's, if any."""
    mine = None
    for ranks in members:
        group = dist.new_group(ranks, backend=backend, timeout=timeout, group_desc=name)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def _own(members: list[list[int]], backend: str | None, timeout: timedelta, name: str) -> dist.ProcessGroup:
    """`_make` for lists in which every rank appears."""
    mine = _make(members, backend, timeout, name)
    assert mine is not None
    return mine


def make_groups(tp: int, pp: int, timeout_seconds: float, seed: int, *, host_backend: str = "gloo") -> Groups:
    """Split the job into groups. Collective over all ranks; the process group must be initialised.

    `RunConfig.check_processes` has accepted the number of ranks.

    Args:
        host_backend: of the groups whose tensors stay on the host.
    """
    world, timeout = dist.get_world_size(), timedelta(seconds=timeout_seconds)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_seconds / 60,  # type: ignore[arg-type]  # a float works
    )
    # megatron's random state is required by its code; none of our masks draws from it.
    model_parallel_cuda_manual_seed(seed)
    dp = world // (tp * pp)
    data = [[p * dp * tp + d * tp + t for d in range(dp)] for p in range(pp) for t in range(tp)]
    model = [[p * dp * tp + d * tp + t for p in range(pp) for t in range(tp)] for d in range(dp)]
    ends = [[t, t + (pp - 1) * dp * tp] for t in range(dp * tp)] if pp > 1 else []
    collection = ProcessGroupCollection.use_mpu_process_groups()
    vision = copy.copy(collection)
    if tp > 1:
        own = [dist.get_rank()]
        vision.tp = dist.new_group(own, timeout=timeout, group_desc="vision-tp", use_local_synchronization=True)
    return Groups(
        megatron=collection,
        tp=collection.tp,
        pp=collection.pp,
        dp=collection.dp,
        vision=vision,
        pipeline_ends=_make(ends, None, timeout, "pipeline-ends"),
        loss=_own(data, None, timeout, "contrastive-loss"),
        host_counts=_own(data, host_backend, timeout, "host-counts"),
        host_model=_own(model, host_backend, timeout, "host-model"),
        host_control=_own([list(range(world))], host_backend, timeout, "host-control"),
        host_checkpoint=_own([list(range(world))], host_backend, timeout, "host-checkpoint"),
    )


def gather_objects(value: T, group: dist.ProcessGroup) -> list[T]:
    """All ranks' values, in rank order; over gloo. Collective."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
