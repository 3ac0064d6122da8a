"""Per-step numbers: read from the device one step late on CUDA, written to terminal, JSON lines, TensorBoard."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lcl_mcore.batch import StepBatch
from lcl_mcore.checkpoint.store import TrainState
from lcl_mcore.config.schema import LossConfig, RunConfig
from lcl_mcore.distributed.context import Context
from lcl_mcore.distributed.device import Device, HostCopy
from lcl_mcore.json_lines import RETRY_SECONDS, LineWriter, Record, number, read_records
from lcl_mcore.terminal import say


@dataclass(frozen=True)
class StepStats:
    """Numbers of one step over the whole job, on the host.

    Attributes:
        step: 0-based.
        grad_norm: of the whole gradient, before clipping.
        skipped: the update was refused because something was not finite.
        nonfinite_ranks: ranks whose own losses were not finite.
        stop_requests, save_requests: ranks that asked to end the run, or for a checkpoint, after this step.
        contrastive, generation: losses of the global batch, unweighted; nats.
        scale: logit scale that the contrastive loss was formed with.
    """

    step: int
    grad_norm: float
    skipped: bool
    nonfinite_ranks: int
    stop_requests: int
    save_requests: int
    contrastive: float
    generation: float
    scale: float


@dataclass(frozen=True)
class StepOutput:
    """The same numbers on the device: fp32 [8] in the order of `StepStats`, without the step."""

    values: Tensor

    def read(self, step: int) -> StepStats:
        """Bring the numbers of 0-based `step` to the host; waits for the device."""
        norm, skipped, nonfinite, stop, save, contrastive, generation, scale = self.values.tolist()
        return StepStats(
            step, norm, skipped > 0, round(nonfinite), round(stop), round(save), contrastive, generation, scale
        )


@dataclass(frozen=True)
class StepRecord:
    """What the host knows of a step before its numbers arrive.

    Attributes:
        step: 0-based.
        lr: learning rate.
        batch: what was trained on.
        before: the state of the run before the step.
        images_seen: by the whole run, this step included.
        seconds: wall time of the step, waiting for data included.
        data_seconds: waiting for data.
    """

    step: int
    lr: float
    batch: StepBatch
    before: TrainState
    images_seen: int
    seconds: float
    data_seconds: float


@dataclass(frozen=True)
class FinishedStep:
    """A step whose numbers are known; `loss` is the weighted sum of both losses."""

    record: StepRecord
    stats: StepStats
    loss: float


class DeferredStats:
    """Hands the numbers of steps to the host without making it wait.

    On CUDA a step's numbers are copied behind its kernels and read when the next step has been queued, so
    the host stays one step ahead; on CPU they are read at once. All ranks read the same step at the same
    point, so decisions taken on them agree.
    """

    def __init__(self, device: Device, loss: LossConfig) -> None:
        self.device, self.loss = device, loss
        self.lag = 1 if device.is_cuda else 0
        self.waiting: list[tuple[StepRecord, HostCopy]] = []

    def push(self, record: StepRecord, output: StepOutput) -> None:
        """Add a step."""
        self.waiting.append((record, self.device.copy_to_host(output.values)))

    def due(self) -> list[FinishedStep]:
        """Steps that may be read without delaying the device."""
        return [self._pop() for _ in range(len(self.waiting) - self.lag)]

    def drain(self) -> list[FinishedStep]:
        """All other steps; waits for the device."""
        return [self._pop() for _ in range(len(self.waiting))]

    def _pop(self) -> FinishedStep:
        record, copy = self.waiting.pop(0)
        stats = StepOutput(copy.wait()).read(record.step)
        weights = self.loss
        loss = weights.contrastive_weight * stats.contrastive + weights.generation_weight * stats.generation
        return FinishedStep(record, stats, loss)


def format_duration(seconds: float) -> str:
    """`3 h 12 min`, `4 min 10 s`, `9 s`."""
    if not math.isfinite(seconds):
        return "?"
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    if seconds >= 60:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds} s"


class Speed:
    """Smoothed wall time of a step and its data wait; the first steps (warm-up, compilation) count least."""

    def __init__(self, horizon: int = 20) -> None:
        self.horizon, self.count = horizon, 0
        self.step_seconds = self.data_seconds = 0.0

    def add(self, step_seconds: float, data_seconds: float) -> None:
        self.count += 1
        share = max(1.0 / self.count, 1.0 / self.horizon)
        if self.count == 2:  # the first step pays for start-up: forget it
            share = 1.0
        self.step_seconds += share * (step_seconds - self.step_seconds)
        self.data_seconds += share * (data_seconds - self.data_seconds)


class StepLines:
    """A file of one record per step, such as `metrics.jsonl`, over all attempts of a run."""

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self.writer = LineWriter(path, log)
        self.write, self.close = self.writer.write, self.writer.close

    def rewind(self, done: int) -> list[Record]:
        """Go on after `done` steps: drop the records of later ones, lost with a crash or rollback, and return them."""
        return self.writer.drop(_has_step, lambda record: bool(record["step"] > done))


def read_steps(path: Path, names: Sequence[str] = ()) -> list[Record]:
    """Records of a file of `StepLines` that have these numbers; damaged lines are skipped.

    A record replaces those before it of the same or later steps: an attempt that could not drop them went on there.
    """
    records: list[Record] = []
    for record in read_records(path, _has_step).records:
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return [r for r in records if all(isinstance(r.get(name), int | float) for name in names)]


def _has_step(record: Record) -> bool:
    return number(record, "step")


def _step_seconds(record: Record) -> float:
    """Time in the step without data waits."""
    known = [float(record[name]) if number(record, name) else 0.0 for name in ("step_seconds", "data_seconds")]
    return known[0] - known[1]


def step_metrics(config: RunConfig, done: FinishedStep, speed: Speed, mfu: float | None) -> dict[str, Any]:
    """What `metrics.jsonl` says of one step; rates are those of recent steps."""
    record, stats, seconds = done.record, done.stats, speed.step_seconds
    counts = record.batch.counts
    images, tokens = sum(counts.images), sum(counts.tokens)
    positions = config.train.global_batch_size * config.data.sequence_length
    return {
        "step": stats.step + 1,
        "loss": done.loss,
        "contrastive": stats.contrastive,
        "generation": stats.generation,
        "grad_norm": stats.grad_norm,
        "scale": stats.scale,
        "lr": record.lr,
        "images": images,
        "images_seen": record.images_seen,
        "contexts": sum(counts.contexts),
        "targets": sum(counts.targets),
        "step_seconds": record.seconds,
        "data_seconds": record.data_seconds,
        "images_per_second": images / seconds,
        "tokens_per_second": tokens / seconds,
        "padding": 1.0 - tokens / positions,
        "data_wait": speed.data_seconds / seconds,
        "mfu": mfu,
        "eta_seconds": (config.train.steps - stats.step - 1) * seconds,
        "order_hash": record.batch.order_hash,
        **{f"data_{name}": value for name, value in record.batch.statistics.items()},
    }


class RunLog:
    """Rank 0's output. Other ranks have one with `enabled=False`, which does nothing."""

    def __init__(self, config: RunConfig, context: Context, done: int = 0) -> None:
        """`done` steps are in the checkpoint; lines of later ones, lost with a crash, are dropped."""
        self.enabled, self.folder = context.rank == 0, context.run_folder
        self.every, self.steps = config.log.every, config.train.steps
        self.tensorboard = config.log.tensorboard
        self.lines = StepLines(self.folder / "metrics.jsonl", self.info)
        self.board: TensorBoard | None = None
        self.lost_seconds = self.rewind(done)
        """Time in steps that an earlier attempt logged and no checkpoint holds."""

    def rewind(self, done: int) -> float:
        """Go on after `done` steps: lines of later ones are dropped; returns the seconds those steps took."""
        if not self.enabled:
            return 0.0
        self.close()
        lost = sum(map(_step_seconds, self.lines.rewind(done)))
        if self.tensorboard:
            self.board = TensorBoard(self.folder / "tensorboard", done + 1, self.info)
        return lost

    def info(self, text: str) -> None:
        """A line for the person watching."""
        if self.enabled:
            say(text)

    def step(self, record: Record) -> None:
        """One step: to the file always, to the terminal every `every` steps and at the end."""
        if not self.enabled:
            return
        self.lines.write(record)
        if self.board is not None:
            self.board.write(record)
        if record["step"] % self.every == 0 or record["step"] == self.steps:
            mfu = f"  MFU {record['mfu']:5.1%}" if record.get("mfu") is not None else ""
            self.info(
                f"step {record['step']:>6}/{self.steps}  loss {record['loss']:.4f}  con {record['contrastive']:.4f}"
                f"  gen {record['generation']:.4f}  grad {record['grad_norm']:.2f}  scale {record['scale']:.1f}"
                f"  lr {record['lr']:.1e}  {record['images_per_second']:.0f} img/s"
                f"  {record['tokens_per_second']:.0f} tok/s  pad {record['padding']:.1%}"
                f"  data-wait {record['data_wait']:.1%}{mfu}  ETA {format_duration(record['eta_seconds'])}"
            )

    def close(self) -> None:
        self.lines.close()
        if self.board is not None:
            self.board.close()


