"""What exact negatives cost with micro-batches: as one batch, with GradCache, and in the cheaper mode.

    python benchmarks/two_passes.py --out benchmarks/results/two-passes-cpu.json
    python benchmarks/two_passes.py --recipe paper-l14 --precision bf16 --global-batch-size 24    # on a GPU
    python benchmarks/two_passes.py --global-batch-size 2 --rounds 1                              # checks the code

Three steps of the same model and sequences take turns in one process: all sequences in one micro-batch; in several
micro-batches, with negatives from the whole batch (a feature pass collects the embeddings, a second pass
back-propagates); in several micro-batches, each with its own negatives.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Literal

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.recipes import RECIPES

SIDES: dict[str, tuple[int, Literal["global_batch", "micro_batch"]]] = {
    "one micro-batch": (1, "global_batch"),
    "exact negatives": (0, "global_batch"),
    "own negatives": (0, "micro_batch"),
}
"""Micro-batches (0: as many as asked for), and where negatives come from."""


def main() -> int:
    """Parse the command line, take turns, print a table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="demo")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--global-batch-size", "--rows", type=int, default=8, help="sequences of one step")
    parser.add_argument("--micro-batches", "--parts", type=int, default=2, help="of one step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    batch = args.global_batch_size
    if batch % args.micro_batches:
        parser.error(f"--global-batch-size {batch}: not a multiple of --micro-batches {args.micro_batches}")

    from step import StepSettings, TimedStep

    from lcl_mcore.diagnostics.environment import describe
    from lcl_mcore.distributed.device import init_process_group, pick_device
    from lcl_mcore.distributed.groups import make_groups

    device = pick_device()
    init_process_group(device, 120)
    groups = make_groups(1, 1, 120, 0)
    timed = {}
    for side, (one, negatives) in SIDES.items():
        micro_batches = one or args.micro_batches
        settings = StepSettings(args.recipe, args.precision, micro_batches=micro_batches)
        config = settings.config(batch // micro_batches)
        loss = dataclasses.replace(config.loss, negatives=negatives)
        timed[side] = TimedStep(dataclasses.replace(config, loss=loss), device, groups)
        timed[side].times(1)
    seconds: dict[str, list[float]] = {side: [] for side in timed}
    for _ in range(args.rounds):
        for side, step in timed.items():
            seconds[side] += step.times(1)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    ratios = {side: value / medians["one micro-batch"] for side, value in medians.items()}
    for side, value in medians.items():
        print(f"{side:<22}{value:8.3f} s a step   {ratios[side]:.2f}")
    asked = ("recipe", "precision", "global_batch_size", "micro_batches")
    result = {
        "command": " ".join(sys.argv),
        "settings": {name: getattr(args, name) for name in asked},
        "median_seconds": medians,
        "ratio_to_one_micro_batch": ratios,
        "seconds": seconds,
        "environment": describe(),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
