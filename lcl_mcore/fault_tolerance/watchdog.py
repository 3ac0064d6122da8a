"""Ends a job that cannot go on, within seconds and with a message that says who is missing and where.

A thread publishes this rank's place in the job's store twice a second and looks after the processes beside it. No
collective is added to the step. A dead process of this machine is seen in /proc within half a second, and a verdict
of any rank reaches all others through the store in the same time. A rank that hangs is found when a collective's
timeout (`parallel.timeout_seconds`, on every group) runs out, or two seconds later by this thread where the
training thread cannot say it. torchrun then restarts the job if it was told to (`--max-restarts`).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch.distributed as dist

from lcl_mcore.errors import LclError, PeerError
from lcl_mcore.fault_tolerance.flight_recorder import is_communication_error, under_way
from lcl_mcore.fault_tolerance.heartbeat import (
    ENDED,
    Heartbeat,
    HeartbeatStore,
    end_idle,
    find_missing,
    machine,
    process_state,
)
from lcl_mcore.fault_tolerance.stragglers import STEPS_BETWEEN_REPORTS, Comparison, StragglerDetector, compare

INTERVAL = 0.5
GRACE = 2.0
WARM_UP_STEPS = 2
SILENT_SECONDS = 30.0
"""A rank of another machine that gives no sign of life for so long is lost."""
LIMITED = ("data", "step")
"""Phases that end within the collectives' timeout, or never."""


_P = ParamSpec("_P")
_T = TypeVar("_T")


