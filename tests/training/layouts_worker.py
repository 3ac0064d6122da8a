"""Trains several runs in one launch, each in its own layout.

Arguments: a JSON file with a list of [folder, [flags of tools/pretrain_lcl.py]]; a folder that already holds
checkpoints is resumed. Each rank leaves its parameters in the folder, see `leave_parameters`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lcl_mcore.commands.pretrain import parse_options
from lcl_mcore.distributed.context import Context
from lcl_mcore.distributed.device import init_process_group, pick_device
from lcl_mcore.distributed.groups import make_groups
from lcl_mcore.fault_tolerance.lease import RunLease
from lcl_mcore.trainer import Trainer


def leave_parameters(trainer: Trainer, path: Path) -> None:
    """Full name -> [values, axis along which tensor-parallel ranks share them, or -1]."""
    if trainer.ddp.ddp_config.overlap_param_gather:
        trainer.ddp.start_param_sync(force_sync=True)
    torch.save(
        {
            trainer.model.canonical_name(name): [
                p.detach().clone(),
                p.partition_dim if getattr(p, "tensor_model_parallel", False) else -1,
            ]
            for name, p in trainer.model.named_parameters()
        },
        path,
    )


def main() -> None:
    device = pick_device("cpu")
    store = init_process_group(device, 60)
    rank, world = dist.get_rank(), dist.get_world_size()
    for folder, words in json.loads(Path(sys.argv[1]).read_text()):
        options = parse_options(words)
        config = options.run
        config.check_processes(world)
        groups = make_groups(
            config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size, 60, config.train.seed
        )
        out = Path(folder)
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
        dist.barrier(group=groups.host_control)
        note = print if rank == 0 else lambda text: None
        context = Context(device, groups, rank, world, out, note, dist.PrefixStore(out.name, store))
        trainer = Trainer(config, context, RunLease(), resume=options.init_from is None, init_from=options.init_from)
        assert trainer.train() == 0
        leave_parameters(trainer, out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
