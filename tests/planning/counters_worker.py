"""Counts one training step of a small fixed model in three layouts and prints the counts as JSON.

    python tests/planning/counters_worker.py            # print
    python tests/planning/counters_worker.py --write    # on purpose: what tests/planning/counters.json says from now on

The step is the real one, simulated on one process: bf16 with CUDA's kernels, so a dispatched operator stands for a
kernel launch. A process of its own, because another test of the same pytest run may hold a process group.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from lcl_mcore.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.planning.simulate import RankCount, Simulator

FILE = Path(__file__).with_name("counters.json")
MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=64, patch_size=16, width=128, layers=2, heads=2, mlp_width=256, layer_scale=0.1, drop_path=0.2
    ),
    language=LanguageConfig(
        vocab_size=1000, width=128, layers=3, heads=2, mlp_width=256, max_positions=256, dropout=0.1
    ),
    pool_heads=2,
)
# Name -> processes, how they share the work, and the ranks counted: the first of each pipeline stage.
LAYOUTS: dict[str, tuple[int, ParallelConfig, tuple[int, ...]]] = {
    "dp 2": (2, ParallelConfig(), (0,)),
    "dp 2, recompute": (2, ParallelConfig(recompute_vision="full", recompute_language="selective"), (0,)),
    "tp 2, pp 2, dp 2": (
        8,
        ParallelConfig(
            tensor_parallel_size=2, pipeline_parallel_size=2, sequence_parallel=True, vision_parallel="tensor"
        ),
        (0, 4),
    ),
}


def count(simulator: Simulator, world: int, parallel: ParallelConfig, rank: int) -> RankCount:
    """One rank's step: two micro-batches of two sequences, negatives of the global batch."""
    train = TrainConfig(micro_batch_size=2, global_batch_size=8, precision="bf16", seed=3)
    config = RunConfig(
        recipe="counters", model=MODEL, data=DataConfig(sequence_length=256), parallel=parallel, train=train
    )
    return simulator.count(config, world, rank, synthetic_step(config, config.check_processes(world)))


def plain(counted: RankCount) -> dict[str, Any]:
    """FLOPs, operators by phase; collectives and bytes by group and operator."""
    flops: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for call, times in counted.operators.items():
        operators[call.phase] += times
        if call.flops:
            flops[f"{call.phase}: {call.kind}"] += call.flops * times
    collectives: Counter[str] = Counter()
    volume: Counter[str] = Counter()
    for issued in counted.collectives:
        name = f"{issued.group}: {issued.op}"
        collectives[name] += 1
        volume[name] += issued.bytes
    return {"FLOPs": flops, "collectives": collectives, "bytes communicated": volume, "operators": operators}


def versions() -> str:
    """The packages that decide how many operators a layer takes."""
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "megatron-core")}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def main() -> None:
    simulator = Simulator()
    counts: dict[str, Any] = {}
    operators: dict[str, Any] = {}
    for name, (world, parallel, ranks) in LAYOUTS.items():
        for rank in ranks:
            found = plain(count(simulator, world, parallel, rank))
            place = f"{name}; rank {rank}"
            operators[place] = found.pop("operators")
            counts[place] = found
    result: dict[str, Any] = {"counts": counts, "operators": {versions(): operators}}
    if "--write" in sys.argv:
        known = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {"operators": {}}
        result["operators"] = known["operators"] | result["operators"]
        FILE.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
