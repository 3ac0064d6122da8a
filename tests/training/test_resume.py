"""Interrupted runs continue with exactly the numbers of an undisturbed one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import Job, torchrun
from lcl_mcore.checkpoint.store import complete_checkpoints, read_state, verify
from training_runs import assert_same_run, records

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
Arguments = Callable[..., list[str]]


def wait_for(condition: Callable[[], bool], job: Job, limit: float = 90) -> None:
    """Until something is there that the running job makes."""
    end = time.monotonic() + limit
    while not condition():
        assert job.poll() is None, job.stdout + job.stderr
        assert time.monotonic() < end, f"not there in {limit} s: {job.stdout}"
        time.sleep(0.005)


@pytest.mark.timeout(240)
def test_sigkill_of_everything_then_resume(arguments: Arguments, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    with Job(2, *arguments(out, "--steps", "20")) as job:
        wait_for((out / "checkpoints" / "step-00000003" / "manifest.json").is_file, job)
        for pid in job.pids:
            os.kill(pid, signal.SIGKILL)
        assert job.wait(30) == -signal.SIGKILL
    newest = complete_checkpoints(out / "checkpoints")[-1]
    done = torchrun(2, *arguments(out, "--steps", "20", "--resume"))
    assert f"resume: {newest}, {int(newest.name[-8:])} steps done" in done.stdout
    assert_same_run(undisturbed, out)


@pytest.mark.timeout(240)
def test_sigterm_to_one_rank_saves_and_exits_cleanly(arguments: Arguments, undisturbed: Path, tmp_path: Path) -> None:
    """What the script answers; `test_faults` continues such runs."""
    out = tmp_path / "stopped"

    def two_steps() -> bool:
        file = out / "metrics.jsonl"
        return file.is_file() and len(file.read_text().splitlines()) >= 2

    with Job(2, *arguments(out, "--steps", "20", "--checkpoint-every", "0")) as job:
        wait_for(two_steps, job)
        os.kill(job.pids[1], signal.SIGTERM)
        assert job.wait(90) == 0, job.stdout + job.stderr
        assert "stopped by request" in job.stdout
    whole, part = records(undisturbed), records(out)
    assert 2 <= len(part) < 20
    assert all(record["loss"] == whole[step]["loss"] for step, record in part.items())
    newest = out / "checkpoints" / f"step-{len(part):08d}"
    assert verify(newest) == []
    assert read_state(newest).step == len(part)
