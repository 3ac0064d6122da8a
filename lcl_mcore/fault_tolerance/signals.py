"""Stop requests from outside: SIGTERM (schedulers, torchrun) and SIGUSR2 (SLURM before a time limit)."""

from __future__ import annotations

import signal
import threading
from multiprocessing import resource_tracker
from types import FrameType

NUMBERS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Remembers that a stop signal arrived; the training loop shares it with the other ranks and acts.

    SLURM signals every process of a job step, also the helpers that megatron starts for writing checkpoints.
    A handler would be reset to the deadly default in them; a blocked signal stays blocked. So the signals are
    blocked here, for this thread and all that it starts, and a thread takes them. The handler serves those
    that reach a thread which was started before.

    Attributes:
        received: name of the signal, or what else asked for the stop; None until then.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in NUMBERS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
        resource_tracker.ensure_running()  # unblocks SIGTERM in the thread that first needs it (CPython)
        signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
        threading.Thread(target=self._wait, name="stop-signals", daemon=True).start()

    def _wait(self) -> None:
        while True:
            self.received = signal.Signals(signal.sigwait(NUMBERS)).name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.received is not None
