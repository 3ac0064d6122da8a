"""Counts real steps on 8 gloo ranks, then simulates the same ranks; each rank writes what it saw as JSON.

Started by torchrun with the folder to write to.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.schema import ParallelConfig, RunConfig
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.distributed.context import detached
from lcl_mcore.distributed.device import init_process_group, pick_device
from lcl_mcore.distributed.groups import make_groups
from lcl_mcore.planning.simulate import RankCount, Simulator, count_step

LAYOUTS = {
    "vision data": ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2, vision_parallel="data"),
    "vision tensor": ParallelConfig(
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        vision_parallel="tensor",
        sequence_parallel=True,
        recompute_vision="block:3",
        recompute_language="selective",
    ),
    "data parallel, recompute": ParallelConfig(recompute_vision="full", recompute_language="full"),
}


def config_for(parallel: ParallelConfig) -> RunConfig:
    """The demo's model, two micro-batches of two sequences on each data-parallel rank."""
    config = load_recipe("demo")
    dp = 8 // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    train = dataclasses.replace(config.train, micro_batch_size=2, global_batch_size=4 * dp)
    return dataclasses.replace(config, parallel=parallel, train=train)


def plain(count: RankCount) -> dict[str, Any]:
    """What the test compares, as JSON types."""
    names = ("rank", "place", "parameters", "model_state", "peak", "peak_parts", "buckets", "collectives")
    operators: dict[str, list[int]] = {}
    for call, times in count.operators.items():
        total = operators.setdefault(f"{call.phase} {call.kind}", [0, 0])
        total[0] += call.flops * times
        total[1] += times
    return {name: getattr(count, name) for name in names} | {"operators": operators}


def main() -> None:
    device = pick_device("cpu")
    init_process_group(device, 120)
    rank, real = dist.get_rank(), {}
    for name, parallel in LAYOUTS.items():
        config = config_for(parallel)
        groups = make_groups(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, 120, 0)
        real[name] = count_step(config, detached(device, groups), synthetic_step(config, groups.dp.size()))
    dist.barrier()
    dist.destroy_process_group()
    seen, simulator = {}, Simulator("cpu")
    for name, parallel in LAYOUTS.items():
        config = config_for(parallel)
        batch = synthetic_step(config, config.check_processes(8))
        simulated = simulator.count(config, 8, rank, batch)
        seen[name] = {"real": plain(real[name]), "simulated": plain(simulated)}
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
