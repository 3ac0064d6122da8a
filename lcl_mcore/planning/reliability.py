"""Checkpoints and failures: seconds lost, and the share of time that trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcl_mcore.config.schema import RunConfig
from lcl_mcore.models.flops import parameter_counts

# 419 unexpected interruptions of 16,384 H100 in 54 days (Llama 3, arXiv:2407.21783, section 3.3.4 and Table 5).
GPU_HOURS_PER_FAILURE = 16_384 * 54 * 24 / 419


@dataclass(frozen=True)
class ReliabilityEstimate:
    """checkpoint_bytes of the whole job;  stall  seconds of one save;  interval  seconds between saves.

    best_interval    the one that loses least (Young 1974: sqrt(2 * stall * MTBF))
    ettr             effective training time ratio at `interval`, `best_ettr` at the other
    """

    checkpoint_bytes: int
    stall: float
    interval: float
    best_interval: float
    mtbf: float
    restart: float
    ettr: float
    best_ettr: float


def checkpoint_bytes(config: RunConfig) -> int:
    """Weights in the run's precision, and master weights with two moments in fp32; each parameter once."""
    weight = 4 if config.train.precision == "fp32" else 2
    return sum(parameter_counts(config.model).values()) * (weight + 12)


def uptime(
    config: RunConfig,
    world: int,
    step_seconds: float,
    *,
    storage: float,
    restart: float,
    mtbf: float | None = None,
) -> ReliabilityEstimate:
    """Share of the time that trains.

    Args:
        storage: bytes/s of the whole job;  restart, mtbf  seconds; None: Llama 3's failures per GPU hour.
    """
    size = checkpoint_bytes(config)
    stall = size / storage
    between = mtbf if mtbf is not None else GPU_HOURS_PER_FAILURE / world * 3600
    every = config.checkpoint.every or config.train.steps
    interval, best = every * step_seconds, math.sqrt(2 * stall * between)

    def ettr(seconds: float) -> float:
        return max(0.0, 1 - stall / seconds - (seconds / 2 + restart) / between)

    return ReliabilityEstimate(size, stall, interval, best, between, restart, ettr(interval), ettr(best))
