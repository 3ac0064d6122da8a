"""Time, memory and MFU of a recipe's whole training step on one device, from synthetic full rows.

    python benchmarks/step.py --recipe paper-l14 --precision bf16 --steps 20
    python benchmarks/step.py --recipe released-b16-laion --precision bf16 --rows 64 --micro-batches 2

Model, losses, gradient buffers and optimizer are those of training (`lcl_mcore.train_step`); only the data
engine is left out. Without `--rows` the largest micro-batch that fits in the GPU's memory is used. On a CPU, or
with `--dry`, the model is cut down to two narrow layers: that checks the code, its numbers mean nothing.

Model FLOPs are counted by `lcl_mcore.models.flops`: matrix products that the model needs, without recompute. One
device has its own micro-batches as negatives only, so the contrastive loss costs less than in a large job:
`benchmarks/contrastive.py` measures it at its full size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.recipes import RECIPES


def main() -> int:
    """Parse the command line, measure, print one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=tuple(RECIPES), required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8"), default="bf16")
    parser.add_argument("--rows", type=int, default=0, help="rows of a micro-batch; 0: the most that fit")
    parser.add_argument("--micro-batches", type=int, default=1, help="of one step; more than 1: two passes")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--backend", choices=("auto", "torch", "te"), default="auto", help="layers")
    parser.add_argument("--dry", action="store_true", help="cut the model down (always on a CPU)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    import torch

    from lcl_mcore.benchmarking.step import Request, measure

    result = measure(
        Request(
            args.recipe,
            args.precision,
            args.rows,
            args.steps,
            args.micro_batches,
            args.recompute,
            args.backend,
            dry=args.dry or not torch.cuda.is_available(),
        )
    )
    text = json.dumps(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if result["status"] == "failed" else 0


if __name__ == "__main__":
    run_main(main)
