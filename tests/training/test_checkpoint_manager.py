"""What the training loop asks of its checkpoints: when to save, how saves end, where to go on."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from checkpoint_toys import Run
from lcl_mcore.checkpoint.manager import slurm_seconds_left
from lcl_mcore.checkpoint.store import TrainState, parse_manifest, step_of, verify
from lcl_mcore.config.schema import CheckpointConfig
from lcl_mcore.errors import CheckpointError
from lcl_mcore.storage import RemoteStorage


@pytest.fixture
def start(groups: Any, tmp_path: Path) -> Callable[..., Run]:
    """Begin, or continue, a run in the test's folder."""

    def make(*, rank: int = 0, seconds_left: float | None = None, **settings: Any) -> Run:
        return Run(tmp_path / "checkpoints", CheckpointConfig(**settings), rank, seconds_left)

    return make


def test_steps_and_clocks_say_when_to_save(start: Callable[..., Run]) -> None:
    run, other = (start(every=4, minutes=2, max_hours=1, rank=rank) for rank in (0, 1))
    assert [step for step in range(1, 13) if run.manager.due(step)] == [4, 8, 12]
    run.now += 119
    assert not run.manager.time_to_save()
    run.now = other.now = 1120.0
    assert (run.manager.time_to_save(), other.manager.time_to_save()) == (True, False)
    run.save(5)
    assert not run.manager.time_to_save()
    # An hour, less a twentieth of it but at most two minutes; less twice the longest save once that is more.
    for at, over in ((1000.0 + 3600 - 121, False), (1000.0 + 3600 - 119, True)):
        run.now = other.now = at
        assert (run.manager.out_of_time(), other.manager.out_of_time()) == (over, False)
    run.now = 1000.0 + 3600 - 130
    run.manager.longest = 70.0
    assert run.manager.out_of_time()
    run.manager.wait()
    slurm = start(seconds_left=4000.0)
    slurm.now = 4900.0  # the reserve was taken of the 4,000 s that were left at the start
    assert slurm.manager.out_of_time()
    slurm.now = 4879.0
    assert not slurm.manager.out_of_time()
    with pytest.raises(ValueError, match="minutes\n  Input should be greater than or equal to 0"):
        CheckpointConfig(minutes=-1)


def test_the_end_of_a_slurm_job_and_a_clock_that_cannot_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(time, "time", lambda: 4000.0)
    assert slurm_seconds_left(lines.append) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "5000")
    assert slurm_seconds_left(lines.append) == 1000.0
    monkeypatch.setenv("SLURM_JOB_START_TIME", "3000")
    assert slurm_seconds_left(lines.append) == 1000.0
    assert lines == []
    monkeypatch.setattr(time, "time", lambda: 5000.0 + 3 * 3600)
    assert slurm_seconds_left(lines.append) is None
    assert lines == [
        "WARNING this machine's clock says 15800, outside the SLURM job's 3000 to 5000: the job's end is not used"
    ]


def test_a_save_is_logged_once_and_not_repeated(start: Callable[..., Run]) -> None:
    run = start(keep=2)
    run.save(3)
    run.manager.checkpointer._thread.join()  # type: ignore[union-attr]
    assert run.manager.poll() is False
    assert run.manager.poll() is False
    run.save(3, final=True)
    assert len(run.lines) == 1
    assert run.lines[0].startswith(f"checkpoint {run.folder}/step-00000003 complete after ")
    run.save(4, final=True)
    assert run.names() == ["step-00000003", "step-00000004"]
    assert len(run.lines) == 2


def test_failed_saves_are_tried_again_once(start: Callable[..., Run]) -> None:
    """A file stands where the folder should be: one failure is a warning, the next one ends the run."""
    run = start()
    run.folder.write_text("")
    run.save(1)
    run.manager.checkpointer._thread.join()  # type: ignore[union-attr]
    assert run.manager.poll() is False
    run.folder.unlink()
    run.save(1)  # the first attempt of it failed
    run.manager.wait()
    problem = "could not be written: rank 0: [Errno 20] Not a directory"
    assert run.lines[0].startswith(f"WARNING checkpoint {run.folder}/step-00000001: {problem}")
    assert run.lines[0].endswith("Training goes on and tries again at the next checkpoint.")
    assert run.names() == ["step-00000001"]

    run = start()
    run.folder.rename(run.folder.with_name("aside"))
    run.folder.write_text("")
    run.save(2)
    run.save(3)  # settles the first failure
    run.manager.checkpointer._thread.join()  # type: ignore[union-attr]
    assert run.manager.poll() is True
    with pytest.raises(CheckpointError, match=r"step-00000003: could not be written.*earlier checkpoints are"):
        run.save(4)
    assert [line[:7] for line in run.lines] == ["WARNING", "WARNING"]
    with pytest.raises(CheckpointError, match="step-00000001: could not be written"):
        start().save(1, final=True)


