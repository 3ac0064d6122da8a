"""Stop requests from outside: SIGTERM (schedulers, torchrun) and SIGUSR2 (SLURM pre-emption)."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Remembers that a stop signal arrived; the training loop shares it with the other ranks and acts."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.received is not None
