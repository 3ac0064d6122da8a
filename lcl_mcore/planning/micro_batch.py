"""`train.micro_batch_size: auto`: the largest micro-batch whose tensors fit, as the planner counts them.

Run by itself, as pre-training does once per job, it reads the question as JSON from its standard input and prints the
answer: the simulation needs torch's fake process groups and the CPU platform, which a process that trains cannot have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lcl_mcore.config.base import from_dict, require, to_dict
from lcl_mcore.config.run_folder import FILE, read_config
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.errors import LclError
from lcl_mcore.planning.request import Assumptions

if TYPE_CHECKING:
    from lcl_mcore.distributed.context import Context

LARGEST = 64
"""Sequences; larger micro-batches are not tried."""
USABLE = {"cuda": Assumptions.headroom, "cpu": 0.5}
"""Share of a GPU's or a machine's memory that tensors may fill; on a machine the rest is for data, checkpoints on their
way and everything else."""
_OF_THE_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class LargestMicroBatch:
    """An answer.

    Attributes:
        size: sequences.
        peak: bytes of tensors at most on the fullest rank.
        fits: whether that is within the room; the smallest size otherwise.
    """

    size: int
    peak: int
    fits: bool


def with_size(config: RunConfig, size: int) -> RunConfig:
    """The same job with micro-batches of so many sequences."""
    return replace(config, train=replace(config.train, micro_batch_size=size))


def possible_sizes(config: RunConfig, world: int) -> list[int]:
    """Sizes that divide a rank's share of the global batch and leave a pipeline twice as many as it has stages.

    Raises:
        ConfigError: the job cannot be split over its processes.
    """
    dp, stages = config.check_processes(world), config.parallel.pipeline_parallel_size
    share = config.train.global_batch_size // dp
    fewest = 2 * stages if stages > 1 else 1
    sizes = [n for n in range(1, min(share, LARGEST) + 1) if share % n == 0 and share // n >= fewest]
    return sizes or [1]


def largest_micro_batch(config: RunConfig, world: int, room: float, kind: str) -> LargestMicroBatch:
    """The largest size whose tensors fit, found by counting the real step of one rank of each stage.

    Args:
        world: processes of the job.
        room: bytes that tensors may fill on each.
        kind: of the devices.
    """
    from lcl_mcore.planning.predict import expected_memory
    from lcl_mcore.planning.simulate import Simulator, count_stages

    simulator, sizes = Simulator(kind), possible_sizes(config, world)
    found: dict[int, LargestMicroBatch] = {}

    def counted(size: int) -> LargestMicroBatch:
        counts, _, repeat = count_stages(simulator, with_size(config, size), world)
        peak = expected_memory(counts, repeat)
        return found.setdefault(size, LargestMicroBatch(size, peak, peak <= room))

    if counted(sizes[-1]).fits:  # the usual answer
        return found[sizes[-1]]
    low, high = 0, max(0, len(sizes) - 2)  # memory grows with the size: halve what is left
    while low < high:
        middle = (low + high + 1) // 2
        if counted(sizes[middle]).fits:
            low = middle
        else:
            high = middle - 1
    return found.get(sizes[low]) or counted(sizes[low])


def ask(config: RunConfig, world: int, room: float, kind: str) -> LargestMicroBatch:
    """`largest_micro_batch` in a process of its own.

    Raises:
        LclError: it failed; the message is its last line.
    """
    require(
        config.train.precision != "fp8",
        "train.micro_batch_size = auto with train.precision = fp8",
        "Transformer Engine's layers cannot be counted without a GPU",
        "Give a number: the one of bf16 (lcl plan --precision bf16) is near.",
    )
    question = {"config": to_dict(config), "world": world, "room": room, "kind": kind}
    environment = {k: v for k, v in os.environ.items() if k not in _OF_THE_JOB and not k.startswith("TORCHELASTIC")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-m", "lcl_mcore.planning.micro_batch"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LclError(f"train.micro_batch_size = auto: the planner failed ({last}). Give a number.")
    return LargestMicroBatch(**json.loads(done.stdout.splitlines()[-1]))


def with_number(config: RunConfig, context: Context, resume: bool) -> RunConfig:
    """The configuration with a number for "auto": what the run that is resumed has, else the largest that fits.

    Collective: all ranks take the answer for the smallest memory among them.

    Raises:
        LclError: not even one sequence fits, or the planner failed.
    """
    if config.train.micro_batch_size != "auto":
        return config
    from lcl_mcore.distributed.groups import gather_objects

    group, world = context.groups.host_control, context.world_size
    share, (memory, whose) = USABLE[context.device.kind], context.device.memory()
    room = min(gather_objects(memory * share, group))
    answer: list[Any] = [None]
    if context.rank == 0:
        try:
            kept = _size_in(context.run_folder) if resume else None
            fits = kept in possible_sizes(config, world)
            answer = [kept if fits else ask(config, world, room, context.device.kind)]
        except LclError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, group_src=0, group=group)
    found: int | str | LargestMicroBatch = answer[0]
    if isinstance(found, str):
        raise LclError(found)
    if isinstance(found, int):
        context.log(f"train.micro_batch_size = auto: {found}, which the run had before")
        return with_size(config, found)
    counted = f"{found.peak / 2**30:.2f} GiB of tensors expected, {room / 2**30:.2f} GiB usable: {share:.0%} of {whose}"
    require(
        found.fits,
        f"train.micro_batch_size = auto: {found.size} with {counted}",
        "the smallest micro-batch must fit",
        "Recompute activations or split the layers further (lcl plan shows what fits).",
    )
    context.log(f"train.micro_batch_size = auto: {found.size}; {counted}")
    return with_size(config, found.size)


def _size_in(folder: Path) -> int | None:
    """The size that an earlier start of the run wrote down; None without one."""
    if not (folder / FILE).is_file():
        return None
    size = read_config(folder / FILE).train.micro_batch_size
    return None if size == "auto" else size


def main() -> None:
    """Answer the question on the standard input."""
    question: dict[str, Any] = json.load(sys.stdin)
    from lcl_mcore.distributed import cpu

    cpu.install()  # before megatron-core is imported
    config = from_dict(RunConfig, question.pop("config"))
    answer = largest_micro_batch(config, **question)
    print(json.dumps(answer.__dict__))


if __name__ == "__main__":
    main()
