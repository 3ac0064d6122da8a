"""Ends a job that cannot go on, within seconds and with a message that says who is missing and where.

A thread publishes this rank's heartbeat in the job's store twice a second and looks after the processes beside it. No
collective is added to the step. A dead process of this machine is seen in /proc within half a second, and a failure
reason of any rank reaches all others through the store in the same time. A rank that hangs is found when a collective's
timeout (`parallel.timeout_seconds`, on every group) runs out, or two seconds later by this thread where the
training thread cannot report it. torchrun then restarts the job if it was asked to (`--max-restarts`).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ParamSpec, TypeVar

import torch.distributed as dist

from lcl_mcore.config.schema import RunConfig
from lcl_mcore.distributed.context import Context
from lcl_mcore.distributed.flight_recorder import is_communication_error, pending_collectives
from lcl_mcore.errors import LclError, PeerError
from lcl_mcore.fault_tolerance.heartbeat import (
    ENDED,
    Heartbeat,
    HeartbeatStore,
    diagnose,
    kill_unresponsive,
    process_namespace,
    process_state,
)
from lcl_mcore.fault_tolerance.stragglers import StepTimes, StragglerDetector
from lcl_mcore.terminal import say

HEARTBEAT_SECONDS = 0.5
GRACE_SECONDS = 2.0
LOST_SECONDS = 30.0
"""A rank of another machine without a heartbeat for so long is lost."""
LIMITED_PHASES = ("data", "step")
"""Phases that end within the collectives' timeout, or never."""

STORE_GONE = "the job's store is gone: the launcher (torchrun) of the first node was killed or lost"

_P = ParamSpec("_P")
_T = TypeVar("_T")


