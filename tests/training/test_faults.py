"""Faults that happen for real: signals and kills at any moment, a rank that hangs, one that is slow, a lost node."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import torchrun
from lcl_mcore.checkpoint.store import complete_checkpoints, read_state
from lcl_mcore.fault_tolerance.events import read_events
from training_runs import ROOT, assert_same_run, records

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
Arguments = Callable[..., list[str]]
WORKER = "tests/training/faults_worker.py"
STEPS = "20"


def launch(
    count: int, plan: list[dict[str, Any]], folder: Path, arguments: list[str], *elastic: str, timeout: float = 580
) -> subprocess.CompletedProcess[str]:
    """The training script under torchrun, with the faults of the plan injected."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        *elastic,
        WORKER,
        str(path),
        *arguments[1:],
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def random_kills(seed: int, count: int, steps: int, ranks: int) -> list[dict[str, Any]]:
    """One SIGKILL per attempt, at rising steps, in any phase and at any moment of it."""
    draw = random.Random(seed)
    killed = sorted(draw.sample(range(2, steps), count))
    return [
        {
            "kind": "signal",
            "signal": "SIGKILL",
            "attempt": attempt,
            "step": step,
            "rank": draw.randrange(ranks),
            "phase": draw.choice(("data", "step", "step")),
            "delay": draw.choice((0.0, 0.01, 0.05, 0.3)),
        }
        for attempt, step in enumerate(killed)
    ]


