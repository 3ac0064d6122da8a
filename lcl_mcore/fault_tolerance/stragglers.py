"""How long each rank works for itself, and which one keeps the others waiting.

In synchronous training every rank's step takes the same wall time: the fast ones wait for the slow one inside
collectives. So each rank observes its own train step and takes the time in the regions that wait for other ranks out:
what is left is its own compute time. Rank 0 compares the sums that all ranks publish with their heartbeats. Only the
host's clock is read, so nothing waits for the device. On CUDA this sees the host's side only: a GPU that is slow by
itself looks the same as its peers (NVIDIA's resiliency extension times kernels for that). With tensor parallelism over
gloo the ranks of a group wait for each other inside every layer: they are slow together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

from lcl_mcore.fault_tolerance.events import EventLog

WAITS = frozenset({"parameter_gather", "contrastive_loss", "gradient_sync", "optimizer", "pipeline_transfer"})
"""Regions of the train step that exchange something with other ranks; what they compute is small, and counts as
waiting."""
WARM_UP_STEPS = 2
STEPS_BETWEEN_REPORTS = 20
SHARE_OF_STEP = 0.05
"""A slow rank matters only by what it adds to the step."""


@dataclass(frozen=True)
class StepTimes:
    """One rank's sums since its start, in seconds.

    Attributes:
        steps: number of steps.
        wall: in the train step.
        compute: of `wall`, what was not spent waiting for other ranks.
        data: reading and decoding in the loader's thread; 0 on ranks that receive their data.
    """

    steps: int = 0
    wall: float = 0.0
    compute: float = 0.0
    data: float = 0.0


@dataclass(frozen=True)
class StragglerReport:
    """Seconds per step of every rank over a window, and the slowest rank.

    Attributes:
        steps: in the window.
        compute, data: of every rank, as in `StepTimes`.
        slowest: rank with the most.
        seconds: its time per step.
        median: of the others' time.
        kind: where it is out of line, or "" if no rank is.
    """

    steps: int
    compute: list[float]
    data: list[float]
    slowest: int
    seconds: float
    median: float
    kind: Literal["compute", "data", ""]

    @property
    def ratio(self) -> float:
        """The slowest rank's time over the median of the others."""
        return self.seconds / max(self.median, 1e-9)

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"straggler  rank {self.slowest}: {self.seconds:.3f} s of {self.kind} a step, the others "
            f"{self.median:.3f} s ({self.ratio:.1f} times; over {self.steps} steps)"
        )


class StragglerDetector:
    """Times this rank's steps as their observer (`train_step.StepObserver`); rank 0's compares all ranks.

    `start_step`, `region`, `end_step` and `metrics` belong to the training thread, the rest to the watchdog's.
    """

    def __init__(self, straggler_ratio: float) -> None:
        self.ratio = straggler_ratio
        self.times = StepTimes()
        self._started = self._waited = 0.0
        self._waiting = False
        self._window: list[StepTimes] = []
        self._compared = time.monotonic()
        self._report: StragglerReport | None = None
        self._logged: tuple[int, str] | None = None

    # --- one rank's steps ---

    def start_step(self) -> None:
        """The train step begins."""
        self._started, self._waited = time.monotonic(), 0.0

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """A part of the step: time spent in one that waits for other ranks is not this rank's own."""
        if name not in WAITS or self._waiting:
            yield
            return
        self._waiting, entered = True, time.monotonic()
        try:
            yield
        finally:
            self._waiting = False
            self._waited += time.monotonic() - entered

    def end_step(self, data_seconds: float) -> None:
        """The step is queued (CUDA) or done (CPU).

        Args:
            data_seconds: time that this rank has spent reading and decoding data since its start.
        """
        wall, before = time.monotonic() - self._started, self.times
        self.times = StepTimes(before.steps + 1, before.wall + wall, before.compute + wall - self._waited, data_seconds)

    # --- all ranks ---

    def due(self, world_size: int) -> bool:
        """Whether it is time to compare: after the first steps, then every so many."""
        if not self._window:
            return self.times.steps >= WARM_UP_STEPS
        steps, seconds = self.times.steps - self._window[0].steps, time.monotonic() - self._compared
        return steps >= STEPS_BETWEEN_REPORTS and seconds >= max(4.0, world_size / 8)

    def compare(self, times: list[StepTimes]) -> None:
        """Compare all ranks, in the order of their numbers, since the last call."""
        if self._window:
            self._report = compare(self._window, times, self.ratio) or self._report
        self._window, self._compared = times, time.monotonic()

    def metrics(self, log: Callable[[str], None], events: EventLog) -> dict[str, float]:
        """The slowest rank of the newest report, for the metrics; a new straggler is also logged."""
        found = self._report
        if found is None:
            return {}
        named = (found.slowest, found.kind)
        if found.kind and named != self._logged:
            log(found.describe())
            events.record("straggler", **asdict(found))
        self._logged = named
        return {"slowest_rank": found.slowest, "slowest_seconds": found.seconds, "slowest_ratio": found.ratio}


def compare(before: Sequence[StepTimes], now: Sequence[StepTimes], straggler_ratio: float) -> StragglerReport | None:
    """Compare the ranks over a window.

    Args:
        before, now: of all ranks, at its beginning and end.
        straggler_ratio: a straggler takes more than so many times the median of the others.

    Returns:
        None while some rank has no step in the window, or is alone.
    """
    pairs = list(zip(before, now, strict=True))
    steps = [b.steps - a.steps for a, b in pairs]
    if len(pairs) < 2 or min(steps) < 1:
        return None
    compute = [(b.compute - a.compute) / n for (a, b), n in zip(pairs, steps, strict=True)]
    data = [(b.data - a.data) / n for (a, b), n in zip(pairs, steps, strict=True)]
    step = statistics.mean((b.wall - a.wall) / n for (a, b), n in zip(pairs, steps, strict=True))
    rank, median, named = _slowest(compute, compute, straggler_ratio, SHARE_OF_STEP * step)
    kind: Literal["compute", "data", ""] = "compute" if named else ""
    values = compute
    if not named:
        readers = [seconds for seconds in data if seconds > 0]
        late, usual, named = _slowest(data, readers, straggler_ratio, 0.5 * step)
        if named:
            rank, median, kind, values = late, usual, "data", data
    return StragglerReport(min(steps), compute, data, rank, values[rank], median, kind)


def _slowest(values: Sequence[float], counted: Sequence[float], ratio: float, floor: float) -> tuple[int, float, bool]:
    """The rank with the largest value, the median of the other `counted` values, and whether it is out of line."""
    rank = max(range(len(values)), key=values.__getitem__)
    others = list(counted)
    if values[rank] in others:
        others.remove(values[rank])
    median = statistics.median(others) if others else values[rank]
    return rank, median, values[rank] > ratio * median and values[rank] - median > floor