def explained(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """For methods of an object with a `watchdog`: an error is published to the other ranks, or explained by them."""

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
class Phase:
    """What the training thread is doing.

    Attributes:
        count: phases entered so far.
        name: "start", "data", "step", "save", "evaluate" or "restore".
        step: 1-based, as in the log.
        since: monotonic seconds.
    """

    count: int
    name: str
    step: int
    since: float


class Watchdog:
    """One per rank, made once the process group exists. `close` it, or let it `explain` why the rank ends.

    Attributes:
        stragglers: observes this rank's steps; on rank 0 it knows the slowest rank.
    """

    def __init__(self, config: RunConfig, context: Context) -> None:
        self.rank, self.world_size = context.rank, context.world_size
        self.timeout = config.parallel.timeout_seconds
        self.stragglers = StragglerDetector(config.faults.straggler_ratio)
        self.phase = Phase(0, "start", 0, time.monotonic())
        store: dist.Store = context.store.clone()  # type: ignore[attr-defined]  # a connection of its own
        self.heartbeats = HeartbeatStore(store, self.world_size)
        self.namespace = process_namespace()
        self.count = 0
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        first = self.rank - int(os.environ.get("LOCAL_RANK", "0"))
        self.neighbours = [r for r in range(first, first + local) if r != self.rank and r < self.world_size]
        # One process of each machine watches one of the next.
        self.remote = (first + local) % self.world_size if self.rank == first and local < self.world_size else None
        self.remote_seen = (0, time.monotonic())
        self.ending = threading.Lock()
        self.finished = threading.Event()
        if self.world_size > 1:
            self._publish()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def set_phase(self, name: str, step: int) -> None:
        """The training thread enters a phase of (0-based) `step`."""
        self.phase = Phase(self.phase.count + 1, name, step + 1, time.monotonic())

    def close(self) -> None:
        """This rank leaves because its work is done."""
        self._end("done", "")
        self.thread.join()  # a thread inside the store's C++ code must not meet the end of the interpreter

    def explain(self, error: Exception) -> PeerError | None:
        """This rank leaves with an error.

        Returns:
            What to report instead when the error only says that some other rank did not answer.
        """
        if self.world_size == 1 or not is_communication_error(error):
            first_line = str(error).strip().splitlines()[0][:300] if str(error) else ""
            reason = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
            self._end("failed", reason, publish_failure=not isinstance(error, LclError))
            return None
        with self.ending:  # from here on the thread leaves the message to us
            self.finished.set()
        try:
            text = self.heartbeats.failure_reason() or self._fail("a collective failed")
            self._publish("failed", "stopped because of another rank")
        except (RuntimeError, dist.DistError):
            text = STORE_GONE
        return PeerError(text + f" [here: {str(error).strip().splitlines()[-1][:200]}]")

    def _end(self, phase: str, reason: str, publish_failure: bool = False) -> None:
        with self.ending:
            self.finished.set()
        if self.world_size > 1:
            try:
                self._publish(phase, reason)
                if publish_failure:
                    self.heartbeats.publish_failure(f"rank {self.rank} ended in step {self.phase.step}: {reason}")
            except (RuntimeError, dist.DistError) as error:
                say(f"the job's store could not be reached: {error}", error=True)

    def _heartbeat(self, phase: str = "", error: str = "") -> Heartbeat:
        now = self.phase
        return Heartbeat(
            rank=self.rank,
            count=self.count,
            phases=now.count,
            phase=phase or now.name,
            step=now.step,
            seconds=time.monotonic() - now.since,
            host=os.uname().nodename,
            namespace=self.namespace,
            pid=os.getpid(),
            error=error,
            timings=asdict(self.stragglers.times),
        )

    def _publish(self, phase: str = "", error: str = "") -> None:
        self.count += 1
        self.heartbeats.publish(self._heartbeat(phase, error))

    def _fail(self, what: str) -> str:
        """Put everything known about a fault into one line, and publish it as the reason why the job ends.

        Returns:
            The reason that counts: the first one that any rank published.
        """
        pending = pending_collectives()
        where = self._heartbeat().where()
        diagnosis = diagnose(self.heartbeats, self._heartbeat(), HEARTBEAT_SECONDS)
        inside = f" (collective: {'; '.join(pending)})" if pending else ""
        kill_unresponsive(diagnosis, self.namespace)
        return self.heartbeats.publish_failure(f"{diagnosis.text}. Noticed by rank {self.rank} {where}: {what}{inside}")

    # --- the thread ---

    def _watch(self) -> None:
        while not self.finished.wait(HEARTBEAT_SECONDS):
            try:
                reason = self._check()
            except (RuntimeError, dist.DistError) as error:
                reason = f"{STORE_GONE} ({error})"
            if reason:
                self._abort(reason)

    def _check(self) -> str:
        """Why the job cannot go on; empty if it can."""
        if self.parent is not None and os.getppid() != self.parent:
            return "the launcher (torchrun) of this machine is gone"
        if self.world_size == 1:
            return ""
        self._publish()
        if reason := self.heartbeats.failure_reason():
            return reason
        waited = time.monotonic() - self.phase.since
        if self.phase.name in LIMITED_PHASES and waited > self.timeout + GRACE_SECONDS:
            return self._fail(f"no progress for {waited:.0f} s")
        if self._lost_neighbours() or self._lost_remote():
            return self._fail("watching its neighbours")
        if self.rank == 0 and self.stragglers.due(self.world_size):
            self._compare_ranks()
        return ""

    def _lost_neighbours(self) -> bool:
        beats = self.heartbeats.read(self.neighbours)
        return any(
            beat.phase not in ENDED and beat.namespace == self.namespace and not process_state(beat.pid)
            for beat in beats.values()
        )

    def _lost_remote(self) -> bool:
        if self.remote is None:
            return False
        beat = self.heartbeats.read([self.remote]).get(self.remote)
        if beat is None or beat.phase in ENDED or beat.count != self.remote_seen[0]:
            self.remote_seen = (beat.count if beat else 0, time.monotonic())
        return time.monotonic() - self.remote_seen[1] > LOST_SECONDS

    def _compare_ranks(self) -> None:
        beats = self.heartbeats.read(range(self.world_size))
        if len(beats) == self.world_size:
            ranks = range(self.world_size)
            self.stragglers.compare([StepTimes(**beats[rank].timings) for rank in ranks])  # type: ignore[arg-type]

    def _abort(self, reason: str) -> None:
        with self.ending:
            if self.finished.is_set():
                return
            say(f"error: rank {self.rank}: {reason}", error=True)
            for child in multiprocessing.active_children():  # a checkpoint's writers would outlive us
                child.kill()
            os._exit(PeerError.exit_code)
