"""Stop requests from outside: SIGTERM (schedulers, torchrun), SIGUSR2 (SLURM before a time limit), Ctrl-C.

A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from types import FrameType

NUMBERS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
INTERRUPTED = 130
"""Exit code after a second Ctrl-C."""


class StopRequest:
    """Remembers that a stop signal arrived; the training loop shares it with the other ranks and acts.

    SLURM signals every process of a job step, also the helpers that megatron starts for writing checkpoints.
    A handler would be reset to the deadly default in them; a blocked signal stays blocked. So the signals are
    blocked here, for this thread and all that it starts, and a thread takes them. The handler serves those
    that reach a thread which was started before.

    Attributes:
        received: name of the signal, or what else asked for the stop; None until then.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log
        self.received: str | None = None
        for number in NUMBERS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
        resource_tracker.ensure_running()  # unblocks SIGTERM in the thread that first needs it (CPython)
        signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
        threading.Thread(target=self._wait, name="stop-signals", daemon=True).start()

    def _wait(self) -> None:
        while True:
            self._take(signal.sigwait(NUMBERS))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._take(number)

    def _take(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.received == name:
            for child in multiprocessing.active_children():  # writers of a checkpoint would outlive us
                child.kill()
            os._exit(INTERRUPTED)
        if number == signal.SIGINT:
            self.log("interrupted: training stops after this step with a checkpoint; Ctrl-C again quits at once")
        self.received = name

    def __bool__(self) -> bool:
        return self.received is not None
