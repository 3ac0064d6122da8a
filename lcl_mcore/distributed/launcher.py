"""What the launcher tells a process about its job. Needs the standard library alone."""

from __future__ import annotations

import os


def job_id() -> str:
    """torchrun's name for the job, kept over its restarts; empty without torchrun or when it was given none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name
