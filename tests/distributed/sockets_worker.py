"""Counts rank 0's open sockets before its groups are made, afterwards, and after each has been used."""

from __future__ import annotations

import json

import psutil
import torch
import torch.distributed as dist

from lcl_mcore.distributed.device import init_process_group, pick_device
from lcl_mcore.distributed.groups import gather_objects, make_groups


def sockets() -> int:
    """Of this process, listening ones included."""
    return len(psutil.Process().net_connections(kind="tcp"))


def main() -> None:
    init_process_group(pick_device("cpu"), 60)
    counts = [sockets()]
    groups = make_groups(1, 1, 60, 1)
    counts.append(sockets())
    for group in (groups.host_counts, groups.host_control, groups.host_checkpoint):
        dist.all_reduce(torch.ones(1), group=group)
        gather_objects(dist.get_rank(), group)
    counts.append(sockets())
    dist.barrier(group=groups.host_control)
    if dist.get_rank() == 0:
        print(json.dumps(counts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
