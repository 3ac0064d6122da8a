"""What only informs cannot end a run; what must end it saves first, as Ctrl-C does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import run_script, torchrun
from lcl_mcore.checkpoint.store import complete_checkpoints, read_state
from lcl_mcore.fault_tolerance.events import read_events
from training_runs import ROOT, assert_same_run, records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Arguments = Callable[..., list[str]]
TOLD = "interrupted: training stops after this step with a checkpoint; Ctrl-C again quits at once"


def newest_step(out: Path) -> int:
    return read_state(complete_checkpoints(out / "checkpoints")[-1]).step


def test_a_run_whose_every_side_file_fails(arguments: Arguments, tmp_path: Path) -> None:
    """Directories, a pipe and a file in the way: a warning each, and the run is complete."""
    out = tmp_path / "run"
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        (out / name).mkdir(parents=True)
    os.mkfifo(out / "events.jsonl")
    (out / "tensorboard").write_text("")
    done = run_script(*arguments(out, "--steps", "4", "log.tensorboard=true", "optim.warmup_steps=1"))
    assert done.returncode == 0, done.stderr
    warnings = sorted(line for line in done.stdout.splitlines() if line.startswith("WARNING"))
    assert [line.split(" cannot be written")[0] for line in warnings] == [
        f"WARNING {out}/events.jsonl",
        f"WARNING {out}/metrics.jsonl",
        f"WARNING {out}/metrics.jsonl: its last 4 lines could not be written",
        f"WARNING {out}/tensorboard",
    ]
    assert newest_step(out) == 4


def test_metrics_and_events_that_are_damaged(arguments: Arguments, tmp_path: Path) -> None:
    """Damaged lines are skipped and stay; the run goes on behind them."""
    out = tmp_path / "run"
    assert run_script(*arguments(out, "--steps", "3")).returncode == 0
    bad = b"{}\n3\nnull\n\xff\n" + b"[" * 100_000 + b'\n{"step": "x"}\n{"event": 1, "time": NaN}\n{"st'
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(out / name, "ab") as file:
            file.write(bad)
    done = run_script(*arguments(out, "--steps", "5", "--resume"))
    assert done.returncode == 0, done.stderr
    assert (out / "metrics.jsonl").read_bytes().count(bad) == 1
    assert [event["event"] for event in read_events(out)].count("start") == 2
    assert newest_step(out) == 5


def test_a_terminal_on_a_full_disk(arguments: Arguments, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *arguments(out, "--steps", "3")],
            cwd=ROOT,
            stdout=full,
            stderr=full,
            timeout=200,
            check=False,
        )
    assert done.returncode == 0
    assert sorted(records(out)) == [1, 2, 3]
    assert newest_step(out) == 3


def spoil(dataset: Path, copy: Path) -> None:
    """A copy in which one document's text is not JSON any more."""
    shutil.copytree(dataset, copy)
    shard = max(copy.glob("*.tar"))
    with tarfile.open(shard) as tar:
        member = [m for m in tar if m.name.endswith(".json")][-1]
    with open(shard, "r+b") as file:
        file.seek(member.offset_data)
        file.write(b"\0" * 8)


@pytest.mark.distributed
def test_data_that_cannot_be_read_end_a_run_with_a_checkpoint(
    arguments: Arguments, undisturbed: Path, tmp_path: Path
) -> None:
    """One rank of two cannot read step 12: both save step 11, and the repaired run goes on bitwise."""
    out, plan = tmp_path / "run", tmp_path / "plan.json"
    plan.write_text(json.dumps([{"kind": "unreadable", "rank": 1, "step": 12}]))
    flags = arguments(out, "--steps", "20")
    done = torchrun(2, "tests/training/faults_worker.py", str(plan), *flags[1:], check=False)
    assert done.returncode == 2
    assert sorted(re.findall(r"^error: .*", done.stderr, re.MULTILINE)) == [
        "error: reading stopped. data-parallel rank 1: shard-007.tar: is damaged. Copy it again.",
        "error: shard-007.tar: is damaged. Copy it again.",
    ]
    assert (newest_step(out), max(records(out))) == (11, 11)
    torchrun(2, *flags, "--resume")
    assert_same_run(undisturbed, out)


@pytest.mark.distributed
def test_held_out_data_that_cannot_be_read_end_nothing(arguments: Arguments, corpus: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "run", tmp_path / "heldout"
    spoil(corpus / "pairs", data)
    done = torchrun(
        2, *arguments(out, "--steps", "4", "optim.warmup_steps=1", "evaluation.every=2", f"evaluation.data={data}")
    )
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert [line.partition(",")[0] for line in warnings] == [
        f"WARNING evaluation after step {step} skipped" for step in (2, 4)
    ]
    assert str(data) in warnings[0]
    assert newest_step(out) == 4


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(arguments: Arguments, tmp_path: Path, times: int) -> None:
    """Once: the step ends, a checkpoint is written, exit code 0. Twice: at once, and the checkpoints stay whole."""
    out, plan = tmp_path / "run", tmp_path / "plan.json"
    plan.write_text('[{"kind": "sleep", "delay": 2}]')  # so that the second one comes before the step's end
    flags = arguments(out, "--steps", "100000", "--checkpoint-every", "1")[1:]
    command = [sys.executable, "tests/training/faults_worker.py", str(plan), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        rest = interrupt(process, times)
    finally:
        process.kill()
    if times == 1:
        assert process.returncode == 0, rest
        assert TOLD in rest
        assert f"stopped by request after step {newest_step(out)}; continue with --resume" in rest
    else:
        assert process.returncode == 130
        assert newest_step(out) >= 1


def interrupt(process: subprocess.Popen[str], times: int) -> str:
    """Send Ctrl-C once a checkpoint is complete, again once the first was answered; the rest of what is printed."""
    assert process.stdout is not None
    while " complete after " not in (line := process.stdout.readline()):
        assert line, "the run ended"
    for number in range(times):
        process.send_signal(signal.SIGINT)
        while number + 1 < times and TOLD not in (line := process.stdout.readline()):
            assert line, "the run ended"
    return process.communicate(timeout=60)[0]
