"""Interrupted runs continue with exactly the numbers of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import torchrun
from lcl_mcore.checkpoint.store import complete_checkpoints, read_state, verify
from runs import ROOT, assert_same_run, records

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
Arguments = Callable[..., list[str]]


def start(count: int, arguments: list[str]) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str], limit: float = 90) -> None:
    """Until the metrics file has this step."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        file = out / "metrics.jsonl"
        if file.is_file() and len(file.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {limit} s")


def wait_for_file(path: Path, process: subprocess.Popen[str], limit: float = 90) -> None:
    end = time.monotonic() + limit
    while not path.is_file():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < end, f"{path} was not there in {limit} s"
        time.sleep(0.005)


def worker_pids(out: Path) -> list[int]:
    """Training processes of this run, the launcher left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            words = [word.decode() for word in command]
            if str(out) in words and "tools/pretrain_lcl.py" in words and "--nproc-per-node" not in words:
                found.append(int(entry.name))
    return sorted(found)


@pytest.mark.timeout(240)
def test_sigkill_of_everything_then_resume(arguments: Arguments, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start(2, arguments(out, "--steps", "20"))
    wait_for_file(out / "checkpoints" / "step-00000003" / "manifest.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in worker_pids(out):
        os.kill(pid, signal.SIGKILL)
    process.wait(30)
    newest = complete_checkpoints(out / "checkpoints")[-1]
    done = torchrun(2, *arguments(out, "--steps", "20", "--resume"))
    assert f"resume: {newest}, {int(newest.name[-8:])} steps done" in done.stdout
    assert_same_run(undisturbed, out)


@pytest.mark.timeout(240)
def test_sigterm_to_one_rank_saves_and_exits_cleanly(
    arguments: Arguments, undisturbed: Path, tmp_path: Path
) -> None:
    """What the script and its launcher answer; `test_faults` continues such runs."""
    out = tmp_path / "stopped"
    process = start(2, arguments(out, "--steps", "20", "--checkpoint-every", "0"))
    wait_for_step(out, 2, process)
    os.kill(worker_pids(out)[-1], signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert "stopped by request" in output
    whole, part = records(undisturbed), records(out)
    assert 2 <= len(part) < 20
    assert all(record["loss"] == whole[step]["loss"] for step, record in part.items())
    newest = out / "checkpoints" / f"step-{len(part):08d}"
    assert verify(newest) == []
    assert read_state(newest).step == len(part)
