"""`events.jsonl` in a run's folder: starts, faults and the account of time, over all attempts of the run.

Needs the standard library alone: the command reads it before anything heavy is imported.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from lcl_mcore.distributed.launcher import job_id

EVENTS = "events.jsonl"

# What runs of earlier versions wrote -> what it is called now. Applied where events are read.
RENAMED_FIELDS = {"redone": "recomputed", "own": "compute", "read": "data"}
RENAMED_VALUES = {("event", "leave-out"): "skip", ("kind", "own"): "compute", ("kind", "read"): "data"}


class EventLog:
    """Appends to the event file on rank 0. Other ranks have one with `enabled=False`, which writes nothing."""

    def __init__(self, folder: Path, enabled: bool) -> None:
        self.folder, self.enabled = folder, enabled
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            _end_last_line(folder / EVENTS)

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
        with open(self.folder / EVENTS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": name, "time": round(moment, 3), **fields}) + "\n")
            if durable:
                file.flush()
                os.fsync(file.fileno())


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first, in today's words; lines cut by a crash are skipped."""
    path, events = folder / EVENTS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        events.append({RENAMED_FIELDS.get(k, k): _renamed_value(k, v) for k, v in event.items()})
    return events


def _renamed_value(field: str, value: Any) -> Any:
    return RENAMED_VALUES.get((field, value), value) if isinstance(value, str) else value


def _end_last_line(path: Path) -> None:
    """A crash may have cut the last line: what follows begins a new one."""
    if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


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
