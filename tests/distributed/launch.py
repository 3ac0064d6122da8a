"""Starts several gloo processes under torchrun and returns what rank 0 reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def torchrun(
    count: int, *arguments: str, timeout: float = 240, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a script of this repository on `count` processes of this machine."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr[-6000:]}"
        )
    return done


def run_worker(name: str, count: int, *arguments: str, timeout: float = 240) -> Any:
    """Run `tests/distributed/NAME.py`; its last line on rank 0 is JSON."""
    done = torchrun(count, f"tests/distributed/{name}.py", *arguments, timeout=timeout)
    return json.loads(done.stdout.strip().splitlines()[-1])
