"""Lines for the person watching. The terminal, or the file in its place, is optional: when it fails, work goes on."""

from __future__ import annotations

import contextlib
import sys


def say(text: str, *, error: bool = False) -> None:
    """Print a line to standard output, or standard error; a full disk or a reader that is gone stops nothing."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr if error else sys.stdout, flush=True)
