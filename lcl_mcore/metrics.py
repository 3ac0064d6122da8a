"""Per-step numbers: read from the device one step late on CUDA, written to terminal, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

FIELDS = ("grad_norm", "skipped", "nonfinite_ranks", "stop_requests", "contrastive", "generation", "scale")


@dataclass(frozen=True)
class StepStats:
    """What the device reported about one step (see `TrainStep.run`)."""

    step: int
    grad_norm: float
    skipped: bool
    nonfinite_ranks: int
    stop_requests: int
    save_requested: bool
    contrastive: float
    generation: float
    scale: float


class DeferredStats:
    """Hands device vectors to the host without making it wait.

    On CUDA a step's numbers are copied behind its kernels and read when the next step has been queued, so
    the host stays one step ahead; on CPU they are read at once. All ranks read the same step at the same
    point, so decisions taken on them agree.
    """

    def __init__(self, device: torch.device) -> None:
        self.lag = 1 if device.type == "cuda" else 0
        self.waiting: list[tuple[int, Tensor, Any]] = []

    def push(self, step: int, values: Tensor) -> StepStats | None:
        """Add a step's vector; returns the numbers of the newest step that is due."""
        if self.lag == 0:
            return _read(step, values)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.waiting.append((step, host, event))
        return self._pop() if len(self.waiting) > self.lag else None

    def drain(self) -> list[StepStats]:
        """Wait for everything still under way."""
        return [self._pop() for _ in range(len(self.waiting))]

    def _pop(self) -> StepStats:
        step, host, event = self.waiting.pop(0)
        event.synchronize()
        return _read(step, host)


def _read(step: int, values: Tensor) -> StepStats:
    numbers = dict(zip(FIELDS, values.tolist(), strict=True))
    return StepStats(
        step=step,
        grad_norm=numbers["grad_norm"],
        skipped=numbers["skipped"] > 0,
        nonfinite_ranks=round(numbers["nonfinite_ranks"]),
        stop_requests=math.floor(numbers["stop_requests"]),
        save_requested=numbers["stop_requests"] % 1 != 0,
        contrastive=numbers["contrastive"],
        generation=numbers["generation"],
        scale=numbers["scale"],
    )


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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file; a last line cut by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _keep_steps(path: Path, done: int) -> float:
    """Drop the lines of steps after `done`; the seconds that those steps took, data waits left out."""
    records = read_metrics(path)
    kept = [record for record in records if record["step"] <= done]
    if path.is_file():
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return float(sum(r["step_seconds"] - r.get("data_seconds", 0.0) for r in records if r["step"] > done))


class RunLog:
    """Rank 0's output. Other ranks have one with `enabled=False`, which does nothing."""

    def __init__(
        self, folder: Path, enabled: bool, tensorboard: bool, every: int, steps: int, done: int = 0
    ) -> None:
        """`done` steps are in the checkpoint; lines of later ones, lost with a crash, are dropped."""
        self.enabled, self.every, self.steps = enabled, every, steps
        self.folder, self.tensorboard = folder, tensorboard
        self.file: TextIO | None = None
        self.board: Any = None
        self.lost_seconds = self.rewind(done)
        """Time in steps that an earlier attempt logged and no checkpoint holds."""

    def rewind(self, done: int) -> float:
        """Go on after `done` steps: lines of later ones are dropped; returns the seconds those steps took."""
        if not self.enabled:
            return 0.0
        self.close()
        lost = _keep_steps(self.folder / "metrics.jsonl", done)
        self.file = open(self.folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=done + 1)
        return lost

    def note(self, text: str) -> None:
        """A line for the person watching."""
        if self.enabled:
            print(text, flush=True)

    def step(self, record: dict[str, Any]) -> None:
        """One step: to the file always, to the terminal every `every` steps and at the end."""
        if not self.enabled:
            return
        assert self.file is not None
        self.file.write(json.dumps(record) + "\n")
        number = record["step"]
        if self.board is not None:
            for name, value in record.items():
                if isinstance(value, float) and math.isfinite(value):
                    self.board.add_scalar(name, value, number)
        if number % self.every == 0 or number == self.steps:
            mfu = f"  MFU {record['mfu']:5.1%}" if record.get("mfu") is not None else ""
            print(
                f"step {number:>6}/{self.steps}  loss {record['loss']:.4f}  con {record['contrastive']:.4f}"
                f"  gen {record['generation']:.4f}  grad {record['grad_norm']:.2f}  scale {record['scale']:.1f}"
                f"  lr {record['lr']:.1e}  {record['images_per_second']:.0f} img/s"
                f"  {record['tokens_per_second']:.0f} tok/s  pad {record['padding']:.1%}"
                f"  data-wait {record['data_wait']:.1%}{mfu}  ETA {format_duration(record['eta_seconds'])}",
                flush=True,
            )

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


class Stopwatch:
    """Wall time since the last lap, in seconds."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        passed, self.start = now - self.start, now
        return passed
