"""Saves while training goes on, and restores into any layout.

A save copies this rank's shards into host memory, which is all the training loop waits for. A thread then writes
them, with process groups of its own: every rank writes and hashes its part, reads it back, and when all have,
rank 0 commits (see `checkpoint_store`). At most one save is under way. Its outcome is agreed by the writing
threads, so that every rank's `wait` returns the same.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from lcl_mcore.checkpoint.dcp import Entries, read_metadata, read_pieces, write_pieces
from lcl_mcore.checkpoint.manifest import (
    TrainState,
    checkpoint_name,
    checkpoint_path,
    child,
    complete_checkpoints,
    outdated,
    read_state,
    require_intact,
    step_of,
    verify,
    write_state,
)
from lcl_mcore.checkpoint.shards import (
    WEIGHTS,
    Piece,
    Shard,
    Snapshot,
    training_shards,
    weight_shards,
)
from lcl_mcore.checkpoint.store import Store, verify_written
from lcl_mcore.distributed.groups import gather_bytes
from lcl_mcore.errors import CheckpointError, LclError, explain
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.optimizer import Optimizer

__all__ = [
    "Checkpointer",
    "Outcome",
    "TrainState",
    "TrainingTensors",
    "checkpoint_path",
    "complete_checkpoints",
    "load_weights",
    "read_full_weights",
    "read_state",
    "verify",
]
_ECHO = "seen from here: "


class Tensors(Protocol):
    """The state of this rank that a checkpoint holds."""

    def shards(self) -> list[Shard]:
        """This rank's ranges; views of live memory."""

    def loaded(self, steps: int) -> None:
        """Called on all ranks when new values, `steps` updates old, are in the shards."""


class TrainingTensors:
    """Master weights and moments of a run."""

    def __init__(self, model: LclModel, optimizer: Optimizer, tp: dist.ProcessGroup) -> None:
        self.model, self.optimizer, self.tp = model, optimizer, (tp.rank(), tp.size())

    def shards(self) -> list[Shard]:
        return training_shards(self.model, self.optimizer, self.tp)

    def loaded(self, steps: int) -> None:
        self.optimizer.restored(steps)


@dataclass(frozen=True)
class Outcome:
    """How a save ended: `problem` is empty if the checkpoint is complete; `seconds` from start to commit."""

    step: int
    path: str
    problem: str
    seconds: float