def test_resume_and_going_back(start: Callable[..., Run]) -> None:
    run = start(keep=9)
    assert run.manager.resume() is None
    assert run.lines == [f"resume: no complete checkpoint in {run.folder}, starting at step 0"]
    for step in (2, 4, 6):
        run.save(step, final=True)
    (run.folder / "step-00000006" / "state.json").write_text("{}")

    again = start(keep=9)
    state = again.manager.resume()
    assert state == TrainState(4, {"at": 4}, "hash", "digest")
    assert again.holds(4)
    assert again.lines == [
        f"{run.folder}/step-00000006: damaged, skipped: state.json: 2 bytes, 132 written",
        f"resume: {run.folder}/step-00000004, 4 steps done",
    ]
    assert again.names() == ["step-00000002", "step-00000004", "step-00000006"]  # what follows may still refuse
    again.manager.begin()
    assert again.lines[2:] == [f"{run.folder}/step-00000006 is now damaged-step-00000006"]
    again.save(5)
    assert again.manager.go_back(lambda state: state.step < 2) is None
    earlier = again.manager.go_back(lambda state: state.step < 4)
    assert earlier is not None
    assert earlier.step == 2
    assert again.holds(2)
    assert again.names() == ["damaged-step-00000006", "step-00000002"]
    again.save(5, final=True)  # the same step may come again
    assert again.names() == ["damaged-step-00000006", "step-00000002", "step-00000005"]


def flip(checkpoint: Path) -> None:
    """Change one bit of the tensors."""
    path = checkpoint / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_damaged_checkpoints_cost_no_good_one(start: Callable[..., Run]) -> None:
    """keep 2; step 60 is good, 80 and 90 have one flipped bit each; the run goes on from 60, and is stopped soon."""
    run = start(keep=9)
    for step in (60, 80, 90):
        run.save(step, final=True)
    for step in (80, 90):
        flip(run.folder / f"step-{step:08d}")
    aside = ["damaged-step-00000080", "damaged-step-00000090"]
    again = start(keep=2)
    state = again.manager.resume()
    assert state is not None
    assert state.step == 60
    again.manager.begin()
    assert again.names() == [*aside, "step-00000060"]
    again.save(61, final=True)
    assert again.names() == [*aside, "step-00000060", "step-00000061"]
    for step in (64, 68, 72, 80, 90):
        again.save(step, final=True)
    assert again.names() == [*aside, "step-00000060", "step-00000080", "step-00000090"]
    later = start(keep=2)  # what an earlier process resumed from is an old checkpoint like others
    assert later.manager.resume() is not None
    later.save(91, final=True)
    assert later.names() == [*aside, "step-00000090", "step-00000091"]


