"""Heartbeats: each rank publishes where it stands; survivors of a fault find out who is missing and where it was."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

ENDED = ("done", "failed")
"""Phases of a rank that has left the job."""


@dataclass(frozen=True)
class Heartbeat:
    """What one rank says about itself.

    Attributes:
        rank: its number in the job.
        count: heartbeats so far.
        phases: phases entered so far; a rank with fewer is behind.
        phase: what the training thread is doing.
        step: 1-based, as in the log.
        seconds: how long it has been in this phase.
        host: name of the machine.
        namespace: equal for processes that see each other in /proc.
        pid: process id in that namespace.
        error: why the rank failed, in phase "failed".
        timings: sums of its step times, see `stragglers.StepTimes`.
    """

    rank: int
    count: int
    phases: int
    phase: str
    step: int
    seconds: float
    host: str
    namespace: str
    pid: int
    error: str = ""
    timings: dict[str, float] = field(default_factory=dict)

    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def where(self) -> str:
        return f"in step {self.step}, phase {self.phase}, for {self.seconds:.1f} s"


def process_namespace() -> str:
    """Identity of the process namespace that /proc shows, until the machine starts anew."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def process_state(pid: int) -> str:
    """Linux' letter for a process of this machine (R, S, D, T, ...); empty when it is gone or only a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    state = text.rpartition(") ")[2][0]
    return "" if state in "ZX" else state


class HeartbeatStore:
    """The newest heartbeat of every rank, and why the job ends, in the job's key-value store."""

    def __init__(self, store: dist.Store, world_size: int) -> None:
        self.store, self.world_size = store, world_size

    def publish(self, heartbeat: Heartbeat) -> None:
        self.store.set(f"heartbeat/{heartbeat.rank}", json.dumps(asdict(heartbeat)))

    def read(self, ranks: Iterable[int]) -> dict[int, Heartbeat]:
        """Newest heartbeats of those of the ranks that ever published one."""
        known = [rank for rank in ranks if self.store.check([f"heartbeat/{rank}"])]
        if not known:
            return {}
        texts = self.store.multi_get([f"heartbeat/{rank}" for rank in known])
        return {rank: Heartbeat(**json.loads(text)) for rank, text in zip(known, texts, strict=True)}

    def publish_failure(self, reason: str) -> str:
        """Publish why the job ends; the first rank's reason counts and is returned to all."""
        return self.store.compare_set("failure_reason", "", reason).decode()

    def failure_reason(self) -> str:
        """Why the job ends; empty while it does not."""
        return self.store.get("failure_reason").decode() if self.store.check(["failure_reason"]) else ""


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with other ranks, in words, and those of them that are there but do not respond."""

    text: str
    unresponsive: tuple[Heartbeat, ...] = ()


def diagnose(heartbeats: HeartbeatStore, own: Heartbeat, interval: float) -> Diagnosis:
    """Find out who is gone, stopped, silent, ended or behind; waits about a second when /proc does not tell.

    Args:
        heartbeats: of the whole job.
        own: this rank's.
        interval: seconds between two heartbeats of a healthy rank.
    """
    others = [rank for rank in range(heartbeats.world_size) if rank != own.rank]
    before = heartbeats.read(others)
    found = [f"rank {rank} never sent a heartbeat" for rank in others if rank not in before]
    found += [text for beat in before.values() if (text := _visible_problem(beat, own.namespace))]
    if found:
        stopped = tuple(b for b in before.values() if b.namespace == own.namespace and _stopped(b.pid))
        return Diagnosis("; ".join(found), stopped)
    time.sleep(2 * interval + 0.2)
    now = heartbeats.read(others)
    silent = tuple(beat for rank, beat in now.items() if beat.count == before[rank].count)
    if silent:
        text = "; ".join(f"no heartbeat from {beat.name()}, last seen {beat.where()}" for beat in silent)
        return Diagnosis(text, silent)
    behind = [beat for beat in now.values() if beat.phases < own.phases]
    if behind:
        fewest = min(beat.phases for beat in behind)
        return Diagnosis("; ".join(f"{b.name()} is behind, {b.where()}" for b in behind if b.phases == fewest))
    return Diagnosis("all ranks are alive and none is behind")


def kill_unresponsive(diagnosis: Diagnosis, namespace: str) -> None:
    """Kill the ranks of this machine that cannot react to torchrun's SIGTERM: it would wait 30 s for them."""
    for beat in diagnosis.unresponsive:
        if beat.namespace == namespace and process_state(beat.pid):
            os.kill(beat.pid, signal.SIGKILL)


def _stopped(pid: int) -> bool:
    return process_state(pid) in ("T", "t")


def _visible_problem(beat: Heartbeat, namespace: str) -> str:
    """What is wrong with a rank, as far as its last heartbeat and /proc tell; empty if nothing is."""
    if beat.phase == "failed":
        return f"{beat.name()} ended in step {beat.step}: {beat.error}"
    if beat.phase == "done":
        return f"{beat.name()} has already left the job"
    if beat.namespace != namespace:
        return ""
    if not process_state(beat.pid):
        return f"{beat.name()} is gone: it was killed, or crashed without a message; last seen {beat.where()}"
    if _stopped(beat.pid):
        return f"{beat.name()} is stopped by a signal; last seen {beat.where()}"
    return ""
