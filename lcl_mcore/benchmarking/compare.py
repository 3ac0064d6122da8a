"""One side of `benchmarks/train_step.py`, as a process of its job."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch.distributed as dist

from lcl_mcore.batch import StepBatch
from lcl_mcore.benchmarking.plain import PlainStep
from lcl_mcore.benchmarking.step import dry_shape
from lcl_mcore.build import build_training
from lcl_mcore.config.model import LanguageConfig, ModelConfig, VisionConfig
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.run import LossConfig, OptimConfig, RunConfig
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.distributed.context import detached
from lcl_mcore.distributed.device import Device, init_process_group, pick_device
from lcl_mcore.distributed.groups import Groups, make_groups

Precision = Literal["fp32", "bf16"]


def pair_config(rows: int, world: int, precision: Precision, small: bool) -> RunConfig:
    """ViT-B/16 + OPT-125M on rows of one image and its caption, as the released code feeds pairs."""
    config = load_recipe("released-b16-laion")
    shape = ModelConfig(vision=VisionConfig(layer_scale=None), language=LanguageConfig(max_positions=512))
    config = replace(
        config,
        model=shape,
        loss=LossConfig(),
        optim=OptimConfig(),
        train=replace(
            config.train, micro_batch_size=rows, global_batch_size=rows * world, precision=precision
        ),
    )
    return dry_shape(config) if small else config


def for_all_ranks(batch: StepBatch, rows: int, world: int) -> StepBatch:
    """The batch of one rank as the share of each of `world` ranks: all bring equal counts."""
    counts = {field.name: getattr(batch.counts, field.name) for field in dataclasses.fields(batch.counts)}
    counts = {
        name: tuple(tuple(row * world) for row in value) if name == "micro_contexts" else value * world
        for name, value in counts.items()
    }
    return replace(batch, counts=type(batch.counts)(**counts))


def measure_side(side: str, rows: int, steps: int, precision: Precision, small: bool) -> None:
    """Time `steps` steps after one that is not timed; rank 0 prints one JSON line."""
    device = pick_device()
    init_process_group(device, 600)
    world = dist.get_world_size()
    groups = make_groups(1, 1, 600, 0)
    config = pair_config(rows, world, precision, small)
    own = replace(config, train=replace(config.train, global_batch_size=rows))
    batch = for_all_ranks(synthetic_step(own, seed=groups.dp.rank()), rows, world)
    step = (_ours if side == "ours" else _plain)(config, device, groups, batch)
    step()
    device.synchronize()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        device.synchronize()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    if dist.get_rank() == 0:
        print(
            json.dumps(
                {
                    "step_seconds": median,
                    "samples_per_second": rows * world / median,
                    "peak_bytes": float(device.peak_memory()),
                }
            )
        )
    dist.destroy_process_group()


def _ours(config: RunConfig, device: Device, groups: Groups, batch: StepBatch) -> Callable[[], object]:
    training = build_training(config, detached(device, groups))
    return lambda: training.step.run(0, batch, 1e-6)


def _plain(config: RunConfig, device: Device, groups: Groups, batch: StepBatch) -> Callable[[], object]:
    step = PlainStep(config, device.device, groups.dp)
    (micro,) = batch.micro_batches
    return lambda: step.run(micro.to(device.device))
