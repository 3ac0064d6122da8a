"""What the training loop keeps about where the run stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from lcl_mcore.batch import StepBatch
from lcl_mcore.config.run import RunConfig
from lcl_mcore.metrics import RunLog, Speed, StepStats
from lcl_mcore.models.lcl import LclModel


@dataclass
class Progress:
    """Where the run stands; what a checkpoint taken now would say."""

    step: int = 0
    images: int = 0
    tokens: int = 0
    position: dict[str, Any] | None = None
    order_hash: str = ""


@dataclass(frozen=True)
class Pending:
    """Host-side facts of a step whose device numbers are still to come."""

    step: int
    lr: float
    batch: StepBatch
    before: Progress
    images: int
    seconds: float
    data_seconds: float


class StepFaultError(Exception):
    """A step whose batches must not count: `first` to `last` are left out, and training goes on elsewhere."""

    def __init__(self, kind: str, pending: Pending, stats: StepStats, first: int, last: int) -> None:
        super().__init__(kind)
        self.kind, self.pending, self.stats, self.first, self.last = kind, pending, stats, first, last


class Evaluation(Protocol):
    """What the loop may be given to do between steps; see `evaluation.periodic`."""

    def due(self, step: int) -> bool: ...

    def run(self, model: LclModel, step: int, stop: Callable[[], bool], log: RunLog) -> bool: ...


def step_record(
    config: RunConfig, pending: Pending, stats: StepStats, speed: Speed, mfu: float | None
) -> dict[str, Any]:
    """What the metrics say of one step; rates are those of recent steps."""
    counts, seconds, loss = pending.batch.counts, speed.step_seconds, config.loss
    images, tokens = sum(counts.images), sum(counts.tokens)
    rows = config.train.global_batch_size * config.data.sequence_length
    return {
        "step": stats.step + 1,
        "loss": loss.contrastive_weight * stats.contrastive + loss.generation_weight * stats.generation,
        "contrastive": stats.contrastive,
        "generation": stats.generation,
        "grad_norm": stats.grad_norm,
        "scale": stats.scale,
        "lr": pending.lr,
        "images": images,
        "images_seen": pending.images,
        "contexts": sum(counts.contexts),
        "targets": sum(counts.targets),
        "step_seconds": pending.seconds,
        "data_seconds": pending.data_seconds,
        "images_per_second": images / seconds,
        "tokens_per_second": tokens / seconds,
        "padding": 1.0 - tokens / rows,
        "data_wait": speed.data_seconds / seconds,
        "mfu": mfu,
        "eta_seconds": (config.train.steps - stats.step - 1) * seconds,
        "order_hash": pending.batch.order_hash,
        **{f"data_{name}": value for name, value in pending.batch.statistics.items()},
    }
