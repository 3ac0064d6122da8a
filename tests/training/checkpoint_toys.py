"""A checkpointer of a few small tensors: save, kill and damage it without a model, in forked processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lcl_mcore.checkpoint.dcp import _HashingFile
from lcl_mcore.checkpoint.manager import Checkpointer, CheckpointManager
from lcl_mcore.checkpoint.shards import Shard
from lcl_mcore.checkpoint.store import RUN, TrainState, checkpoint_names, open_store
from lcl_mcore.config.schema import CheckpointConfig

SHAPES = {"weights/a": (64, 48), "exp_avg/a": (64, 48), "weights/b": (7,), "weights/c": (2, 5, 33)}


def values(step: int) -> dict[str, torch.Tensor]:
    """What the tensors hold after `step` steps."""
    generator = torch.Generator().manual_seed(step)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


class Toys:
    """Whole tensors on one rank."""

    def __init__(self, step: int) -> None:
        self.tensors = values(step)
        self.steps = -1

    def shards(self) -> list[Shard]:
        return [
            Shard(key, tuple(t.shape), tuple(t.shape), (0,) * t.dim(), 0, t.view(-1), True)
            for key, t in self.tensors.items()
        ]

    def loaded(self, steps: int) -> None:
        self.steps = steps


def in_child(action: Callable[[], Any], timeout: int = 60) -> tuple[int, Any]:
    """Run `action` in a forked process: its wait status, and what it returned (None if it was killed)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(timeout)
        os.close(reader)
        try:
            result = action()
            os.write(writer, json.dumps(result).encode())
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return status, json.loads(answer) if answer else None


def checkpointer(location: str, staging: Path, tensors: Toys, keep: int = 2) -> Checkpointer:
    """In this process alone; call it in a child, for it starts the process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    control, background = dist.new_group([0]), dist.new_group([0])
    return Checkpointer(open_store(location, staging), tensors, control, background, keep=keep, config="x: 1\n")


def save(location: str, staging: Path, step: int, keep: int = 2) -> str:
    """Save the tensors of `step`; its problem."""
    saver = checkpointer(location, staging, Toys(step), keep)
    saver.clean()
    saver.start(TrainState(step, {"at": step}, "hash", "digest"))
    outcome = saver.wait()
    assert outcome is not None
    return outcome.problem


def restore(location: str, staging: Path) -> dict[str, Any]:
    """Find and load: step, whether every value is that step's, and what was skipped."""
    toys = Toys(0)
    loader = checkpointer(location, staging, toys)
    state, unusable = loader.restore()
    loader.clean()
    skipped = [str(item) for item in unusable]
    if state is None:
        return {"step": None, "skipped": skipped, "untouched": _equal(toys.tensors, values(0))}
    for item in unusable:
        loader.set_aside(item)
    exact = _equal(toys.tensors, values(state.step)) and toys.steps == state.step
    return {"step": state.step, "skipped": skipped, "exact": exact, "names": checkpoint_names(location)}


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in SHAPES)


class Run:
    """A run of small tensors in this process: its manager, its log, and a clock that stands still."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        rank: int = 0,
        seconds_left: float | None = None,
        *,
        location: str = "",
        groups: Sequence[dist.ProcessGroup] = (),
    ) -> None:
        """
        Args:
            folder: where checkpoints go, or are prepared for the URL `location`.
            groups: two of this process alone; new ones if none are given.
        """
        groups = groups or [dist.new_group([0], backend="gloo") for _ in range(2)]
        self.folder, self.lines, self.now = folder, list[str](), 1000.0
        self.toys = Toys(0)
        checkpointer = Checkpointer(
            open_store(location or str(folder), folder),
            self.toys,
            *groups,
            keep=config.keep,
            keep_every=config.keep_every,
            config="x: 1\n",
        )
        self.manager = CheckpointManager(checkpointer, config, rank, self.lines.append, seconds_left, lambda: self.now)

    def save(self, step: int, *, final: bool = False) -> None:
        """Save the values of `step`."""
        for key, tensor in values(step).items():
            self.toys.tensors[key].copy_(tensor)
        self.manager.save(TrainState(step, {"at": step}, "hash", "digest"), final=final)

    def holds(self, step: int) -> bool:
        """Whether every value is that step's."""
        return all(bool((self.toys.tensors[key] == values(step)[key]).all()) for key in SHAPES)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name != RUN)


def count_operations(folder: Path, limit: int | None) -> list[int]:
    """Count file operations below `folder` from now on; SIGKILL this process at number `limit` (0-based)."""
    seen = [0]

    def operation() -> None:
        if seen[0] == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        watched = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if watched and arguments and str(arguments[0]).startswith(str(folder)):
            operation()

    sys.addaudithook(hook)
    write, sync = _HashingFile.write, os.fsync

    def counted_write(self: _HashingFile, data: Any) -> int:
        operation()
        return write(self, data)

    def counted_sync(descriptor: int) -> None:
        operation()
        sync(descriptor)

    _HashingFile.write = counted_write  # type: ignore[method-assign]
    os.fsync = counted_sync
    return seen
