"""Trains a small model for a few steps on one device and saves what came out.

    python tests/gpu/step_worker.py --device cuda --precision bf16 --backend torch --out FILE

A process of its own, because the CPU's stand-ins for CUDA and CUDA itself cannot share one. The file holds the
gradients of the first step in fp32, every step's report, and, with `--watch-sync`, what made the host wait.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from lcl_mcore.batch import StepBatch
from lcl_mcore.build import build_training
from lcl_mcore.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.distributed.context import detached
from lcl_mcore.distributed.device import init_process_group, pick_device
from lcl_mcore.distributed.groups import make_groups
from lcl_mcore.train_step import TrainStep

STEPS = 4


def config_for(args: argparse.Namespace) -> RunConfig:
    """Heads of 64 channels, ragged documents, drop-path; no dropout, whose masks differ between devices."""
    shape = ModelConfig(
        vision=VisionConfig(
            image_size=64, patch_size=16, width=128, layers=2, heads=2, mlp_width=256, layer_scale=0.3, drop_path=0.2
        ),
        language=LanguageConfig(
            vocab_size=1000, width=256, layers=2, heads=4, mlp_width=512, max_positions=256, dropout=args.dropout
        ),
        pool_heads=4,
    )
    return RunConfig(
        recipe="gpu-test",
        model=shape,
        data=DataConfig(sequence_length=256),
        parallel=ParallelConfig(
            recompute_vision=args.recompute, recompute_language=args.recompute, gradient_accumulation_fusion=args.fuse
        ),
        optim=OptimConfig(optimizer_backend=args.optimizer),
        train=TrainConfig(
            micro_batch_size=4,
            global_batch_size=4 * args.micro_batches,
            precision=args.precision,
            backend=args.backend,
            seed=3,
        ),
    )


def gradients(train: TrainStep, batch: StepBatch) -> dict[str, torch.Tensor]:
    """fp32 gradients of the first step, by parameter name, on the CPU; nothing is updated."""
    train.ddp.train()
    train.optimizer.zero_grad()
    train.forward_backward(train.prepare(0, batch))
    finalize_model_grads([train.ddp], pg_collection=train.groups.megatron)
    named: Any = train.model.named_parameters()
    return {name: parameter.main_grad.float().cpu().clone() for name, parameter in named}


def waits(train: TrainStep, batch: StepBatch) -> list[str]:
    """Where a step makes the host wait: innermost lines of this project, with the line that waited."""
    found: list[str] = []

    def record(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if "called a synchronizing" not in str(message):  # torch also says that its check is a prototype
            return
        stack = [f for f in traceback.extract_stack()[:-1] if "warnings" not in f.filename]
        ours = [f for f in stack if "/lcl_mcore/" in f.filename or "/kernels/" in f.filename]
        where = ours[-1] if ours else stack[-1]
        found.append(f"{Path(where.filename).name}:{where.lineno} {where.line}  ({filename}:{lineno})")

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = record  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train.run(STEPS, batch, 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sorted(set(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--optimizer", default="torch")
    parser.add_argument("--fuse", action="store_true", help="gradient accumulation fusion")
    parser.add_argument("--watch-sync", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = pick_device(args.device)
    init_process_group(device, 60)
    groups = make_groups(1, 1, 60, 1)
    config = config_for(args)
    training = build_training(config, detached(device, groups))
    train, choices = training.step, training.choices
    batch = synthetic_step(config)
    if device.is_cuda:
        batch = replace(batch, micro_batches=tuple(micro.pin_memory() for micro in batch.micro_batches))
    result: dict[str, Any] = {
        "backends": {choice.part: choice.backend for choice in choices},
        "fp8": bool(getattr(training.model.config, "fp8", None)),
        "gradients": gradients(train, batch),
        "reports": torch.stack([train.run(step, batch, 1e-3).values.cpu() for step in range(STEPS)]),
    }
    if args.watch_sync:
        result["waits"] = waits(train, batch)
    torch.save(result, args.out)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
