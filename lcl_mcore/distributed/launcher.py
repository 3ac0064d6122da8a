"""What the launcher tells a process about its job. Imports nothing heavy."""

from __future__ import annotations

import os

from lcl_mcore.config.base import require

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process, and what torch's process group needs."""

TASKS = {
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "SLURM_NTASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "PALS_NRANKS": "PALS_RANKID",
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",
}
"""Number of tasks that another launcher started -> which of them this process is; the first one that is set counts."""


def job_id() -> str:
    """torchrun's name for the job, kept over its restarts; empty without torchrun or when it was given none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def world_size() -> int:
    """Number of processes of the job; 1 without torchrun.

    Raises:
        ConfigError: torchrun's variables are not whole.
    """
    given = [name for name in TORCHRUN if name in os.environ]
    if "RANK" not in given and os.environ.get("WORLD_SIZE", "1") == "1":
        return 1
    missing = ", ".join(name for name in TORCHRUN if name not in given)
    remedy = "Start the command with torchrun, or set all four."
    require(not missing, f"{', '.join(given)} without {missing}", "a process of a job needs all of them", remedy)
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    require(
        rank.isdecimal() and world.isdecimal() and int(rank) < int(world),
        f"RANK = {rank} with WORLD_SIZE = {world}",
        "ranks are counted from 0 to one less than their number",
        remedy,
    )
    return int(world)


def refuse_tasks_without_ranks() -> None:
    """`srun python ...` and `mpirun python ...` would train as often as there are tasks, each alone.

    A shell of `salloc` has SLURM's number of tasks, but is none of them.

    Raises:
        ConfigError: this is one of several tasks that know nothing of each other.
    """
    if "RANK" in os.environ:
        return
    for tasks, task in TASKS.items():
        if tasks in os.environ and task in os.environ:
            number = os.environ[tasks]
            require(
                number == "1",
                f"{tasks} = {number} without RANK",
                "each task would train alone",
                "Start torchrun, once on each node: srun --ntasks-per-node=1 torchrun --nproc-per-node GPUS ... "
                f"(docs/cluster.md); for a single process set {tasks}=1.",
            )
            return
