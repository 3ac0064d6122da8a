"""Our training step against a plain PyTorch DDP one of the same model: time, samples/s, peak memory.

    python benchmarks/train_step.py                                  # 2 processes on a CPU, ViT-B/16 + OPT-125M
    python benchmarks/train_step.py --processes 1 --precision bf16   # one GPU
    python benchmarks/train_step.py --model s16 --processes 1        # ViT-S/16 + an LM of 6 layers, width 512
    python benchmarks/train_step.py --small --steps 1                # checks the code; its numbers mean nothing

Both run in one command, in turn, each round in fresh processes: the same towers, the same sequences (one image and its
caption each, 280 positions), the same precision, number of sequences and processes, and, within 3 %, the same FLOPs, as
torch counts them. The plain one is `benchmarks/plain_step.py`: open_clip's ViT, pooler and contrastive loss, Hugging
Face's OPT, DDP, fused AdamW. On a CPU processor seconds are compared, which neighbours disturb less than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import TimedStep, narrow_towers
from torch.utils import flop_counter

from lcl_mcore.batch import StepBatch
from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.schema import LanguageConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, VisionConfig
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.distributed.device import Device, init_process_group, pick_device
from lcl_mcore.distributed.groups import Groups, make_groups

FLOPS_APART = 0.03
"""How far the two sides' FLOPs may lie apart, as a share."""
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "b16": {"vision": {}, "language": {}, "model": {}},  # the defaults: ViT-B/16 and OPT-125M
    "s16": {
        "vision": {"width": 384, "heads": 6, "mlp_width": 1536},
        "language": {"width": 512, "layers": 6, "heads": 8, "mlp_width": 2048},
        "model": {"pool_heads": 8},
    },
}


def pair_config(args: argparse.Namespace, world: int) -> RunConfig:
    """Towers of `SIZES` on sequences of one image and its caption, as the released code feeds pairs."""
    config = load_recipe("released-b16-laion")
    train = replace(
        config.train,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.micro_batch_size * world,
        precision=args.precision,
    )
    sizes = SIZES[args.model]
    shape = ModelConfig(
        vision=VisionConfig(layer_scale=None, **sizes["vision"]),
        language=LanguageConfig(max_positions=512, **sizes["language"]),
        **sizes["model"],
    )
    config = replace(config, model=shape, loss=LossConfig(), optim=OptimConfig(), train=train)
    return narrow_towers(config) if args.small else config


def measure_side(args: argparse.Namespace) -> None:
    """Time one side's steps after one that is not timed; rank 0 prints one JSON line."""
    device = pick_device()
    init_process_group(device, 600)
    world = dist.get_world_size()
    groups = make_groups(1, 1, 600, 0)
    config = pair_config(args, world)
    batch = synthetic_step(config, world, seed=groups.dp.rank())
    step = (ours if args.side == "ours" else plain)(config, device, groups, batch)
    flops = counted(step)
    device.synchronize()
    seconds, processor = [], []
    for _ in range(args.steps):
        started, busy = time.perf_counter(), time.process_time()
        step()
        device.synchronize()
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - busy)
    median = statistics.median(seconds)
    if dist.get_rank() == 0:
        result = {
            "flops": float(flops),
            "step_seconds": median,
            "processor_seconds": statistics.median(processor),
            "samples_per_second": config.train.global_batch_size / median,
            "peak_bytes": float(device.peak_memory()),
        }
        print(json.dumps(result))
    dist.destroy_process_group()


def counted(step: Callable[[], object]) -> int:
    """FLOPs of a step, matmuls and attention; torch's counter does not know them in place and on a CPU by itself."""
    aten = torch.ops.aten

    def as_for(target: Any) -> Callable[..., int]:
        def formula(*args: Any, **kwargs: Any) -> int:
            flops: int = flop_counter.flop_registry[target](*args, **kwargs)
            return flops

        formula._get_raw = True  # type: ignore[attr-defined]  # the registry's formulas look for the shapes themselves
        return formula

    known = {
        aten.addmm_: as_for(aten.addmm),
        aten.baddbmm_: as_for(aten.baddbmm),
        aten._scaled_dot_product_flash_attention_for_cpu: as_for(aten._scaled_dot_product_efficient_attention),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: as_for(
            aten._scaled_dot_product_efficient_attention_backward
        ),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=known) as counter:
        step()
    total: int = counter.get_total_flops()
    return total


def ours(config: RunConfig, device: Device, groups: Groups, batch: StepBatch) -> Callable[[], object]:
    """A step as training runs it."""
    return TimedStep(config, device, groups, batch).run


def plain(config: RunConfig, device: Device, groups: Groups, batch: StepBatch) -> Callable[[], object]:
    """A step as a careful researcher would write it."""
    from plain_step import PlainStep

    step = PlainStep(config, device.device, groups.dp)
    (micro,) = batch.micro_batches
    return lambda: step.run(micro.to(device.device))


def main() -> int:
    """Parse the command line; measure both sides, or one of them as a process of a round."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="per process; 0: the cores are shared out")
    parser.add_argument("--micro-batch-size", "--rows", type=int, default=4, help="sequences per process and step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=tuple(SIZES), default="b16", help="towers")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--small", action="store_true", help="narrow towers of two layers")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure_side(args)
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
                f"round {number + 1}  {side:<6}{latest['flops'] / 1e9:8.1f} GFLOP{latest['step_seconds']:8.3f} s a step"
                f"{latest['processor_seconds']:8.3f} s of processors"
                f"{latest['samples_per_second']:9.2f} samples/s{latest['peak_bytes'] / 2**20:9.0f} MiB",
                flush=True,
            )
    medians = {
        side: {name: statistics.median(r[name] for r in results) for name in results[0]}
        for side, results in rounds.items()
    }
    ratios = {name: medians["ours"][name] / medians["plain"][name] for name in medians["ours"]}
    speed, processor, memory = ratios["samples_per_second"], 1 / ratios["processor_seconds"], ratios["peak_bytes"]
    print(
        f"ours / plain: {ratios['flops']:.3f} times the FLOPs, {speed:.2f} times the samples/s by the clock, "
        f"{processor:.2f} times by processor time, {memory:.2f} times the peak memory (medians)"
    )
    if abs(ratios["flops"] - 1) > FLOPS_APART and not args.small:
        raise RuntimeError(f"the sides' FLOPs are {ratios['flops']:.3f} apart, at most {FLOPS_APART} is a comparison")
    if args.out:
        from lcl_mcore.diagnostics.environment import describe

        content = {
            "command": " ".join(sys.argv),
            "environment": describe(),
            "rounds": rounds,
            "medians": medians,
            "flops_ratio": ratios["flops"],
            "samples_per_second_ratio": speed,
            "processor_time_ratio": processor,
            "peak_memory_ratio": memory,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def one_round(args: argparse.Namespace, side: str) -> dict[str, float]:
    """One side in fresh processes; its last line on rank 0 is JSON."""
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.processes)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    options = [
        "--side",
        side,
        "--model",
        args.model,
        "--precision",
        args.precision,
        *(["--small"] if args.small else []),
    ]
    options += ["--micro-batch-size", str(args.micro_batch_size), "--steps", str(args.steps)]
    done = subprocess.run(
        [sys.executable, *launch, __file__, *options],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{side} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    run_main(main)
