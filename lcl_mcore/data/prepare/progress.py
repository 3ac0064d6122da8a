"""One line of progress with the time that is left."""

from __future__ import annotations

import sys
import time
from collections import Counter


class Progress:
    """Counts finished work; rewrites one line on a terminal, else prints a line now and then."""

    def __init__(self, total: int, what: str, *, quiet: bool = False) -> None:
        self._total = max(total, 1)
        self._what = what
        self._quiet = quiet
        self._done = 0
        self._counts: Counter[str] = Counter()
        self._start = self._last = time.monotonic()

    def advance(self, weight: int, counts: dict[str, int]) -> None:
        """Note finished work."""
        self._done += weight
        self._counts.update(counts)
        now = time.monotonic()
        finished = self._done >= self._total
        pause = 0.2 if sys.stderr.isatty() else 5.0
        if self._quiet or (now - self._last < pause and not finished):
            return
        self._last = now
        sys.stderr.write(self._line(now - self._start) + ("\n" if finished else self._separator()))
        sys.stderr.flush()

    def _line(self, elapsed: float) -> str:
        left = elapsed / self._done * (self._total - self._done)
        share = 100 * self._done / self._total
        counts = ", ".join(f"{count:,} {name}" for name, count in self._counts.items())
        return f"{self._what} {share:3.0f} %, {_clock(elapsed)} gone, {_clock(left)} left: {counts}"

    def _separator(self) -> str:
        return "\r" if sys.stderr.isatty() else "\n"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
