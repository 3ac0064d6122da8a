"""Jobs on several processes. A process that dies is noticed at once, its job named and tried once more, alone.

The standard library's pool knows only that some process of it died, and gives up all jobs. Here every process has a
pipe of its own, so what each is doing is known. The work is sent once per process, not with every job.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

PRELOADED = ["webdataset", "lcl_mcore.data.prepare.engine"]
"""Imported once, not by every process."""
J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True)
class WorkerDied:
    """The outcome of a job whose process died twice. `how` says by what."""

    how: str


class JobProcess(Generic[J, R]):
    """A process that does one job at a time."""

    def __init__(self, work: Callable[[J], R]) -> None:
        context = multiprocessing.get_context("forkserver")  # forking a process with threads can deadlock
        context.set_forkserver_preload(PRELOADED)
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()  # so that its death is the end of the pipe

    def start(self, job: J) -> None:
        """Give it a job; its answer, or the end of a dead process, can be read from `connection`."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(job)

    def result(self) -> R | WorkerDied:
        """The job's result; an exception of the job is raised here."""
        try:
            value, error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            return WorkerDied(how)
        if error is not None:
            raise error
        result: R = value
        return result

    def end(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def run_jobs(work: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[tuple[J, R | WorkerDied]]:
    """`work` on every job; outcomes come in the order in which jobs end.

    Args:
        work: picklable, with picklable results. Its first exception ends everything.
        jobs: what to do.
        workers: processes; with one, or for one job, this process does it.
    """
    if workers == 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, work(job)
        return
    again: list[J] = []
    for job, outcome in _run_once(work, jobs, min(workers, len(jobs))):
        if isinstance(outcome, WorkerDied):
            again.append(job)
        else:
            yield job, outcome
    yield from _run_once(work, again, 1)  # each has the machine's memory to itself now


def _run_once(work: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[tuple[J, R | WorkerDied]]:
    waiting = deque(jobs)
    busy: dict[Connection, tuple[JobProcess[J, R], J]] = {}
    idle: list[JobProcess[J, R]] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                process = idle.pop() if idle else JobProcess(work)
                busy[process.connection] = process, waiting[0]
                process.start(waiting.popleft())
            for ready in connection.wait(list(busy)):
                process, job = busy[ready]  # type: ignore[index]
                outcome = process.result()
                del busy[process.connection]
                if isinstance(outcome, WorkerDied):
                    process.end()
                else:
                    idle.append(process)
                yield job, outcome
    finally:
        for process in [*idle, *(process for process, _ in busy.values())]:
            process.end()


def _serve(jobs: Connection, work: Callable[[Any], Any]) -> None:
    """The life of a process: jobs until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and ends us
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, Exception | None] = work(job), None
        except Exception as error:  # raised in the parent, with the place where it happened
            error.add_note("".join(traceback.format_exception(error)))
            answer = None, error
        jobs.send(answer)
