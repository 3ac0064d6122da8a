"""What exact negatives cost with micro-batches: the same rows as one batch, in two passes, and with the cheaper mode.

    python benchmarks/two_passes.py --out benchmarks/results/two-passes-cpu.json
    python benchmarks/two_passes.py --recipe paper-l14 --precision bf16 --rows 24     # on a GPU
    python benchmarks/two_passes.py --rows 2 --rounds 1                               # checks the code

Three steps of the same model and rows take turns in one process: all rows in one pass; in parts, with negatives from
the whole batch (a first pass collects the features, a second one back-propagates); in parts, with negatives per part.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.recipes import RECIPES

SIDES = {
    "one batch": (1, "global_batch"),
    "parts, exact": (0, "global_batch"),
    "parts, own negatives": (0, "micro_batch"),
}


def main() -> int:
    """Parse the command line, take turns, print a table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="demo")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rows", type=int, default=8, help="rows of one step")
    parser.add_argument("--parts", type=int, default=2, help="micro-batches the rows are cut into")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.rows % args.parts:
        parser.error(f"--rows {args.rows}: not a multiple of --parts {args.parts}")

    from lcl_mcore.benchmarking.step import Bench, Request, run_config
    from lcl_mcore.diagnostics.environment import describe
    from lcl_mcore.distributed.device import init_process_group, pick_device
    from lcl_mcore.distributed.groups import make_groups

    device = pick_device()
    init_process_group(device, 120)
    groups = make_groups(1, 1, 120, 0)
    benches = {}
    for side, (one, negatives) in SIDES.items():
        parts = one or args.parts
        request = Request(args.recipe, args.precision, micro_batches=parts)
        config = run_config(request, args.rows // parts)
        loss = dataclasses.replace(config.loss, negatives=negatives)
        benches[side] = Bench(dataclasses.replace(config, loss=loss), device, groups)
        benches[side].times(1)
    seconds: dict[str, list[float]] = {side: [] for side in benches}
    for _ in range(args.rounds):
        for side, bench in benches.items():
            seconds[side] += bench.times(1)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    ratios = {side: value / medians["one batch"] for side, value in medians.items()}
    for side, value in medians.items():
        print(f"{side:<22}{value:8.3f} s a step   {ratios[side]:.2f}")
    settings = {"recipe": args.recipe, "precision": args.precision, "rows": args.rows, "parts": args.parts}
    result = {
        "command": " ".join(sys.argv),
        "settings": settings,
        "median_seconds": medians,
        "ratio_to_one_batch": ratios,
        "seconds": seconds,
        "environment": describe(),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
