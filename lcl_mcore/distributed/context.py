"""Joining a job: device, process group, groups."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist

from lcl_mcore.config.schema import RunConfig
from lcl_mcore.distributed.device import Device, init_process_group, pick_device
from lcl_mcore.distributed.flight_recorder import record_collectives
from lcl_mcore.distributed.launcher import job_id, world_size
from lcl_mcore.terminal import say

if TYPE_CHECKING:
    from lcl_mcore.distributed.groups import Groups


@dataclass(frozen=True)
class Context:
    """What start-up yields: what a process knows about itself and its job.

    Attributes:
        device: where it computes.
        groups: the process groups it communicates over.
        rank: its number among `world_size`.
        run_folder: where the run keeps what it writes.
        log: prints a line once, on rank 0.
        store: key-value store of this attempt of the job alone.
    """

    device: Device
    groups: Groups
    rank: int
    world_size: int
    run_folder: Path
    log: Callable[[str], None]
    store: dist.Store


def detached(device: Device, groups: Groups) -> Context:
    """A context outside a run, for the planner, benchmarks and tests: nothing is logged or written."""
    return Context(device, groups, dist.get_rank(), dist.get_world_size(), Path(), lambda line: None, dist.HashStore())


def start(config: RunConfig, run_folder: Path) -> Context:
    """Join the process group and make the groups; the configuration has been checked before.

    Raises:
        ConfigError: the processes or the global batch cannot be split evenly, or the device is not there.
    """
    config.check_processes(world_size())
    _limit_threads()
    if os.environ.get("LOCAL_RANK") == "0":
        _end_orphans()
    if config.parallel.tensor_parallel_size > 1:  # megatron's overlap of gradient reduction counts on launch order
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = pick_device(config.train.device)
    # Imported after the CPU platform, which keeps megatron-core's import from loading torch's compiler.
    from lcl_mcore.distributed.groups import make_groups

    record_collectives()
    store = init_process_group(device, config.parallel.timeout_seconds)
    rank = dist.get_rank()
    groups = make_groups(
        config.parallel.tensor_parallel_size,
        config.parallel.pipeline_parallel_size,
        config.parallel.timeout_seconds,
        config.train.seed,
    )

    def log(text: str) -> None:
        if rank == 0:
            say(text)

    return Context(device, groups, rank, dist.get_world_size(), run_folder, log, store)


def _end_orphans() -> None:
    """Kill what the ranks of an earlier attempt of this job left on this machine: helpers that write checkpoints
    outlive a rank that was killed, and keep its memory. They carry the job's id and have no parent any more; where
    the launcher itself is process 1 of a container, its ranks look the same but for their command line."""
    job, launcher = job_id(), os.getppid()
    for process in psutil.process_iter() if job else ():
        try:
            orphan = process.ppid() == 1 and process.environ().get("TORCHELASTIC_RUN_ID") == job
            if orphan and (launcher != 1 or "multiprocessing" in " ".join(process.cmdline())):
                process.kill()
        except psutil.Error:  # gone meanwhile, or somebody else's
            continue


def _limit_threads() -> None:
    """torchrun sets one thread per process; without it, share the cores among this machine's processes."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