class Checkpointer:
    """Saves and restores one run; all ranks call every method together, except `poll`."""

    def __init__(
        self,
        store: Store,
        tensors: Tensors,
        control: dist.ProcessGroup,
        background: dist.ProcessGroup,
        *,
        keep: int,
        keep_every: int = 0,
        config: str = "",
        node: tuple[int, int] = (0, 1),
    ) -> None:
        """
        Args:
            control, background: all ranks over gloo; `background` serves the writing thread alone.
            keep, keep_every: retention, see `CheckpointConfig`.
            config: text of `config.yaml`, stored in every checkpoint.
            node: (index, number) of this process among those of its machine.
        """
        self.store, self.tensors, self.control, self.background = store, tensors, control, background
        self.keep, self.keep_every, self.config, self.node = keep, keep_every, config, node
        self.rank = control.rank()
        self.stalled = 0.0
        """Seconds that the training loop has waited for checkpoints."""
        self.snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        if self.rank == 0:
            self._attempt(store.clean)
        # torch warns that a folder exists, and about each failed rank; we say it once, in a line.
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)

    # --- saving ---

    def allocate(self) -> None:
        """Make the host copies' memory ahead of the first save."""
        if self.snapshot is None:
            self.snapshot = Snapshot(self.tensors.shards())

    def start(self, state: TrainState) -> None:
        """Begin a checkpoint; returns when the values are safe from the steps that follow.

        Raises:
            RuntimeError: the save before has not been waited for.
        """
        if self._thread is not None:
            raise RuntimeError("a save is under way: call `wait` first")
        began = time.perf_counter()
        self.allocate()
        assert self.snapshot is not None
        self.snapshot.take()
        self._thread = threading.Thread(
            target=self._save, args=(state, began), name=f"checkpoint-{state.step}", daemon=True
        )
        self._outcome = None
        self._thread.start()
        self.stalled += time.perf_counter() - began

    def poll(self) -> Outcome | None:
        """How the save under way ended, if this rank knows already; does not wait."""
        return self._outcome

    def wait(self) -> Outcome | None:
        """How the save under way ended, after waiting for it; None if there is none."""
        if self._thread is None:
            return None
        began = time.perf_counter()
        self._thread.join()
        self.stalled += time.perf_counter() - began
        outcome, self._thread, self._outcome = self._outcome, None, None
        return outcome

    def _save(self, state: TrainState, began: float) -> None:
        """The writing thread: each stage begins when all ranks have done the one before."""
        name = checkpoint_name(state.step)
        entries: Entries = {}

        def prepare() -> None:
            if self.rank == 0:
                self.store.prepare(name)

        def write() -> None:
            assert self.snapshot is not None
            folder = self.store.staging(name)
            entries.update(write_pieces(folder, self.snapshot.pieces(), self.background))
            if self.rank == 0:
                entries.update(write_state(folder, state, self.config))
            verify_written(folder, entries)

        def commit() -> None:
            if self.rank == 0:
                self.store.commit(name, everything)
                self.store.remove(outdated(self.store.names(), self.keep, self.keep_every))

        try:
            problem = self._together(prepare)
            problem = problem or self._together(write)
            problem = problem or self._together(lambda: self.store.publish(name, entries))
            if not problem:
                parts = gather_bytes(json.dumps(entries).encode(), self.background)
                everything = {file: entry for part in parts for file, entry in json.loads(part).items()}
                problem = self._together(commit)
        except RuntimeError as error:  # the ranks cannot agree: one of them is gone
            problem = f"rank {self.rank}: {_reason(error)}"
        if problem or not self.store.shared:
            self._attempt(
                lambda: self.store.abandon(name) if self.rank == 0 or not self.store.shared else None
            )
        path = child(self.store.location, name)
        self._outcome = Outcome(state.step, path, problem, time.perf_counter() - began)

    @staticmethod
    def _attempt(action: Callable[[], object]) -> str:
        """Run `action`; its failure as one line, or nothing."""
        try:
            action()
        except (Exception, CheckpointException) as error:  # whatever went wrong, the run must hear of it
            return _reason(error)
        return ""

    def _together(self, action: Callable[[], object]) -> str:
        """Run `action` on every rank; the first problem, those first that are not the echo of another rank's."""
        answers = [a.decode() for a in gather_bytes(self._attempt(action).encode(), self.background)]
        own = [f"rank {rank}: {a}" for rank, a in enumerate(answers) if a and not a.startswith(_ECHO)]
        echoes = [a.removeprefix(_ECHO) for a in answers if a.startswith(_ECHO)]
        return (own or echoes or [""])[0]

    # --- restoring ---

    def names(self) -> list[str]:
        """All checkpoint folders, complete or not, oldest first; what the first rank sees."""
        payload = json.dumps(self.store.names()).encode() if self.rank == 0 else b""
        answer: list[str] = json.loads(gather_bytes(payload, self.control)[0])
        return answer

    def find(
        self, accept: Callable[[TrainState], bool] = lambda state: True
    ) -> tuple[Path | None, list[str]]:
        """Newest checkpoint that verifies and is accepted, and what is wrong with newer ones.

        The ranks share the work, and agree.
        """
        notes: list[str] = []
        part, parts = (self.rank, self.control.size()) if self.store.shared else self.node
        for name in reversed(self.names()):
            path, problems = self._fetch(name, part, parts)
            answers = gather_bytes(json.dumps(problems).encode(), self.control)
            merged = sorted({problem for answer in answers for problem in json.loads(answer)})
            if not merged and not accept(read_state(path)):
                continue
            if not merged:
                return path, notes
            where = child(self.store.location, name)
            notes.append(f"{where}: damaged, skipped: {'; '.join(merged[:3])}")
        return None, notes

    def discard_after(self, step: int) -> None:
        """Remove all checkpoints of later steps. No save may be under way."""
        if self.rank == 0:
            self._attempt(
                lambda: self.store.remove([n for n in self.store.names() if (step_of(n) or 0) > step])
            )

    def _fetch(self, name: str, part: int, parts: int) -> tuple[Path, list[str]]:
        try:
            return self.store.fetch(name, part, parts)
        except (OSError, LclError) as error:
            return Path(name), [_reason(error)]

    def load(self, path: Path) -> TrainState:
        """Restore the tensors from a verified checkpoint of any layout.

        Raises:
            CheckpointError: the files do not fit this model; raised on every rank.
        """
        began = time.perf_counter()
        shards, problem = self.tensors.shards(), ""
        try:
            state = read_state(path)
            _require_same_tensors(path, shards, self.control)
            self._fill(path, shards)
        except CheckpointError as error:
            problem = str(error)
        for answer in gather_bytes(problem.encode(), self.control):
            if answer:
                raise CheckpointError(answer.decode())
        self.tensors.loaded(state.step)
        self.stalled += time.perf_counter() - began
        return state

    def _fill(self, path: Path, shards: list[Shard]) -> None:
        """Read into host memory, and copy when all of it is there: a failure leaves the old values."""
        space = [torch.empty(shard.flat.numel(), dtype=shard.flat.dtype) for shard in shards]
        pairs = list(zip(shards, space, strict=True))
        read_pieces(path, [piece for shard, flat in pairs for piece in shard.pieces(flat)])
        for shard, flat in pairs:
            shard.flat.copy_(flat)


