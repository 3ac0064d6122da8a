"""A NaN on one rank stops the run before any rank's update, naming step and rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launch import torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.timeout(200)
def test_nan_on_one_rank(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    command = arguments(tmp_path / "run", "--micro-batch-size", "2")[1:]
    done = torchrun(2, "tests/training/nan_worker.py", *command, check=False)
    assert done.returncode != 0
    assert "rank 0 unchanged True" in done.stdout
    assert "rank 1 unchanged True" in done.stdout
    assert "error: step 3: gradient norm nan" in done.stderr
    assert "what rank 1 computed is NaN or Inf" in done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
