"""The planner's memory against a real step of the same configuration on this machine; a part of `make gpu-report`.

    python benchmarks/plan_memory.py --recipe paper-l14 --micro-batch-size 4
    python benchmarks/plan_memory.py --recipe paper-l14 --micro-batch-size 1 --dry    # narrow towers, on a CPU

Each side has a process of its own: simulating replaces CUDA's functions. On a GPU the allocator's figure is compared,
on a CPU the live tensors of the real step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any, Literal

import torch
from step import StepSettings, TimedStep

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.distributed.context import detached
from lcl_mcore.distributed.device import init_process_group, pick_device
from lcl_mcore.distributed.groups import make_groups
from lcl_mcore.planning.simulate import RankCount, Simulator, count_step

TOLERANCE = 0.15
"""A larger difference is a failure of the planner."""


def config_for(recipe: str, micro_batch_size: int, dry: bool) -> RunConfig:
    """Two micro-batches of the recipe on one process, so that the feature pass of exact negatives runs, too.

    Dry, a CPU stands for a GPU: in fp32, and with so small a vocabulary that its kernels cut the logits as a GPU's do.
    """
    precision: Literal["fp32", "bf16"] = "fp32" if dry else "bf16"
    settings = StepSettings(recipe, precision, micro_batches=2, backend="torch", dry=dry)
    config = settings.config(micro_batch_size)
    if not dry:
        return config
    towers: dict[str, Any] = {"width": 256, "mlp_width": 1024}
    vision = replace(config.model.vision, **towers)
    language = replace(config.model.language, **towers, vocab_size=4096)
    return replace(config, model=replace(config.model, vision=vision, language=language))


def simulated(config: RunConfig, kind: Literal["cuda", "cpu"]) -> dict[str, Any]:
    """What the planner says."""
    count = Simulator(kind).count(config, 1, 0, synthetic_step(config))
    return figures(count)


def measured(config: RunConfig) -> dict[str, Any]:
    """What the machine says; on a GPU the second step's, when the model state is complete."""
    device = pick_device()
    init_process_group(device, 120)
    groups = make_groups(1, 1, 120, 0)
    if not device.is_cuda:
        return {"device": device.name} | figures(count_step(config, detached(device, groups), synthetic_step(config)))
    timed = TimedStep(config, device, groups)
    timed.times(1)
    torch.cuda.reset_peak_memory_stats()
    timed.times(1)
    peak = torch.cuda.max_memory_allocated() - timed.memory_before
    return {"device": device.name, "peak_bytes": peak, "model_state_bytes": timed.state_bytes}


def figures(count: RankCount) -> dict[str, Any]:
    """The memory of a counted step."""
    return {"peak_bytes": count.peak, "model_state_bytes": count.model_state, "peak_by_part": count.peak_parts}


def main() -> int:
    """Print one line of JSON; 1 if the two differ too much."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--micro-batch-size", "--rows", type=int, default=2, help="sequences")
    parser.add_argument("--dry", action="store_true", help="narrow towers, for a machine without a GPU")
    parser.add_argument("--simulate", action="store_true", help="only the planner's side")
    args = parser.parse_args()
    config = config_for(args.recipe, args.micro_batch_size, args.dry)
    if args.simulate:
        print(json.dumps(simulated(config, "cpu" if args.dry else "cuda")))
        return 0
    command = [sys.executable, __file__, *sys.argv[1:], "--simulate"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=True)
    predicted = json.loads(done.stdout.strip().splitlines()[-1])
    real = measured(config)
    ratio = predicted["peak_bytes"] / real["peak_bytes"]
    result: dict[str, Any] = {
        "micro_batch_size": args.micro_batch_size,
        "micro_batches": 2,
        "predicted": predicted,
        "measured": real,
        "predicted_over_measured": ratio,
        "status": "ok",
    }
    if abs(ratio - 1) > TOLERANCE:
        result |= {"status": "failed", "reason": f"predicted peak is {ratio:.3f} of the measured one"}
    print(json.dumps(result))
    return 0 if result["status"] == "ok" else 1


if __name__ == "__main__":
    run_main(main)
