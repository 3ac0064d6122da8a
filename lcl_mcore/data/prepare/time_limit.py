"""A bound on the processor time that one record or image may take, whatever is in it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ITEM_SECONDS = 60.0


class TooSlowError(ValueError):
    """Reading something took longer than its time limit."""


class _Ring(BaseException):
    """No parser's `except` catches it."""


@contextmanager
def time_limit(seconds: float = ITEM_SECONDS) -> Iterator[None]:
    """End what runs inside after so much processor time of this process, so that other load does not count.

    Python code is ended at once, a library's code where it returns to Python. In other threads than the main one there
    is no limit: signals do not arrive there.

    Raises:
        TooSlowError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise _Ring

    before = signal.signal(signal.SIGVTALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _Ring:
        raise TooSlowError(f"over {seconds:g} seconds") from None
    finally:
        signal.signal(signal.SIGVTALRM, before)
