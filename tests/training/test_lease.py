"""One folder, one writer: contenders, silent holders, strange files, and two real jobs in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from launch import Job, run_script
from lcl_mcore.checkpoint.store import complete_checkpoints, verify
from lcl_mcore.errors import LeaseError
from lcl_mcore.fault_tolerance import lease as module
from lcl_mcore.fault_tolerance.lease import Holder, Lease
from training_runs import ROOT, records

Arguments = Callable[..., list[str]]
HERE = f"process {os.getpid()} on {os.uname().nodename}"


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet, on a disk or in an object store."""
    MemoryFileSystem.store.clear()
    return str(tmp_path / "a" / "run") if request.param == "folder" else "memory://bucket/run"


def taken(place: str, seconds: float = 60.0, lines: list[str] | None = None) -> Lease:
    """A lease that is held, after asking for as long as it takes."""
    found = Lease(place, seconds, (lines if lines is not None else []).append)
    while not found.ask():
        time.sleep(0.01)
    return found


def names(found: Lease) -> list[str]:
    return sorted(found.place.names())


def leave(place: str, number: int, content: bytes) -> None:
    """A lease file of somebody else."""
    assert Lease(place, 1.0, print).place.create(f"lease-{number:06d}.json", content)


def holder(**changes: Any) -> Holder:
    """A job of another machine."""
    return replace(Lease("/tmp", 0.2, print).own, host="other", namespace="other", **changes)


def test_it_leaves_no_trace(place: str, tmp_path: Path) -> None:
    first = taken(place)
    first.require()
    assert names(first) == ["lease-000001.json"]
    first.close()
    assert list(tmp_path.iterdir()) == []
    assert [name for name in MemoryFileSystem.store if "lease" in name] == []
    refused = Lease(place, 60.0, print)  # closed before it was granted
    refused.close()
    assert list(tmp_path.iterdir()) == []


def test_a_living_holder_is_not_disturbed(place: str) -> None:
    first = taken(place, seconds=1.2)
    lines: list[str] = []
    with pytest.raises(LeaseError) as refused:
        taken(place, lines=lines)
    assert str(refused.value) == (
        f"{place}: is being written by {HERE}, whose heartbeat goes on. Wait until it ends, end it, or choose another "
        "folder."
    )
    assert refused.value.exit_code == 2
    assert lines == [f"{place}: {HERE} may write it; watching for up to 1.2 s whether it lives"]
    first.require()
    first.close()
    taken(place).close()


def test_a_silent_holder_is_succeeded_and_stops(place: str) -> None:
    """As a process that was stopped for a while, or lost its network: it finds out before it writes."""
    first = taken(place, seconds=0.3)
    first.finished.set()
    first.thread.join()
    lines: list[str] = []
    second = taken(place, lines=lines)
    assert lines[1] == f"{place}: taken over from {HERE}, which gave no sign of life for 0.3 s"
    assert names(second) == ["lease-000001.json", "lease-000002.json"]
    for _ in range(2):
        with pytest.raises(LeaseError) as lost:
            first.require()
        assert str(lost.value) == (
            f"{place}: taken over by {HERE}. This process stops and saves nothing more; the other one goes on."
        )
        second.clear()
    assert names(second) == ["lease-000002.json"]
    first.close()
    second.require()
    second.close()


def test_a_job_that_was_refused_gives_the_folder_back(place: str) -> None:
    """It took over from a silent holder, did not begin, and went: the former one may go on."""
    first = taken(place, seconds=0.2)
    first.finished.set()
    first.thread.join()
    taken(place).close()
    first.require()


def test_a_process_that_ended_here_holds_nothing(place: str) -> None:
    child = subprocess.Popen(["sleep", "60"])
    mine = Lease(place, 60.0, print).own
    import psutil

    of_child = replace(mine, pid=child.pid, started=psutil.Process(child.pid).create_time())
    assert not of_child.is_gone()
    assert replace(of_child, started=of_child.started - 60).is_gone()  # its number was used again
    child.kill()
    while not of_child.is_gone():  # a zombie is no process
        time.sleep(0.01)
    child.wait()
    leave(place, 7, module._HOLDER.dump_json(of_child))
    lines: list[str] = []
    found = taken(place, lines=lines)
    assert lines == [f"{place}: taken over from process {child.pid} on {mine.host}, which has ended"]
    assert found.number == 8
    found.close()


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 3000, b"\xff\xfe", b'{"token": 3}', b"x" * 100_000])
def test_a_damaged_file_is_watched_like_a_silent_holder(place: str, content: bytes) -> None:
    leave(place, 1, content)
    lines: list[str] = []
    found = taken(place, seconds=0.2, lines=lines)
    assert lines[-1] == (f"{place}: taken over from a process that left no name, which gave no sign of life for 0.2 s")
    found.close()


