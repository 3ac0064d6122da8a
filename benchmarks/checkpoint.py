"""What a checkpoint costs the training loop: asynchronous against synchronous saves of the same state, and resuming.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py --out benchmarks/results/checkpoint-cpu.json

Trains a model of at least 50 million parameters on synthetic sequences, data-parallel over all processes. Each round
has steps without a save, one save that the loop waits for, and one that it does not; all save the same tensors in the
same way. `stall` is the time the loop stands still for a save. Where the writing threads share the cores with the
steps, these also slow down while a save is under way: `slowdown` is that time, over all steps beside one save.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.schema import RunConfig


def config_for(world: int) -> RunConfig:
    """The demo recipe with wider and deeper towers."""
    config = load_recipe("demo")
    vision = replace(config.model.vision, width=640, layers=8, heads=10, mlp_width=2560)
    language = replace(config.model.language, width=640, layers=8, heads=10, mlp_width=2560)
    model = replace(config.model, vision=vision, language=language, pool_heads=10)
    train = replace(config.train, micro_batch_size=1, global_batch_size=world)
    return replace(config, model=model, train=train)


def seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def measure(rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Collective; the result is that of this rank."""
    import torch.distributed as dist
    from step import TimedStep

    from lcl_mcore.checkpoint.manager import Checkpointer, TrainingTensors
    from lcl_mcore.checkpoint.store import TrainState, open_store, verify
    from lcl_mcore.distributed.device import init_process_group, pick_device
    from lcl_mcore.distributed.groups import make_groups

    device = pick_device()
    init_process_group(device, 300)
    world = dist.get_world_size()
    groups = make_groups(1, 1, 300, 0)
    timed = TimedStep(config_for(world), device, groups)  # every rank trains on the same sequences
    tensors = TrainingTensors(timed.training.model, timed.training.optimizer, groups.tp)
    store = open_store(str(folder), folder)
    saver = Checkpointer(store, tensors, groups.host_control, groups.host_checkpoint, keep=1)
    timed.times(1)
    number, results = 0, []
    allocation = seconds(saver.allocate)
    for _ in range(rounds):
        quiet = timed.times(steps)
        number += 1

        def complete(number: int = number) -> None:
            saver.start(TrainState(number, None, "", ""))
            outcome = saver.wait()
            assert outcome is not None
            assert not outcome.problem, outcome.problem

        dist.barrier(group=groups.host_control)
        synchronous = seconds(complete)
        number += 1
        dist.barrier(group=groups.host_control)
        stall = seconds(partial(saver.start, TrainState(number, None, "", "")))
        begun = time.perf_counter()
        beside: list[float] = []
        while saver.poll() is None or len(beside) < steps:
            beside += timed.times(1)
            # The ranks run the same number of steps: the first one says when to stop.
            if groups.host_control.size() > 1 and _first_says(saver.poll() is not None, groups.host_control):
                break
        written = time.perf_counter() - begun
        stall += seconds(saver.wait)
        results.append(
            {
                "quiet_step": statistics.median(quiet),
                "synchronous": synchronous,
                "stall": stall,
                "ratio": stall / synchronous,
                "written_after": written,
                "steps_beside": len(beside),
                "slowdown": sum(beside) - len(beside) * statistics.median(quiet),
            }
        )
    assert saver.snapshot is not None
    newest = saver.names()[-1]
    return {
        "device": device.name,
        "processes": world,
        "parameters": sum(p.numel() for p in timed.training.model.parameters()),
        "bytes_of_this_rank": saver.snapshot.nbytes,
        "allocation_before_the_first_save": allocation,
        "rounds": results,
        "verify": seconds(lambda: verify(folder / newest)),
        "restore": seconds(saver.restore),
        **{
            f"median_{name}": statistics.median(r[name] for r in results)
            for name in ("synchronous", "stall", "ratio", "slowdown", "quiet_step")
        },
    }


def _first_says(done: bool, group: Any) -> bool:
    from lcl_mcore.distributed.groups import gather_objects

    return bool(gather_objects(done, group)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps without a save in each round")
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.gettempdir()) / "lcl-checkpoint-benchmark"
    result = measure(args.rounds, args.steps, folder)

    import torch.distributed as dist

    from lcl_mcore.diagnostics import environment

    if dist.get_rank() == 0:
        text = json.dumps(environment.describe() | result, indent=1)
        if args.out:
            args.out.write_text(text + "\n", encoding="utf-8")
        print(text)
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    run_main(main)
