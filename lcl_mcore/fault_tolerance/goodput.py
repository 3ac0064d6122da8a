"""Where a run's time went, over all its restarts: effective training time ratio (ETTR).

`events.jsonl` in the run's folder holds, besides faults, one line per start and a running account of each attempt.

    productive  time in steps that are part of the result
    stalled     waiting for data, or for a checkpoint
    redone      time in steps that were lost with a crash or taken back
    restart     from the last sign of an attempt that ended badly to the first step of the next one; for the first
                attempt from the start of its process. Time between a clean end and a later --resume does not count.
    other       what is left of the wall time: logging, collecting garbage, closing

    ETTR = productive / wall   (Kokolis et al., arXiv:2410.21680)
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lcl_mcore.fault_tolerance.restart import EVENTS, job_id
from lcl_mcore.metrics import format_duration

# The account is written this often, and less often as the run grows: its file stays small.
TICK_SECONDS, TICKS_PER_RUN, SLOWEST_TICK = 1.0, 1000, 60.0


@dataclass
class Account:
    """Seconds by what they were spent on."""

    productive: float = 0.0
    data: float = 0.0
    checkpoint: float = 0.0
    redone: float = 0.0
    restart: float = 0.0
    wall: float = 0.0
    restarts: int = 0

    @property
    def ettr(self) -> float:
        return self.productive / self.wall if self.wall > 0 else 0.0

    def record(self) -> dict[str, float]:
        """All parts, as logged."""
        parts = {
            "productive": self.productive,
            "stalled_data": self.data,
            "stalled_checkpoint": self.checkpoint,
            "redone": self.redone,
            "restart": self.restart,
        }
        other = self.wall - sum(parts.values())
        values = {**parts, "other": other, "wall": self.wall, "ettr": self.ettr}
        return {name: round(value, 3) for name, value in values.items()} | {"restarts": self.restarts}

    def describe(self) -> str:
        """One line for the terminal."""
        wall = max(self.wall, 1e-9)
        return (
            f"time       {format_duration(self.wall)} in {self.restarts + 1} attempts: "
            f"productive {self.productive / wall:.1%}, waiting for data {self.data / wall:.1%}, "
            f"for checkpoints {self.checkpoint / wall:.1%}, redone {self.redone / wall:.1%}, "
            f"restarting {self.restart / wall:.1%}; ETTR {self.ettr:.3f}"
        )


def past(events: list[dict[str, Any]], now: float) -> Account:
    """The account of all earlier attempts, up to `now` when the last one ended badly (Unix seconds)."""
    account = Account(restarts=-1)
    last: dict[str, Any] | None = None
    ended: float | None = None
    for event in [*events, {"event": "start", "time": now}]:
        if event["event"] == "start":
            account.restarts += 1
            if last is not None:
                for name in ("productive", "data", "checkpoint", "redone", "restart", "wall"):
                    setattr(account, name, getattr(account, name) + last[name])
            if ended is not None:
                gap = max(0.0, event["time"] - ended)
                account.restart, account.wall = account.restart + gap, account.wall + gap
            last, ended = None, event["time"]
        elif event["event"] in ("tick", "end"):
            last = event
            ended = event["time"] if event["event"] == "tick" else None
    return account


class Goodput:
    """The account of a run on rank 0; other ranks have one with `enabled=False`, which only counts."""

    def __init__(self, folder: Path, enabled: bool, step: int, world: int, layout: str) -> None:
        """`step` steps are in the checkpoint that this attempt continues."""
        self.enabled, self.path = enabled, folder / EVENTS
        self.born = psutil.Process().create_time()
        self.before = Account()
        self.own = Account()
        self.first_step: float | None = None
        self.ticked = 0.0
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.before = past(read_events(folder), self.born)
        _end_last_line(self.path)
        self._write("start", self.born, job=job_id(), step=step, world=world, layout=layout, pid=os.getpid())

    def begin(self) -> None:
        """The first step begins: everything until now was (re)starting."""
        if self.first_step is None:
            self.first_step = time.time()
            self.own.restart = self.first_step - self.born

    def step(self, seconds: float, data_seconds: float) -> None:
        """A step of `seconds` is done, `data_seconds` of which were spent waiting for its data."""
        self.own.productive += seconds - data_seconds
        self.own.data += data_seconds
        pause = min(max(TICK_SECONDS, self.own.wall / TICKS_PER_RUN), SLOWEST_TICK)
        if time.time() - self.ticked > pause:
            self._tick("tick")

    def stall(self, seconds: float) -> None:
        """Training stood still for a checkpoint."""
        self.own.checkpoint += seconds
        self._tick("tick")

    def lost(self, seconds: float) -> None:
        """Steps that took `seconds` are not part of the result any more."""
        self.own.productive -= seconds
        self.own.redone += seconds

    def event(self, name: str, **fields: Any) -> None:
        """Write a fault, or what was done about it, for good: the line is on disk when this returns."""
        self._write(name, time.time(), durable=True, **fields)

    def end(self) -> None:
        """The run ends in order."""
        self._tick("end")

    def total(self) -> Account:
        """All attempts together, until now."""
        self.own.wall = time.time() - self.born
        parts = {name: getattr(self.before, name) + getattr(self.own, name) for name in vars(self.own)}
        return Account(**parts)

    def _tick(self, name: str) -> None:
        now = time.time()
        self.ticked, self.own.wall = now, now - self.born
        self._write(name, now, **{k: round(v, 3) for k, v in vars(self.own).items() if k != "restarts"})

    def _write(self, name: str, moment: float, *, durable: bool = False, **fields: Any) -> None:
        if not self.enabled:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": name, "time": round(moment, 3), **fields}) + "\n")
            if durable:
                file.flush()
                os.fsync(file.fileno())


def _end_last_line(path: Path) -> None:
    """A crash may have cut the last line: what follows begins a new one."""
    if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; lines cut by a crash are left out."""
    path, events = folder / EVENTS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
