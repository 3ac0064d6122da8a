"""Prepares a bounded number of items ahead in one background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Prefetcher(Generic[T], Iterator[T]):
    """Calls `produce` at most `depth` items ahead of the consumer.

    The thread works for credits: `depth` at the start and one more for every item taken. So ranks that
    take the same number of items also produce the same number, and collectives inside `produce` match
    even when the loaders are closed in the middle of a run.
    """

    def __init__(self, produce: Callable[[], T], depth: int, *, name: str = "prefetch") -> None:
        self._produce = produce
        self._credits = threading.Semaphore(depth)
        self._items: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._failed: BaseException | None = None
        # The current CUDA device is a thread's own; a new thread would otherwise use the first one.
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        """The next item; an error of `produce` is raised here, again on every later call."""
        if self._failed is not None:
            raise self._failed
        if self._stopped.is_set():
            raise StopIteration
        item = self._items.get()
        if isinstance(item, BaseException):
            self._failed = item
            raise item
        self._credits.release()
        return item

    def close(self) -> None:
        """Stop after the item in work."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._credits.release()
            self._thread.join()

    def _work(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while True:
            self._credits.acquire()
            if self._stopped.is_set():
                return
            try:
                self._items.put(self._produce())
            except BaseException as error:  # handed to the consumer, whatever it is
                self._items.put(error)
                return
