"""Our training step against a plain PyTorch DDP one of the same model: time, samples/s, peak memory.

    python benchmarks/train_step.py                                  # 2 processes on a CPU, ViT-B/16 + OPT-125M
    python benchmarks/train_step.py --processes 1 --precision bf16   # one GPU
    python benchmarks/train_step.py --small --steps 1                # checks the code; its numbers mean nothing

Both run in one command, in turn, each round in fresh processes: the same towers, the same rows (one image and its
caption each, 280 positions), the same precision, number of rows and processes. The plain one is
`lcl_mcore.benchmarking.plain`: open_clip's ViT, pooler and contrastive loss, Hugging Face's OPT, DDP, fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from lcl_mcore.commands.entry import run_main


def main() -> int:
    """Parse the command line; measure both sides, or one of them as a process of a round."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4, help="rows per process and step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--small", action="store_true", help="narrow towers of two layers")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        from lcl_mcore.benchmarking.compare import measure_side

        measure_side(args.side, args.rows, args.steps, args.precision, args.small)
        return 0
    return compare(args)


def compare(args: argparse.Namespace) -> int:
    """Alternate the two sides, print a table, and write the JSON."""
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for number in range(args.rounds):
        for side, results in rounds.items():
            results.append(one_round(args, side))
            latest = results[-1]
            print(
                f"round {number + 1}  {side:<6}{latest['step_seconds']:8.3f} s a step"
                f"{latest['samples_per_second']:9.2f} samples/s{latest['peak_bytes'] / 2**20:9.0f} MiB",
                flush=True,
            )
    medians = {
        side: {name: statistics.median(r[name] for r in results) for name in results[0]}
        for side, results in rounds.items()
    }
    ours, plain = medians["ours"], medians["plain"]
    speed = ours["samples_per_second"] / plain["samples_per_second"]
    memory = ours["peak_bytes"] / plain["peak_bytes"]
    print(f"ours / plain: {speed:.2f} times the samples/s, {memory:.2f} times the peak memory (medians)")
    if args.out:
        from lcl_mcore.diagnostics.environment import describe

        content = {
            "command": " ".join(sys.argv),
            "environment": describe(),
            "rounds": rounds,
            "medians": medians,
            "samples_per_second_ratio": speed,
            "peak_memory_ratio": memory,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def one_round(args: argparse.Namespace, side: str) -> dict[str, float]:
    """One side in fresh processes; its last line on rank 0 is JSON."""
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(args.processes),
        __file__,
        "--side",
        side,
        "--rows",
        str(args.rows),
        "--steps",
        str(args.steps),
        "--precision",
        args.precision,
        *(["--small"] if args.small else []),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    run_main(main)
