"""Whether this start is torchrun's own restart of a job that already worked in this folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

EVENTS = "events.jsonl"


def job_id() -> str:
    """torchrun's name for the job, kept over its restarts; empty without torchrun or when it was given none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def is_restart(folder: Path) -> bool:
    """True when the newest start in the run's folder belongs to the same torchrun job: it then resumes by itself.

    A restart count above zero would not do: a first attempt that was refused because the folder holds another
    run must be refused again.
    """
    path, name = folder / EVENTS, job_id()
    if not name or not path.is_file():
        return False
    starts = [
        line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith('{"event": "start"')
    ]
    for line in reversed(starts):
        try:
            return bool(json.loads(line).get("job") == name)
        except ValueError:  # cut by a crash
            continue
    return False