def _require_same_tensors(path: Path, shards: list[Shard], control: dist.ProcessGroup) -> None:
    """Refuse a checkpoint with tensors that no rank of this run has; collective."""
    own = sorted({s.key for s in shards if s.mine and s.start == 0 and not any(s.origin)})
    wanted = {key for part in gather_bytes(json.dumps(own).encode(), control) for key in json.loads(part)}
    extra = sorted(set(read_metadata(path).state_dict_metadata) - wanted)
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        raise CheckpointError(
            explain(
                path,
                f"holds tensors that this model lacks: {', '.join(extra[:3])}{more}",
                "Use the configuration it was written with.",
            )
        )


def load_weights(path: Path, model: LclModel, tp: tuple[int, int] = (0, 1)) -> TrainState:
    """Take the weights alone from a local checkpoint of any layout.

    Args:
        tp: this rank's tensor-parallel (rank, size).

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit this model.
    """
    require_intact(path)
    wanted = weight_shards(model, tp)
    read_pieces(path, [piece for _, shard in wanted for piece in shard.pieces(shard.flat)])
    with torch.no_grad():
        for parameter, shard in wanted:
            parameter.copy_(shard.flat.view_as(parameter))
    return read_state(path)


def read_full_weights(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a local checkpoint as whole fp32 tensors by full name; needs no process group.

    Raises:
        CheckpointError: damaged.
    """
    stored = read_metadata(path).state_dict_metadata
    shapes = {key: tuple(entry.size) for key, entry in stored.items() if key.startswith(WEIGHTS)}  # type: ignore[union-attr]
    pieces = [Piece(key, shape, (0,) * len(shape), torch.empty(shape)) for key, shape in shapes.items()]
    read_pieces(path, pieces)
    return {piece.key.removeprefix(WEIGHTS): piece.tensor for piece in pieces}


def _reason(error: BaseException) -> str:
    """The telling line of an error; of one that torch made of all ranks' failures, the first rank's."""
    if isinstance(error, CheckpointException) and error.failures:
        rank = min(error.failures)
        return f"{_ECHO}rank {rank}: {_reason(error.failures[rank][0])}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
