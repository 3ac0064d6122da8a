"""Process groups, made once and passed to whoever communicates.

Rank order is megatron's: tensor-parallel ranks are neighbours, then data-parallel, then pipeline stages.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

T = TypeVar("T")


@dataclass(frozen=True)
class Groups:
    """The groups of this rank. All ranks together are the job's own group, a rank alone is one group for all uses.

    megatron      everything megatron-core's modules ask for (tp, pp, dp, ...)
    tp, pp, dp    tensor-, pipeline- and data-parallel groups on the compute backend
    vision        megatron's groups for a ViT that every tensor-parallel rank holds whole: tp is this rank alone
    pipeline_ends the first and the last stage of this rank's pipeline, for the vectors of the contrastive loss and the
                  gradient of a tied embedding; None on the stages between, and without a pipeline
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


def make_groups(tp: int, pp: int, timeout_seconds: float, seed: int, *, host_backend: str = "gloo") -> Groups:
    """Split the job into groups. Collective over all ranks; the process group must be initialised.

    `RunConfig.check_processes` has accepted the number of ranks. Of 512 ranks each creates eleven groups at most:
    those that it is in, and each once.

    Args:
        host_backend: of the groups whose tensors stay on the host.
    """
    rank, world, timeout = dist.get_rank(), dist.get_world_size(), timedelta(seconds=timeout_seconds)
    job = dist.group.WORLD
    assert job is not None
    stage_ranks = world // pp
    stage, within = divmod(rank, stage_ranks)
    tensor = [rank - rank % tp + t for t in range(tp)]
    data = list(range(stage * stage_ranks + rank % tp, (stage + 1) * stage_ranks, tp))
    pipeline = list(range(within, world, stage_ranks))
    model = [first - rank % tp + t for first in pipeline for t in range(tp)]
    ends = [pipeline[0], pipeline[-1]] if stage in (0, pp - 1) else [rank]

    def make(ranks: list[int], name: str, backend: str | None = None) -> dist.ProcessGroup:
        """Called by all ranks at the same time, each with the members of its own group.

        So it is one creation however many groups there are, and one split where NCCL's communicators are split from
        the job's, which torch does when a device is bound.
        """
        return dist.new_group(ranks, timeout, backend, use_local_synchronization=True, group_desc=name)

    alone = job if world == 1 else make([rank], "alone")
    shared = {1: alone, world: job}
    on_host = dist.get_backend(job) == host_backend
    host_alone = alone if on_host else make([rank], "host-alone", host_backend)

    def host(ranks: list[int], name: str) -> dist.ProcessGroup:
        return host_alone if len(ranks) == 1 else make(ranks, name, host_backend)

    tp_group, pp_group, dp_group = (
        shared.get(len(ranks)) or make(ranks, name)
        for ranks, name in ((tensor, "tensor"), (pipeline, "pipeline"), (data, "data"))
    )
    pipeline_ends = make(ends, "pipeline-ends") if pp > 1 else None
    host_model = host(model, "host-model")
    # What megatron keeps for itself: which layers are here, room to gather sequences in, and a random state, from which
    # none of our masks draws.
    parallel_state.set_pipeline_model_parallel_rank(pp_group.rank())
    parallel_state.destroy_global_memory_buffer()
    parallel_state._set_global_memory_buffer()
    model_parallel_cuda_manual_seed(seed, tp_rank=tp_group.rank(), ep_rank=0, etp_rank=tp_group.rank())
    collection = _collection(tp_group, pp_group, dp_group, host_model, alone, job, pipeline_ends)
    vision = copy.copy(collection)
    vision.tp = alone
    return Groups(
        megatron=collection,
        tp=tp_group,
        pp=pp_group,
        dp=dp_group,
        vision=vision,
        pipeline_ends=pipeline_ends if len(ends) > 1 else None,
        loss=alone if len(data) == 1 else make(data, "contrastive-loss"),
        host_counts=host(data, "host-counts"),
        host_model=host_model,
        host_control=host(list(range(world)), "host-control"),
        host_checkpoint=host(list(range(world)), "host-checkpoint"),
    )


def _collection(
    tp: dist.ProcessGroup,
    pp: dist.ProcessGroup,
    dp: dist.ProcessGroup,
    mp: dist.ProcessGroup,
    alone: dist.ProcessGroup,
    job: dist.ProcessGroup,
    pipeline_ends: dist.ProcessGroup | None,
) -> ProcessGroupCollection:
    """Our groups by megatron's names. Context and expert parallelism have one rank each; None: not used.

    megatron asks for its `mp` (tensor- and pipeline-parallel ranks) only to know this rank's number in it.
    """
    known = {
        name: group
        for names, group in (
            (("tp", "tp_cp", "tp_ep", "expt_tp"), tp),
            (("pp",), pp),
            (("dp", "dp_cp", "dp_cp_gtp_remat", "intra_dp_cp", "expt_dp", "expt_dp_gtp_remat", "intra_expt_dp"), dp),
            (("mp", "tp_ep_pp", "tp_ep_pp_with_egtp_remat"), mp),
            (("cp", "ep"), alone),
            (("intra_dist_opt",), job),
            (("embd",), pipeline_ends),
        )
        for name in names
    }
    return ProcessGroupCollection(**{field.name: known.get(field.name) for field in fields(ProcessGroupCollection)})


def gather_objects(value: T, group: dist.ProcessGroup) -> list[T]:
    """All ranks' values, in rank order; over gloo. Collective."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