def explained(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """For methods of an object with a `watchdog`: an error tells the other ranks, or is told by them."""

    @functools.wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            watchdog = getattr(args[0], "watchdog", None)
            peer = watchdog.explain(error) if watchdog is not None else None
            if peer is None:
                raise
            raise peer from error

    return run


@dataclass(frozen=True)
class Place:
    """Where the training thread is, since when (monotonic seconds)."""

    marks: int
    phase: str
    step: int
    since: float


class Watchdog:
    """One per rank, made once the process group exists. `close` it, or tell it why the rank ends (`explain`)."""

    def __init__(
        self, store: dist.Store, rank: int, world: int, timeout_seconds: float, straggler_ratio: float
    ) -> None:
        self.rank, self.world, self.timeout, self.ratio = rank, world, timeout_seconds, straggler_ratio
        self.own = StragglerDetector()
        self.comparison: Comparison | None = None
        """The newest comparison of the ranks' own times, on rank 0."""
        self.place = Place(0, "start", 0, time.monotonic())
        self.signs = HeartbeatStore(store.clone(), world)  # type: ignore[attr-defined]  # a connection of its own
        self.identity = (machine(), os.uname().nodename, os.getpid())
        self.count = 0
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        local, first = (
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            rank - int(os.environ.get("LOCAL_RANK", "0")),
        )
        self.neighbours = [r for r in range(first, first + local) if r != rank and r < world]
        # One process of each machine watches one of the next.
        self.remote = (first + local) % world if rank == first and local < world else None
        self.remote_seen = (0, time.monotonic())
        self.totals: list[dict[str, float]] = []
        self.compared = time.monotonic()
        self.ending = threading.Lock()
        self.finished = threading.Event()
        if world > 1:
            self._publish()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def mark(self, phase: str, step: int) -> None:
        """The training thread enters a phase of (0-based) `step`."""
        self.place = Place(self.place.marks + 1, phase, step + 1, time.monotonic())

    def close(self) -> None:
        """This rank leaves because its work is done."""
        self._end("done", "")
        self.thread.join()  # a thread inside the store's C++ code must not meet the end of the interpreter

    def explain(self, error: Exception) -> PeerError | None:
        """This rank leaves with an error.

        Returns:
            What to report instead when the error only says that some other rank did not answer.
        """
        if self.world == 1 or not is_communication_error(error):
            self._end(
                "failed",
                f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
                if str(error)
                else type(error).__name__,
                verdict=not isinstance(error, LclError),
            )
            return None
        with self.ending:  # from here on the thread leaves the message to us
            self.finished.set()
        try:
            text = self.signs.published_verdict() or self.signs.verdict(self._judge("a collective failed"))
            self._publish("failed", "stopped because of another rank")
        except (RuntimeError, dist.DistError):
            text = "the job's store is gone: the launcher (torchrun) of the first node was killed or lost"
        return PeerError(text + f" [here: {str(error).strip().splitlines()[-1][:200]}]")

    def _end(self, phase: str, reason: str, verdict: bool = False) -> None:
        with self.ending:
            self.finished.set()
        self.own.close()
        if self.world > 1:
            try:
                self._publish(phase, reason)
                if verdict:
                    self.signs.verdict(f"rank {self.rank} ended in step {self.place.step}: {reason}")
            except (RuntimeError, dist.DistError) as error:
                print(f"the job's store could not be told: {error}", file=sys.stderr, flush=True)

    def _beat(self, phase: str = "", error: str = "") -> Heartbeat:
        here, host, pid = self.identity
        place = self.place
        return Heartbeat(
            self.rank,
            self.count,
            place.marks,
            phase or place.phase,
            place.step,
            time.monotonic() - place.since,
            host,
            here,
            pid,
            error,
            self.own.totals(),
        )

    def _publish(self, phase: str = "", error: str = "") -> None:
        self.count += 1
        self.signs.publish(self._beat(phase, error))

    def _judge(self, what: str) -> str:
        """Everything known about a fault, in one line."""
        pending = under_way()
        place = self._beat().where()
        missing = find_missing(self.signs, self._beat(), INTERVAL)
        inside = f" (collective: {'; '.join(pending)})" if pending else ""
        end_idle(missing, self.identity[0])
        return f"{missing.text}. Noticed by rank {self.rank} {place}: {what}{inside}"

    # --- the thread ---

    def _watch(self) -> None:
        while not self.finished.wait(INTERVAL):
            try:
                text = self._look_around()
            except (RuntimeError, dist.DistError) as error:
                text = f"the job's store is gone: the launcher of the first node was killed or lost ({error})"
            if text:
                self._leave(text)

    def _look_around(self) -> str:
        """Why the job cannot go on; empty if it can."""
        if self.parent is not None and os.getppid() != self.parent:
            return "the launcher (torchrun) of this machine is gone"
        if self.world == 1:
            return ""
        self._publish()
        verdict = self.signs.published_verdict()
        if verdict:
            return verdict
        waited = time.monotonic() - self.place.since
        if self.place.phase in LIMITED and waited > self.timeout + GRACE:
            return self.signs.verdict(self._judge(f"no progress for {waited:.0f} s"))
        if self._lost_neighbours() or self._lost_remote():
            return self.signs.verdict(self._judge("watching its neighbours"))
        if self.rank == 0:
            self._compare()
        return ""

    def _lost_neighbours(self) -> bool:
        beats = self.signs.read(self.neighbours)
        return any(
            beat.phase not in ENDED and beat.machine == self.identity[0] and not process_state(beat.pid)
            for beat in beats.values()
        )

    def _lost_remote(self) -> bool:
        if self.remote is None:
            return False
        beat = self.signs.read([self.remote]).get(self.remote)
        if beat is None or beat.phase in ENDED or beat.count != self.remote_seen[0]:
            self.remote_seen = (beat.count if beat else 0, time.monotonic())
        return time.monotonic() - self.remote_seen[1] > SILENT_SECONDS

    def _compare(self) -> None:
        if not self.totals:
            due = self.own.steps >= WARM_UP_STEPS
        else:
            due = self.own.steps - self.totals[0][
                "steps"
            ] >= STEPS_BETWEEN_REPORTS and time.monotonic() - self.compared >= max(4.0, self.world / 8)
        if not due:
            return
        beats = self.signs.read(range(self.world))
        if len(beats) < self.world or any(not beat.totals for beat in beats.values()):
            return
        now = [beats[rank].totals for rank in range(self.world)]
        if self.totals:
            self.comparison = compare(self.totals, now, self.ratio) or self.comparison
        self.totals, self.compared = now, time.monotonic()

    def _leave(self, text: str) -> None:
        with self.ending:
            if self.finished.is_set():
                return
            print(f"error: rank {self.rank}: {text}", file=sys.stderr, flush=True)
            for child in multiprocessing.active_children():  # a checkpoint's writers would outlive us
                child.kill()
            sys.stdout.flush()
            os._exit(PeerError.exit_code)
