"""How long each rank works for itself, and which one keeps the others waiting.

In synchronous training every rank's step takes the same wall time: the fast ones wait for the slow one inside
collectives. So a thread looks 20 times a second at what the training thread is doing; the share of looks in which
it is not waiting for others, times the wall time of the step, is the rank's own time. That works for every layout
and needs no change in the step. On CUDA it sees the host's side only: a GPU that is slow by itself looks the same
as its peers (NVIDIA's resiliency extension times kernels for that).
"""

from __future__ import annotations

import linecache
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

LOOK_SECONDS = 0.05
STEPS_BETWEEN_REPORTS = 20
# A slow rank matters only by what it adds to the step.
SHARE_OF_STEP = 0.05


def _waits(frame: FrameType) -> bool:
    """Whether a thread in this (innermost) frame waits for other ranks or for the device."""
    if "/torch/distributed/" in frame.f_code.co_filename:
        return True
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0)  # None between two lines
    return ".wait(" in line or "synchronize(" in line


class StragglerDetector:
    """Samples the thread that made it, between `enter` and `leave`."""

    def __init__(self) -> None:
        self.steps, self.looks, self.own_looks = 0, 0, 0
        self.wall = self.read = 0.0
        self._watched = threading.get_ident()
        self._inside = threading.Event()
        self._closed = False
        self._since = 0.0
        self._thread = threading.Thread(target=self._look, name="own-time", daemon=True)
        self._thread.start()

    def enter(self) -> None:
        """The step begins."""
        self._since = time.monotonic()
        self._inside.set()

    def leave(self, read_seconds: float) -> None:
        """The step is queued (CUDA) or done (CPU).

        Args:
            read_seconds: time that this rank has spent reading and decoding data since the run began.
        """
        self._inside.clear()
        self.wall += time.monotonic() - self._since
        self.read = read_seconds
        self.steps += 1

    def totals(self) -> dict[str, float]:
        """Sums since the run began, to be published with the heartbeat."""
        return {
            "steps": self.steps,
            "wall": self.wall,
            "read": self.read,
            "looks": self.looks,
            "own": self.own_looks,
        }

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._inside.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            self._inside.wait()
            if self._closed:
                return
            frame = sys._current_frames().get(self._watched)
            if frame is not None and self._inside.is_set():
                self.looks += 1
                self.own_looks += not _waits(frame)


@dataclass(frozen=True)
class Comparison:
    """Seconds per step of every rank over a window, and the slowest rank if it is out of line.

    own    computing, launching and everything else that is not waiting for another rank
    read   reading and decoding in the loader's thread; 0 on ranks that receive their data
    """

    steps: int
    own: list[float]
    read: list[float]
    slowest: int
    seconds: float
    median: float
    kind: str  # "own", "read", or "" when no rank is out of line

    @property
    def ratio(self) -> float:
        """The slowest rank's time over the median of the others."""
        return self.seconds / max(self.median, 1e-9)


def compare(
    before: list[dict[str, float]], now: list[dict[str, float]], straggler_ratio: float
) -> Comparison | None:
    """Compare the ranks' totals at two moments; None while some rank has no step or no sample between them."""
    deltas = [{name: b[name] - a[name] for name in b} for a, b in zip(before, now, strict=True)]
    if len(deltas) < 2 or any(d["steps"] < 1 or d["looks"] < 1 for d in deltas):
        return None
    own = [d["own"] / d["looks"] * d["wall"] / d["steps"] for d in deltas]
    read = [d["read"] / d["steps"] for d in deltas]
    step = statistics.mean(d["wall"] / d["steps"] for d in deltas)
    answer: dict[str, Any] = {}
    for kind, values, floor in (("own", own, SHARE_OF_STEP * step), ("read", read, 0.5 * step)):
        slowest = max(range(len(values)), key=values.__getitem__)
        others = [v for rank, v in enumerate(values) if rank != slowest and (kind == "own" or v > 0)]
        median = statistics.median(others) if others else values[slowest]
        named = values[slowest] > straggler_ratio * median and values[slowest] - median > floor
        if named or not answer:
            answer = {
                "slowest": slowest,
                "seconds": values[slowest],
                "median": median,
                "kind": kind if named else "",
            }
        if named:
            break
    return Comparison(min(int(d["steps"]) for d in deltas), own, read, **answer)
