"""Goodput: where a run's time went, over all its restarts, and its effective training time ratio (ETTR).

productive    time in steps that are part of the result
data          stalled while waiting for data
checkpoint    stalled for a checkpoint
recomputed    time in steps that were lost with a crash or a rollback, and had to be computed again
restart       from the last event of an attempt that ended badly to the first step of the next one; for the first
              attempt from the start of its process. Time between a clean end and a later --resume does not count.
other         what is left of the wall time: logging, collecting garbage, closing

ETTR = productive / wall   (Kokolis et al., arXiv:2410.21680)
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import psutil

from lcl_mcore.distributed.launcher import job_id
from lcl_mcore.fault_tolerance.events import ACCOUNT, EventLog, read_events
from lcl_mcore.metrics import format_duration

# The account is written this often, and less often as the run grows: its file stays small.
TICK_SECONDS, TICKS_PER_RUN, SLOWEST_TICK = 1.0, 1000, 60.0


@dataclass
class Account:
    """Seconds by what they were spent on (see the module's text), and the number of restarts."""

    productive: float = 0.0
    data: float = 0.0
    checkpoint: float = 0.0
    recomputed: float = 0.0
    restart: float = 0.0
    wall: float = 0.0
    restarts: int = 0

    def __add__(self, more: Account) -> Account:
        return Account(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(self)))

    @property
    def ettr(self) -> float:
        return self.productive / self.wall if self.wall > 0 else 0.0

    def describe(self) -> str:
        """One line for the terminal."""
        wall, attempts = max(self.wall, 1e-9), self.restarts + 1
        return (
            f"goodput    {format_duration(self.wall)} in {attempts} attempt{'s' if attempts > 1 else ''}: "
            f"productive {self.productive / wall:.1%}, data stalls {self.data / wall:.1%}, "
            f"checkpoint stalls {self.checkpoint / wall:.1%}, recomputed steps {self.recomputed / wall:.1%}, "
            f"restarts {self.restart / wall:.1%}; ETTR {self.ettr:.3f}"
        )


def past_attempts(events: Sequence[dict[str, Any]], now: float) -> Account:
    """The account of all earlier attempts.

    Args:
        events: of the run's folder, oldest first.
        now: Unix seconds at which this attempt began; the time since the last one counts if that ended badly.
    """
    account = Account(restarts=-1)
    last: dict[str, Any] | None = None
    ended: float | None = None
    for event in [*events, {"event": "start", "time": now}]:
        if event["event"] == "start":
            account.restarts += 1
            if last is not None:
                account += Account(**{name: last[name] for name in ACCOUNT})
            if ended is not None:
                gap = max(0.0, event["time"] - ended)
                account += Account(restart=gap, wall=gap)
            last, ended = None, event["time"]
        elif event["event"] in ("tick", "end"):
            last = event
            ended = event["time"] if event["event"] == "tick" else None
    return account


class Goodput:
    """The running account of this attempt, written to the event log now and then."""

    def __init__(self, events: EventLog, *, step: int, world_size: int, layout: str) -> None:
        """The attempt begins.

        Args:
            step: steps in the checkpoint that it continues.
            world_size: number of ranks.
            layout: how they are used, for readers of the log.
        """
        self.events = events
        self.born = psutil.Process().create_time()
        # Spans are measured by a clock that nobody sets.
        self.start = time.monotonic() - max(time.time() - self.born, 0.0)
        self.before = past_attempts(read_events(events.folder), self.born) if events.enabled else Account()
        self.own = Account()
        self.training = False
        self.ticked = -math.inf
        events.record(
            "start",
            moment=self.born,
            durable=False,
            job=job_id(),
            step=step,
            world=world_size,
            layout=layout,
            pid=os.getpid(),
        )

    def start_step(self) -> None:
        """A step begins: everything until the first one was (re)starting."""
        if not self.training:
            self.training = True
            self.own.restart = time.monotonic() - self.start

    def add_step(self, seconds: float, data_seconds: float) -> None:
        """A step of `seconds` is done, `data_seconds` of which were spent waiting for its data."""
        self.own.productive += seconds - data_seconds
        self.own.data += data_seconds
        pause = min(max(TICK_SECONDS, self.own.wall / TICKS_PER_RUN), SLOWEST_TICK)
        if time.monotonic() - self.ticked > pause:
            self._write("tick")

    def add_checkpoint_stall(self, seconds: float) -> None:
        """Training stood still for a checkpoint."""
        self.own.checkpoint += seconds
        self._write("tick")

    def add_recomputed(self, seconds: float) -> None:
        """Steps that took `seconds` are not part of the result any more, and will be computed again."""
        self.own.productive -= seconds
        self.own.recomputed += seconds

    def end(self) -> None:
        """The run ends in order."""
        self._write("end")

    def total(self) -> Account:
        """All attempts together, until now."""
        self.own.wall = time.monotonic() - self.start
        return self.before + self.own

    def _write(self, name: str) -> None:
        now = time.monotonic()
        self.ticked, self.own.wall = now, now - self.start
        seconds = {name: round(getattr(self.own, name), 3) for name in ACCOUNT}
        self.events.record(name, durable=False, **seconds)