def test_a_checkpoint_out_of_reach_is_left_as_it_is(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store that does not answer says nothing of its content: an older one is used, nothing is renamed."""
    location = f"memory://reach/{tmp_path.name}"
    run = Run(tmp_path / "staging", CheckpointConfig(keep=9), location=location)
    for step in (1, 2):
        run.save(step, final=True)
    read = MemoryFileSystem.cat_file

    def silent(self: MemoryFileSystem, path: str, *rest: Any, **more: Any) -> bytes:
        if "step-00000002/__0_0" in path:
            raise ConnectionError("no answer")
        return bytes(read(self, path, *rest, **more))

    monkeypatch.setattr(RemoteStorage, "FIRST_PAUSE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", silent)
        again = Run(tmp_path / "staging", CheckpointConfig(keep=9), location=location)
        state = again.manager.resume()
        assert state is not None
        assert state.step == 1
        again.manager.begin()
    newest = f"{location}/step-00000002"
    assert again.lines[0].startswith(f"{newest}: out of reach, skipped: ")
    assert again.lines[-1] == f"{newest} is left as it is: it may be intact"
    later = Run(tmp_path / "staging", CheckpointConfig(keep=9), location=location)
    state = later.manager.resume()
    assert state is not None
    assert state.step == 2


def test_only_damaged_checkpoints_are_not_step_0(start: Callable[..., Run]) -> None:
    run = start(keep=9)
    for step in (80, 90):
        run.save(step, final=True)
        flip(run.folder / f"step-{step:08d}")
    again = start()
    with pytest.raises(CheckpointError) as refused:
        again.manager.resume()
    assert refused.value.exit_code == 2
    assert str(refused.value) == (
        f"{run.folder}/step-00000090: damaged, and no other checkpoint can be used: __0_0.distcp: content changed "
        f"since it was written. Put back a good copy, or start at step 0 with --start-over in place of --resume."
    )
    assert again.names() == ["step-00000080", "step-00000090"]  # nothing was touched
    assert len(again.lines) == 2


def test_a_renamed_or_unfitting_checkpoint_is_not_loaded(start: Callable[..., Run]) -> None:
    """An older one under a newer name is known by its manifest, one of another model by its tensors."""
    run = start(keep=9)
    for step in (2, 4, 6):
        run.save(step, final=True)
    (run.folder / "step-00000004").rename(run.folder / "step-00000008")
    other = Run(run.folder, CheckpointConfig(keep=9))
    other.toys.tensors["weights/d"] = torch.zeros(3)
    other.manager.checkpointer.run = run.manager.checkpointer.run
    other.manager.save(TrainState(7, {"at": 7}, "hash", "digest"), final=True)
    again = start()
    state = again.manager.resume()
    assert state is not None
    assert again.holds(6)
    assert again.lines == [
        f"{run.folder}/step-00000008: damaged, skipped: manifest.json: it belongs to step 4, the folder's name to "
        "step 8",
        f"{run.folder}/step-00000007: cannot be loaded, skipped: {run.folder}/step-00000007: holds tensors that "
        "this model lacks: weights/d. Use the configuration it was written with.",
        f"resume: {run.folder}/step-00000006, 6 steps done",
    ]
    again.manager.begin()
    only = other.folder.with_name("only")
    only.mkdir()
    (run.folder / "damaged-step-00000007").rename(only / "step-00000007")
    with pytest.raises(CheckpointError, match="step-00000007: cannot be loaded, and no other checkpoint can be"):
        Run(only, CheckpointConfig()).manager.resume()


def test_another_runs_checkpoint_is_not_loaded(start: Callable[..., Run]) -> None:
    """It would fit; it is neither counted nor removed. In a folder of its own it continues."""
    run = start(keep=9)
    for step in (2, 4):
        run.save(step, final=True)
    other = Run(run.folder.with_name("other"), CheckpointConfig(keep=9))
    for step in (1, 8, 9):
        other.save(step, final=True)
        shutil.copytree(other.folder / f"step-{step:08d}", run.folder / f"step-{step:08d}")
    run.save(5, final=True)
    ours, theirs = ((folder / "run-id").read_text().strip() for folder in (run.folder, other.folder))
    again = start(keep=1)
    state = again.manager.resume()
    assert state is not None
    assert (state.step, again.holds(5)) == (5, True)
    why = f"it belongs to run {theirs}, this folder to run {ours} (to continue that one, give it a folder of its own)"
    assert again.lines == [
        f"{run.folder}/step-00000009: of another run, skipped: {why}",
        f"{run.folder}/step-00000008: of another run, skipped: {why}",
        f"resume: {run.folder}/step-00000005, 5 steps done",
    ]
    again.manager.begin()
    again.save(6, final=True)
    aside = ["foreign-step-00000008", "foreign-step-00000009"]
    assert again.names() == [*aside, "step-00000001", "step-00000005", "step-00000006"]
    for step in (2, 4, 5, 6):
        shutil.rmtree(run.folder / f"step-{step:08d}", ignore_errors=True)
    with pytest.raises(CheckpointError) as refused:
        start().manager.resume()
    assert str(refused.value) == (
        f"{run.folder}/step-00000001: of another run, and no other checkpoint can be used: {why}. Put back a good "
        "copy, or start at step 0 with --start-over in place of --resume."
    )

    fork = Run(run.folder.with_name("fork"), CheckpointConfig())
    fork.folder.mkdir()
    (run.folder / aside[0]).rename(fork.folder / "step-00000008")
    assert fork.manager.resume() is not None
    assert fork.holds(8)
    fork.save(9, final=True)
    assert (fork.folder / "run-id").read_text().strip() == theirs


def test_checkpoints_of_several_runs_need_a_run_id(start: Callable[..., Run]) -> None:
    run = start(keep=9)
    run.save(2, final=True)
    other = Run(run.folder.with_name("other"), CheckpointConfig(keep=9))
    other.save(8, final=True)
    (other.folder / "step-00000008").rename(run.folder / "step-00000008")
    (run.folder / "run-id").write_text("lost")
    with pytest.raises(CheckpointError) as refused:
        start().manager.resume()
    ours, theirs = run.manager.checkpointer.run, other.manager.checkpointer.run
    assert str(refused.value) == (
        f"{run.folder}: holds checkpoints of several runs (step-00000002 of {ours}, step-00000008 of {theirs}), and no "
        "file run-id says which is meant. Leave those of one run."
    )
    (run.folder / "step-00000008" / "manifest.json").write_text("{")  # what does not say does not count
    again = start()
    assert again.manager.resume() is not None
    again.save(3, final=True)
    assert (run.folder / "run-id").read_text().strip() == ours


def write_as_before(checkpoint: Path) -> None:
    """Replace the manifest by one of version 2."""
    entries = parse_manifest((checkpoint / "manifest.json").read_bytes()).files
    files = {
        name: {"bytes": entry["bytes"], "sha256": hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}
        for name, entry in entries.items()
    }
    digest = hashlib.sha256(json.dumps([2, files], sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps({"version": 2, "digest": digest, "files": files}))


def test_checkpoints_of_earlier_versions_are_continued(start: Callable[..., Run]) -> None:
    """With SHA-256 and without a run's id; what is written now has both, and damage in the old ones is found."""
    run = start(keep=9)
    for step in (2, 4, 6):
        run.save(step, final=True)
        write_as_before(run.folder / f"step-{step:08d}")
    (run.folder / "run-id").unlink()
    flip(run.folder / "step-00000006")
    again = start(keep=3)
    assert again.manager.resume() is not None
    assert again.holds(4)
    assert again.lines[1:] == [
        f"resume: {run.folder}/step-00000004, 4 steps done",
        f"resume: {run.folder}/step-00000004 is of an earlier version and names no run; it is taken for this run's",
    ]
    again.manager.begin()
    again.save(5, final=True)
    assert again.names() == ["damaged-step-00000006", "step-00000002", "step-00000004", "step-00000005"]
    again.save(7, final=True)
    assert again.names() == ["damaged-step-00000006", "step-00000004", "step-00000005", "step-00000007"]
    later = start()
    assert later.manager.resume() is not None
    assert later.lines == [f"resume: {run.folder}/step-00000007, 7 steps done"]


def test_retention_over_random_folders(groups: Any, tmp_path: Path) -> None:
    """Whatever is damaged: the newest good checkpoint is used, and as many good ones are kept as there can be."""
    draw = random.Random(11)
    for number in range(40):
        folder = tmp_path / str(number)
        keep, keep_every = draw.randint(1, 4), draw.choice((0, 0, 10))
        steps = sorted(draw.sample(range(1, 40), draw.randint(1, 6)))
        first = Run(folder, CheckpointConfig(keep=99))
        for step in steps:
            first.save(step, final=True)
        good = []
        for step in steps:
            path = folder / f"step-{step:08d}"
            fault = draw.choice(("none", "none", "flip", "cut", "file", "manifest", "renamed"))
            if fault == "none":
                good.append(step)
            elif fault == "flip":
                flip(path)
            elif fault == "cut":
                (path / "state.json").write_bytes((path / "state.json").read_bytes()[:-1])
            elif fault == "renamed" and step + 40 not in steps:
                path.rename(folder / f"step-{step + 40:08d}")
            else:
                (path / ("config.yaml" if fault == "file" else "manifest.json")).unlink()
        held = len(steps)
        run = Run(folder, CheckpointConfig(keep=keep, keep_every=keep_every))
        about = (number, keep, keep_every, steps, good)
        if not good:
            with pytest.raises(CheckpointError, match="no other checkpoint can be used"):
                run.manager.resume()
            assert len(run.names()) == held, about
            continue
        state = run.manager.resume()
        assert state is not None
        assert (state.step, run.holds(state.step)) == (good[-1], True), about
        assert len(run.names()) == held, about  # nothing is removed before something new is there
        origin, saved = good[-1], []
        for _ in range(draw.randint(1, 5)):
            saved.append((saved or [origin])[-1] + draw.randint(1, 9))
            run.save(saved[-1], final=True)
            every = [*good, *saved]
            wanted = {*every[-keep:], saved[-1], origin}
            wanted |= {step for step in every if keep_every and step % keep_every == 0}
            left = {step for name in run.names() if (step := step_of(name)) is not None}
            assert {step for step in left if not verify(folder / f"step-{step:08d}")} == wanted, about
        assert not run.manager.failed
