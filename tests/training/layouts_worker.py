"""Trains several runs in one launch, each in its own layout.

Arguments: a JSON file with a list of [folder, [flags of tools/pretrain_lcl.py]]; a folder that already holds
checkpoints is resumed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from lcl_mcore.config.cli import parse_flags, resolve
from lcl_mcore.parallel.groups import make_groups
from lcl_mcore.platform.device import init_process_group, pick_device
from lcl_mcore.training.build import Job
from lcl_mcore.training.trainer import Trainer


def main() -> None:
    device = pick_device("cpu")
    store = init_process_group(device, 60)
    rank, world = dist.get_rank(), dist.get_world_size()
    for folder, flags in json.loads(Path(sys.argv[1]).read_text()):
        config = resolve(parse_flags(flags))
        config.check_processes(world)
        groups = make_groups(config.parallel.tensor, config.parallel.pipeline, 60, config.train.seed)
        out = Path(folder)
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
        dist.barrier(group=groups.host_control)
        note = print if rank == 0 else lambda text: None
        job = Job(device, groups, rank, world, out, note, dist.PrefixStore(out.name, store))
        assert Trainer(config, job, resume=True).run() == 0
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