def test_a_pipe_in_its_place_is_an_error_and_no_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lease-000001.json")
    lease = Lease(str(tmp_path), 60.0, print)
    with pytest.raises(OSError, match="not a regular file"):
        lease.ask()
    lease.close()


def test_one_of_many_contenders_wins(place: str) -> None:
    """All see the same silent holder, and ask in the same moments."""
    leave(place, 3, module._HOLDER.dump_json(holder()))
    contenders = [Lease(place, 0.6, lambda line: None) for _ in range(8)]

    def contend(one: Lease) -> bool:
        try:
            while not one.ask():
                time.sleep(0.005)
        except LeaseError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(contend, contenders))
    assert sum(won) == 1
    contenders[won.index(True)].require()
    for one in contenders:
        one.close()


def test_a_folder_that_was_emptied_is_lost(place: str) -> None:
    first = taken(place)
    first.place.remove("lease-000001.json")
    with pytest.raises(LeaseError, match="taken over by another job"):
        first.require()
    first.close()


# --- real jobs ---


def wait_for(condition: Callable[[], bool], job: Job, limit: float = 120) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert job.poll(0.05) is None, job.stdout + job.stderr
        assert time.monotonic() < end, job.stdout


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_jobs_in_one_folder(arguments: Arguments, tmp_path: Path) -> None:
    """The second is refused and disturbs nothing; a third takes over from the first once that has been stopped."""
    out = tmp_path / "run"
    words = arguments(out, "--steps", "400", "--checkpoint-every", "2", "--keep", "1000", "faults.lease_seconds=6")
    with Job(2, *words) as first:
        wait_for(lambda: len(complete_checkpoints(out / "checkpoints")) >= 2, first)
        second = run_script(*words, "--resume")
        assert second.returncode == 2, second.stderr
        assert second.stderr.startswith(f"error: {out}: is being written by process {first.pids[0]} on ")
        assert len(second.stderr.splitlines()) == 1
        for pid in first.pids:
            os.kill(pid, signal.SIGSTOP)
        kept = complete_checkpoints(out / "checkpoints")
        with Job(1, *words[:-1], "faults.lease_seconds=60", "--resume") as third:
            wait_for(lambda: len(complete_checkpoints(out / "checkpoints")) >= len(kept) + 2, third)
            assert "which gave no sign of life for 6 s" in third.stdout
            for pid in first.pids:
                os.kill(pid, signal.SIGCONT)
            assert first.wait(60) in (2, 4)
            assert first.stderr.count(f"error: {out}: taken over by process {third.pids[0]} on ") == 1
            at = len(records(out))
            wait_for(lambda: len(records(out)) > at + 2, third)
            os.kill(third.pids[0], signal.SIGTERM)
            assert third.wait(60) == 0, third.stderr
    records(out)  # every step once, in order
    assert all(verify(path) == [] for path in complete_checkpoints(out / "checkpoints"))
    assert not list(out.glob("lease-*"))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_jobs_started_in_the_same_moment(arguments: Arguments, tmp_path: Path) -> None:
    """A requeued job beside one that lingers, without a checkpoint yet: exactly one trains."""
    out = tmp_path / "run"
    words = [sys.executable, *arguments(out, "--steps", "60", "faults.lease_seconds=4")]
    jobs = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    ended = [(job.communicate(timeout=180), job.returncode) for job in jobs]
    assert sorted(code for _, code in ended) == [0, 2], ended
    refused = next(texts for texts, code in ended if code == 2)
    assert refused[1].startswith(f"error: {out}")
    assert len(refused[1].splitlines()) == 1
    assert len(records(out)) == 60
