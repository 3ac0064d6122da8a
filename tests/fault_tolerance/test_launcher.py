"""Which launchers' variables make a process one of a job, a single one, or a mistake."""

from __future__ import annotations

import pytest

from lcl_mcore.distributed.launcher import TASKS, TORCHRUN, refuse_tasks_without_ranks, world_size
from lcl_mcore.errors import ConfigError

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*TORCHRUN, *TASKS, *TASKS.values()}:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("tasks", "task"), TASKS.items())
def test_several_tasks_without_ranks_are_refused(tasks: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tasks, "2")
    refuse_tasks_without_ranks()  # a shell of salloc: the number is there, but this is none of them
    monkeypatch.setenv(task, "0")
    with pytest.raises(ConfigError) as refused:
        refuse_tasks_without_ranks()
    assert str(refused.value) == (
        f"{tasks} = 2 without RANK: each task would train alone. Start torchrun, once on each node: srun "
        "--ntasks-per-node=1 torchrun --nproc-per-node GPUS ... (docs/cluster.md); for a single process set "
        f"{tasks}=1."
    )
    monkeypatch.setenv(tasks, "1")
    refuse_tasks_without_ranks()
    monkeypatch.setenv(tasks, "2")
    monkeypatch.setenv("RANK", "0")
    refuse_tasks_without_ranks()


def test_a_step_counts_before_its_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --ntasks 1` in an allocation of eight tasks."""
    set_all(monkeypatch, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    refuse_tasks_without_ranks()


def test_variables_of_torchrun_are_whole_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world_size() == 1
    set_all(monkeypatch, {"MASTER_PORT": "1"})  # alone it says nothing
    assert world_size() == 1
    set_all(monkeypatch, WHOLE)
    assert world_size() == 4
    for missing in WHOLE:
        monkeypatch.delenv(missing)
        given = [name for name in WHOLE if name != missing]
        with pytest.raises(ConfigError) as refused:
            world_size()
        assert str(refused.value) == (
            f"{', '.join(given)} without {missing}: a process of a job needs all of them. Start the command with "
            "torchrun, or set all four."
        )
        set_all(monkeypatch, WHOLE)
    for rank, world in (("4", "4"), ("-1", "4"), ("0", "x"), ("", "4"), ("0", "0")):
        set_all(monkeypatch, {"RANK": rank, "WORLD_SIZE": world})
        with pytest.raises(ConfigError, match=f"RANK = {rank} with WORLD_SIZE = {world}: ranks are counted from 0"):
            world_size()