@pytest.mark.timeout(600)
def test_five_kills_with_restarts_by_torchrun(arguments: Arguments, undisturbed: Path, tmp_path: Path) -> None:
    """Plain torchrun --max-restarts: nobody passes --resume or sets a variable. One kill falls into a save."""
    plan = random_kills(seed=5, count=4, steps=18, ranks=2)
    plan.append({"kind": "writer", "attempt": 4, "rank": 1, "step": 18})  # its part is written, not verified
    out = tmp_path / "run"
    done = launch(2, plan, tmp_path, arguments(out, "--steps", STEPS), "--max-restarts", "5")
    assert done.returncode == 0, done.stderr[-4000:]
    starts = [e for e in read_events(out) if e["event"] == "start"]
    assert done.stdout.count("INJECTED FAULT") == 5
    assert len(starts) == 6
    for kill, start in zip(plan, starts[1:], strict=True):  # no step is lost beyond the last complete checkpoint
        # Saves are asynchronous: the newest may not have been complete, the one before was.
        assert start["step"] >= 3 * ((kill["step"] - 1) // 3) - 3, (kill, start)
    assert starts[-1]["step"] == 15  # the newest that all ranks had completed, and the message says so
    assert "step-00000015, 15 steps done" in done.stdout
    assert len(re.findall(r"error: (?:rank \d: )?rank \d \(.*\) is gone: it was killed", done.stderr)) >= 4
    assert_same_run(undisturbed, out)
    end = read_events(out)[-1]
    assert end["event"] == "end"
    assert "in 6 attempts" in done.stdout
    assert 0 < records(out)[20]["ettr"] < 1


@pytest.mark.timeout(400)
def test_stop_signals_in_every_phase(arguments: Arguments, corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    """To one rank while it waits for data, saves, evaluates and trains: nothing is lost, and the run ends in order.

    And in the first round one rank of two cannot write its part of a checkpoint: no rank takes it for complete.
    """
    out, plan = tmp_path / "run", tmp_path / "rounds.json"
    injected = (
        ("SIGTERM", "data", 8, 1),
        ("SIGUSR2", "save", 12, 0),
        ("SIGTERM", "evaluate", 15, 1),
        ("SIGTERM", "step", 18, 1),
    )
    rounds: list[list[dict[str, Any]]] = [
        [{"kind": "signal", "signal": name, "rank": rank, "step": step, "phase": phase, "delay": 0.05}]
        for name, phase, step, rank in injected
    ]
    # The data of step 8 come late, so that the ranks wait for them.
    rounds[0] += [{"kind": "read", "rank": 1, "step": 8, "delay": 1.5}, {"kind": "disk", "rank": 1, "step": 6}]
    plan.write_text(json.dumps(rounds))
    flags = arguments(
        out,
        "--steps",
        STEPS,
        "checkpoint.keep=99",
        "evaluation.every=5",
        "evaluation.limit=60",
        f"evaluation.data={corpus / 'pairs'}",
    )
    done = torchrun(2, "tests/training/stops_worker.py", str(plan), *flags[1:], timeout=380)
    report = json.loads(done.stdout.strip().splitlines()[-1])
    left, right = records(undisturbed), records(out)
    saved = [int(path.name[-8:]) for path in complete_checkpoints(out / "checkpoints")]
    assert 6 not in saved
    for (_, _, step, _), seen in zip(injected, report, strict=True):
        stopped = [line for line in seen["lines"] if "stopped by request" in line]
        assert len(stopped) == 1
        last = int(re.findall(r"after step (\d+)", stopped[0])[0])
        assert step <= last <= step + 2
        assert last in saved  # every step is in the checkpoint of the moment
        assert seen["saves"][0] == seen["saves"][1]  # both ranks agree on how every save ended
    assert read_state(complete_checkpoints(out / "checkpoints")[-1]).step == len(right)
    assert any("evaluation after step 15 cut short by a stop request" in line for line in report[2]["lines"])
    ((step, problem),) = [save for save in report[0]["saves"][0] if save[1]]
    assert step == 6
    assert problem.endswith("[Errno 27] File too large")
    warnings = [line for line in report[0]["lines"] if line.startswith("WARNING checkpoint")]
    assert len(warnings) == 1
    assert "step-00000006: could not be written: rank 1: [Errno 27]" in warnings[0]
    assert "Training goes on" in warnings[0]
    for step, record in right.items():
        for field in ("loss", "grad_norm", "order_hash", "images_seen"):
            assert record[field] == left[step][field], step


@pytest.mark.timeout(600)
def test_a_straggler_and_then_a_hang(arguments: Arguments, tmp_path: Path) -> None:
    """Rank 1 sleeps 0.2 s in every step: named within 50. It is stopped in step 32: named when the timeout is up
    and killed, and torchrun's restart trains to the end."""
    out = tmp_path / "run"
    plan = [
        {"kind": "sleep", "rank": 1, "delay": 0.2},
        {"kind": "signal", "signal": "SIGSTOP", "rank": 1, "step": 32, "phase": "step"},
    ]
    flags = arguments(out, "--steps", "34", "--checkpoint-every", "15", "--timeout", "15")
    done = launch(2, plan, tmp_path, flags, "--max-restarts", "1")
    assert done.returncode == 0, done.stderr[-4000:]
    named = [e for e in read_events(out) if e["event"] == "straggler"]
    assert named[0]["slowest"] == 1
    assert named[0]["kind"] == "compute"
    assert named[0]["seconds"] >= 0.2
    assert "straggler  rank 1: 0." in done.stdout
    hung = re.findall(  # its last heartbeat may be a second old, and so from the save after step 30
        r"error: (?:rank 0: )?rank 1 \(.*?\) is stopped by a signal; last seen in step \d+, phase "
        r"(?:step|data|save).*?\(collective: .*? in group .*?\)",
        done.stderr,
    )
    assert len(hung) >= 1, done.stderr[-4000:]
    stopped = re.search(r"INJECTED FAULT ([\d.]+) ", done.stdout)
    assert stopped is not None
    assert named[0]["time"] < float(stopped[1])  # in the first attempt, so before step 32
    restarted = [e for e in read_events(out) if e["event"] == "start"][1]["time"] - float(stopped[1])
    assert 11 < restarted < 120  # not before the timeout, and not after megatron's own half hour
    assert len(records(out)) == 34


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.timeout(600)
def test_a_node_that_does_not_come_back(arguments: Arguments, undisturbed: Path, tmp_path: Path) -> None:
    """Two launchers stand for two nodes; one is killed for good. The other goes on: same batches, same learning."""
    out, port = tmp_path / "run", free_port()
    flags = arguments(out, "--steps", STEPS)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([{"kind": "read", "step": 8, "delay": 8.0}]))  # time for the kill
    logs = [open(tmp_path / f"node{node}.log", "w") for node in (0, 1)]  # noqa: SIM115
    nodes = []
    for node in (0, 1):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "1:2",
            "--nproc-per-node",
            "1",
            "--max-restarts",
            "3",
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "lost-node",
            "--rdzv-endpoint",
            f"127.0.0.1:{port}",
            "--rdzv-conf",
            f"is_host={int(node == 0)},last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=3",
            WORKER,
            str(plan),
            *flags[1:],
        ]
        nodes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=logs[node],
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        time.sleep(1.0 if node == 0 else 0)  # the first one hosts the rendezvous
    try:
        end = time.monotonic() + 240
        while not (out / "checkpoints" / "step-00000003" / "manifest.json").is_file():
            assert time.monotonic() < end
            assert nodes[0].poll() is None, (tmp_path / "node0.log").read_text()[-3000:]
            time.sleep(0.05)
        worker = int(subprocess.check_output(["pgrep", "-P", str(nodes[1].pid)]).split()[0])
        os.killpg(nodes[1].pid, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        nodes[0].wait(300)
        text = (tmp_path / "node0.log").read_text()
        assert nodes[0].returncode == 0, text[-4000:]
    finally:
        for node in nodes:
            node.kill()
        for log in logs:
            log.close()
    starts = [e for e in read_events(out) if e["event"] == "start"]
    assert [e["world"] for e in starts] == [2, 1]
    assert starts[1]["step"] >= 3
    assert re.search(r"error: (?:rank 0: )?rank 1 .* is gone", text), text[-4000:]
    left, right = records(undisturbed), records(out)
    assert right.keys() == left.keys()
    for step, record in right.items():
        assert record["order_hash"] == left[step]["order_hash"]
        assert record["loss"] == pytest.approx(left[step]["loss"], rel=1e-5), step