class TensorBoard:
    """Scalars for TensorBoard. When its disk fails it is opened again later; `metrics.jsonl` has what it misses."""

    def __init__(self, folder: Path, first_step: int, log: Callable[[str], None]) -> None:
        """Events of `first_step` and later ones, of an earlier attempt, are hidden."""
        self.folder, self.first_step, self.log = folder, first_step, log
        self.writer: Any = None
        self.retry_at: float | None = None

    def write(self, record: Record) -> None:
        """Every finite floating-point number of a step."""
        if self.retry_at is not None and time.monotonic() < self.retry_at:
            return
        try:
            if self.writer is None:
                self.writer = self._open()
            for name, value in record.items():
                if isinstance(value, float) and math.isfinite(value):
                    self.writer.add_scalar(name, value, record["step"])
        except (OSError, ValueError) as error:  # ValueError: its thread closed the file
            self._failed(error)
            return
        if self.retry_at is not None:
            self.log(f"{self.folder} can be written again")
            self.retry_at = None

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        return SummaryWriter(str(self.folder), purge_step=self.first_step)

    def _failed(self, error: Exception) -> None:
        if self.retry_at is None:
            self.log(f"WARNING {self.folder} cannot be written ({error}): training goes on without TensorBoard")
        self.retry_at = time.monotonic() + RETRY_SECONDS
        self.close()

    def close(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            with contextlib.suppress(OSError, ValueError):
                writer.close()


class Stopwatch:
    """Wall time since the last lap, in seconds."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        passed, self.start = now - self.start, now
        return passed
