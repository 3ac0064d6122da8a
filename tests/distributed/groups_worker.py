"""Makes the groups of single ranks of large jobs on torch's fake backend, and prints what was created as JSON.

A process of its own, because another test of the same pytest run may hold a process group.
"""

from __future__ import annotations

import json
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _process_group_color
from torch.testing._internal.distributed.fake_pg import FakeStore

from lcl_mcore.distributed import cpu
from lcl_mcore.distributed.groups import Groups, make_groups

LAYOUTS = [
    (1, 1, 512),
    (2, 1, 512),
    (1, 2, 512),
    (2, 2, 512),
    (8, 4, 512),
    (1, 8, 512),
    (4, 4, 16),
    (2, 4, 16),
    (1, 1, 1),
]
"""Tensor-parallel size, pipeline stages, ranks."""
ROLES = ("tp", "pp", "dp", "pipeline_ends", "loss", "host_counts", "host_model", "host_control", "host_checkpoint")


def groups_of(tp: int, pp: int, world: int, rank: int) -> dict[str, Any]:
    """What one rank creates, in order, and the members of its groups by role."""
    created: list[dict[str, Any]] = []
    real = dist.new_group

    def counted(ranks: list[int], timeout: Any = None, backend: str | None = None, **options: Any) -> Any:
        created.append({"name": options["group_desc"], "ranks": ranks, "color": _process_group_color(ranks)})
        return real(ranks, timeout, "fake", **options)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    dist.new_group = counted
    try:
        groups = make_groups(tp, pp, 60, 0, host_backend="gloo")
        return {"created": created, "members": members(groups)}
    finally:
        dist.new_group = real
        dist.destroy_process_group()


def members(groups: Groups) -> dict[str, list[int]]:
    """Global ranks of every group, ours by their names and megatron's by `megatron.NAME`."""
    found = {role: getattr(groups, role) for role in ROLES}
    found |= {f"megatron.{name}": group for name, group in vars(groups.megatron).items()}
    found["vision.tp"] = groups.vision.tp
    return {role: dist.get_process_group_ranks(group) for role, group in found.items() if group is not None}


def main() -> None:
    cpu.install()
    result = {}
    for tp, pp, world in LAYOUTS:
        stage = world // pp
        ranks = range(world) if world <= 16 else sorted({0, 1, stage - 1, world // 2 + 3, world - 1})
        result[f"{tp} {pp} {world}"] = {rank: groups_of(tp, pp, world, rank) for rank in ranks}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
