"""Heartbeats: each rank publishes where it stands; survivors of a fault say who is missing and where it was."""

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


@dataclass(frozen=True)
class Heartbeat:
    """One sign of life of one rank."""

    rank: int
    count: int  # signs of life so far
    marks: int  # phases entered so far: who has fewer is behind
    phase: str
    step: int  # 1-based, as in the log
    seconds: float  # in this phase
    host: str
    machine: str  # equal for processes that can see each other in /proc
    pid: int
    error: str = ""
    totals: dict[str, float] = field(default_factory=dict)

    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def where(self) -> str:
        return f"in step {self.step}, phase {self.phase}, for {self.seconds:.1f} s"


def machine() -> str:
    """Identity of the process namespace that /proc shows."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def process_state(pid: int) -> str:
    """Linux' letter for a process of this machine (R, S, D, T, ...); empty when it is gone or only a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    state = text.rpartition(") ")[2][0]
    return "" if state in "ZX" else state


class HeartbeatStore:
    """The signs of life of all ranks, in the job's store."""

    def __init__(self, store: dist.Store, world: int) -> None:
        self.store, self.world = store, world

    def publish(self, beat: Heartbeat) -> None:
        self.store.set(f"beat/{beat.rank}", json.dumps(asdict(beat)))

    def read(self, ranks: Iterable[int]) -> dict[int, Heartbeat]:
        """Newest signs of the ranks that ever gave one."""
        known = [rank for rank in ranks if self.store.check([f"beat/{rank}"])]
        if not known:
            return {}
        texts = self.store.multi_get([f"beat/{rank}" for rank in known])
        return {rank: Heartbeat(**json.loads(text)) for rank, text in zip(known, texts, strict=True)}

    def verdict(self, text: str) -> str:
        """Publish why the job ends; the first rank's text counts and is returned to all."""
        return self.store.compare_set("verdict", "", text).decode()

    def published_verdict(self) -> str:
        return self.store.get("verdict").decode() if self.store.check(["verdict"]) else ""


@dataclass(frozen=True)
class Missing:
    """What is wrong with other ranks, in words, and those of them that are there but do nothing."""

    text: str
    idle: tuple[Heartbeat, ...] = ()


def find_missing(signs: HeartbeatStore, own: Heartbeat, interval: float) -> Missing:
    """Who is gone, stopped, silent, ended or behind; waits about a second when /proc does not tell.

    `own` is this rank's place, and `interval` the seconds between two signs of life of a healthy rank.
    """
    others = [rank for rank in range(signs.world) if rank != own.rank]
    before = signs.read(others)
    found = [f"rank {rank} never gave a sign of life" for rank in others if rank not in before]
    found += [text for beat in before.values() if (text := _seen_from_here(beat, own.machine))]
    if found:
        stopped = tuple(b for b in before.values() if b.machine == own.machine and _stopped(b.pid))
        return Missing("; ".join(found), stopped)
    time.sleep(2 * interval + 0.2)
    now = signs.read(others)
    silent = tuple(beat for rank, beat in now.items() if beat.count == before[rank].count)
    if silent:
        text = "; ".join(f"no sign of life from {beat.name()}, last seen {beat.where()}" for beat in silent)
        return Missing(text, silent)
    behind = [beat for beat in now.values() if beat.marks < own.marks]
    if behind:
        least = min(beat.marks for beat in behind)
        return Missing("; ".join(f"{b.name()} is behind, {b.where()}" for b in behind if b.marks == least))
    return Missing("all ranks are alive and none is behind")


def end_idle(missing: Missing, here: str) -> None:
    """Kill the ranks of this machine that cannot react to torchrun's SIGTERM: it would wait 30 s for them."""
    for beat in missing.idle:
        if beat.machine == here and process_state(beat.pid):
            os.kill(beat.pid, signal.SIGKILL)


def _stopped(pid: int) -> bool:
    return process_state(pid) in ("T", "t")


def _seen_from_here(beat: Heartbeat, here: str) -> str:
    """What is wrong with a rank, as far as its last sign and /proc tell; empty if nothing is."""
    if beat.phase == "failed":
        return f"{beat.name()} ended in step {beat.step}: {beat.error}"
    if beat.phase == "done":
        return f"{beat.name()} has already left the job"
    if beat.machine != here:
        return ""
    if not process_state(beat.pid):
        return f"{beat.name()} is gone: it was killed, or crashed without a message; last seen {beat.where()}"
    if _stopped(beat.pid):
        return f"{beat.name()} is stopped by a signal; last seen {beat.where()}"
    return ""
