"""What the training loop asks of its checkpoints: when to save, how saves end, where to go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from checkpoint_toys import SHAPES, Toys, values
from lcl_mcore.checkpoint.manager import Checkpointer, CheckpointManager
from lcl_mcore.checkpoint.store import TrainState, open_store
from lcl_mcore.config.schema import CheckpointConfig
from lcl_mcore.errors import CheckpointError


class Run:
    """A run of small tensors in this process: its manager, its log, and a clock that stands still."""

    def __init__(self, folder: Path, config: CheckpointConfig, rank: int = 0) -> None:
        groups = [dist.new_group([0], backend="gloo") for _ in range(2)]
        self.folder, self.lines, self.now = folder, list[str](), 1000.0
        self.toys = Toys(0)
        checkpointer = Checkpointer(
            open_store(str(folder), folder), self.toys, *groups, keep=config.keep, config="x: 1\n"
        )
        self.manager = CheckpointManager(checkpointer, config, rank, self.lines.append, lambda: self.now)

    def save(self, step: int, *, final: bool = False) -> None:
        """Save the values of `step`."""
        for key, tensor in values(step).items():
            self.toys.tensors[key].copy_(tensor)
        self.manager.save(TrainState(step, {"at": step}, "hash", "digest"), final=final)

    def holds(self, step: int) -> bool:
        """Whether every value is that step's."""
        return all(bool((self.toys.tensors[key] == values(step)[key]).all()) for key in SHAPES)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def start(groups: Any, tmp_path: Path) -> Callable[..., Run]:
    """Begin, or continue, a run in the test's folder."""

    def make(*, rank: int = 0, **settings: Any) -> Run:
        return Run(tmp_path / "checkpoints", CheckpointConfig(**settings), rank)

    return make


def test_steps_and_clocks_say_when_to_save(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setenv("SLURM_JOB_END_TIME", "5000")
    slurm = start()
    slurm.now = 4900.0  # the reserve was taken of the 4,000 s that were left at the start
    assert slurm.manager.out_of_time()
    slurm.now = 4879.0
    assert not slurm.manager.out_of_time()
    with pytest.raises(ValueError, match="minutes\n  Input should be greater than or equal to 0"):
        CheckpointConfig(minutes=-1)


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
    with pytest.raises(
        CheckpointError, match=r"step-00000003: could not be written.*earlier checkpoints are"
    ):
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
    again.save(5)
    assert again.manager.go_back(lambda state: state.step < 2) is None
    earlier = again.manager.go_back(lambda state: state.step < 4)
    assert earlier is not None
    assert earlier.step == 2
    assert again.holds(2)
    assert again.names() == ["step-00000002"]
    again.save(5, final=True)  # the same step may come again
    assert again.names() == ["step-00000002", "step-00000005"]
