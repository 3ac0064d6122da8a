"""`events.jsonl` in a run's folder: starts, faults and the account of time, over all attempts of the run.

Imports nothing heavy: the command reads it first of all.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lcl_mcore.distributed.launcher import job_id
from lcl_mcore.json_lines import LineWriter, Record, number, read_records
from lcl_mcore.terminal import say

EVENTS = "events.jsonl"
ACCOUNT = ("productive", "data", "checkpoint", "recomputed", "restart", "wall")
"""Seconds that every tick and end of an attempt accounts for."""

# What runs of earlier versions wrote -> what it is called now. Applied where events are read.
RENAMED_FIELDS = {"redone": "recomputed", "own": "compute", "read": "data"}
RENAMED_VALUES = {("event", "leave-out"): "skip", ("kind", "own"): "compute", ("kind", "read"): "data"}


class EventLog:
    """Appends to the event file on rank 0. Other ranks have one with `enabled=False`, which writes nothing."""

    def __init__(self, folder: Path, enabled: bool) -> None:
        self.folder, self.enabled = folder, enabled
        self.lines = LineWriter(folder / EVENTS, say)

    def record(self, name: str, *, moment: float | None = None, durable: bool = True, **fields: Any) -> None:
        """Append an event.

        Args:
            name: what happened.
            moment: when, in Unix seconds [now].
            durable: whether the line is on disk when this returns.
            fields: plain JSON values.
        """
        if not self.enabled:
            return
        moment = time.time() if moment is None else moment
        self.lines.write({"event": name, "time": round(moment, 3), **fields}, durable=durable)


def read_events(folder: Path) -> list[Record]:
    """All events of a run, oldest first, in today's words; damaged lines are skipped."""
    events = []
    for event in read_records(folder / EVENTS, _is_event).records:
        renamed = {RENAMED_FIELDS.get(k, k): _renamed_value(k, v) for k, v in event.items()}
        if _is_whole(renamed):
            events.append(renamed)
    return events


def _is_event(record: Record) -> bool:
    return isinstance(record.get("event"), str) and number(record, "time")


def _is_whole(event: Record) -> bool:
    """Whether an event has what those of its name always have."""
    match event["event"]:
        case "tick" | "end":
            return all(number(event, name) for name in ACCOUNT)
        case "skip":
            return _is_range(event.get("batches"))
    return True


def _is_range(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
        and 0 <= value[0] <= value[1]
    )


def _renamed_value(field: str, value: Any) -> Any:
    return RENAMED_VALUES.get((field, value), value) if isinstance(value, str) else value


def is_restart(folder: Path) -> bool:
    """Whether this start is torchrun's own restart of a job that already worked in this folder: it resumes by itself.

    The newest start in the folder must belong to the same torchrun job. A restart count above zero would not
    do: a first attempt that was refused because the folder holds another run must be refused again.
    """
    name = job_id()
    if not name:
        return False
    starts = [event for event in read_events(folder) if event["event"] == "start"]
    return bool(starts) and starts[-1].get("job") == name
