"""Checkpoints: written whole or not at all, verified before use, the same for every layout.

A checkpoint is a folder `step-00000100` with
    weights/        megatron's distributed checkpoint: parameters, master weights, moments
    state.json      step, data position, order hash, configuration digest
    manifest.json   size and SHA-256 of every other file; written last
It is built under `step-00000100.partial` and renamed when everything is on disk: a folder with the final name
is complete. There is no random state to save (see `models.randomness`), and the schedule follows from the step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.parallel.groups import gather_bytes
from lcl_mcore.training.optimizer import Optimizer
from lcl_mcore.training.safe_load import restricted_unpickling

PREFIX, PARTIAL = "step-", ".partial"


@dataclass(frozen=True)
class TrainState:
    """Everything besides tensors that a resumed run needs."""

    step: int  # optimizer steps done
    position: dict[str, Any] | None  # data position after the last batch trained on
    order_hash: str
    config_digest: str
    images_seen: int = 0
    tokens_seen: int = 0


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX}{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.name.startswith(PREFIX) and not p.name.endswith(PARTIAL)]
    return sorted(p for p in found if (p / "manifest.json").is_file())


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint: missing, short or changed files. Empty if nothing is."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        entries = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return [f"manifest.json: unreadable ({error})"]
    problems = []
    for name, entry in entries:
        file = path / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{name}: {file.stat().st_size} bytes, {entry['bytes']} written")
        elif _hash_file(file) != entry["sha256"]:
            problems.append(f"{name}: content changed since it was written")
    return problems


def _reason(error: BaseException) -> str:
    """The telling line of an error that torch wrapped with the tracebacks of all ranks: its last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(path: Path) -> None:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    entries = {str(p.relative_to(path)): {"bytes": p.stat().st_size, "sha256": _hash_file(p)} for p in files}
    (path / "manifest.json").write_text(
        json.dumps({"version": 1, "files": entries}, indent=1), encoding="utf-8"
    )


def _sharded_model_state(model: nn.Module) -> dict[str, Any]:
    """megatron's sharded tensors of the parameters, without the empty per-module extras of unused FP8."""
    state = model.sharded_state_dict()  # type: ignore[operator]
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


class Checkpointer:
    """Saves and restores one run; all ranks call every method together."""

    def __init__(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, control: dist.ProcessGroup, keep: int
    ) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.control, self.keep = control, keep
        self.rank = control.rank()
        if self.rank == 0:  # what an earlier, killed save left behind
            for leftover in folder.glob(f"{PREFIX}*{PARTIAL}"):
                shutil.rmtree(leftover, ignore_errors=True)
        logging.getLogger("megatron.core").setLevel(logging.ERROR)

    def save(self, state: TrainState) -> str | None:
        """Write a checkpoint.

        Returns:
            None when it is complete, else one line saying why not; earlier checkpoints are untouched then.
        """
        final = checkpoint_path(self.folder, state.step)
        partial = final.with_name(final.name + PARTIAL)
        problem = self._agree(self._attempt(lambda: self._prepare(partial)))
        if problem is None:
            problem = self._agree(self._attempt(lambda: self._write(partial, state)))
        if problem is None:
            problem = self._agree(self._attempt(lambda: self._commit(partial, final)))
        if problem is not None and self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return problem

    def _prepare(self, partial: Path) -> None:
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "weights").mkdir(parents=True)

    def _write(self, partial: Path, state: TrainState) -> None:
        model_state = _sharded_model_state(self.model)
        tensors = {
            "model": model_state,
            "optimizer": self.optimizer.sharded_state(model_state, loading=False),
        }
        dist_checkpointing.save(tensors, str(partial / "weights"), validate_access_integrity=True)
        if self.rank == 0:
            (partial / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")

    def _commit(self, partial: Path, final: Path) -> None:
        if self.rank != 0:
            return
        _write_manifest(partial)
        for item in [*partial.rglob("*"), partial]:  # the data must be on the disk before its final name is
            _sync(item)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that this run was resumed past
        partial.rename(final)
        _sync(self.folder)
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    @staticmethod
    def _attempt(action: Any) -> str:
        """Run `action`; its failure as one line, or nothing."""
        try:
            action()
        except (OSError, RuntimeError, CheckpointException, CheckpointingException) as error:
            return _reason(error)
        return ""

    def _agree(self, problem: str) -> str | None:
        """The first rank's problem, if any rank has one."""
        answers = gather_bytes(problem.encode(), self.control)
        for rank, answer in enumerate(answers):
            if answer:
                return f"rank {rank}: {answer.decode(errors='replace')}"
        return None

    def find(self) -> tuple[Path | None, list[str]]:
        """Newest checkpoint that verifies, and what was wrong with newer ones. Rank 0 looks, all agree."""
        name, notes = "", []
        if self.rank == 0:
            for path in reversed(complete_checkpoints(self.folder)):
                problems = verify(path)
                if not problems:
                    name = path.name
                    break
                notes.append(f"{path}: damaged, skipped: {'; '.join(problems[:3])}")
        answer = json.loads(gather_bytes(json.dumps([name, notes]).encode(), self.control)[0])
        return (self.folder / answer[0] if answer[0] else None), answer[1]

    def load(self, path: Path) -> TrainState:
        """Restore model and optimizer from a checkpoint of any layout.

        Raises:
            CheckpointError: the files do not fit this model.
        """
        model_state = _sharded_model_state(self.model)
        optimizer_state = self.optimizer.sharded_state(model_state, loading=True)
        loaded = _read_tensors(path, {"model": model_state, "optimizer": optimizer_state})
        _copy_weights(self.model, loaded["model"])
        state = read_state(path)
        self.optimizer.load_state(loaded["optimizer"], state.step)
        return state


def load_weights(path: Path, model: nn.Module) -> TrainState:
    """Take the weights alone from a checkpoint of any layout; collective over the model's ranks.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit this model.
    """
    problems = verify(path)
    if problems:
        raise CheckpointError(
            explain(path, f"is damaged: {'; '.join(problems[:3])}", "Use another checkpoint.")
        )
    loaded = _read_tensors(path, {"model": _sharded_model_state(model)})
    _copy_weights(model, loaded["model"])
    return read_state(path)


def read_state(path: Path) -> TrainState:
    """The part of a checkpoint that is not tensors."""
    return TrainState(**json.loads((path / "state.json").read_text(encoding="utf-8")))


def _read_tensors(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        with restricted_unpickling():
            loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(path / "weights"))
    except (CheckpointException, CheckpointingException, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(explain(path, f"cannot be loaded into this model: {_reason(error)}",
                                      "Use the configuration it was written with, or another checkpoint.")
                              ) from error  # fmt: skip
    return loaded


@torch.no_grad()
def _copy_weights(model: nn.Module, loaded: dict[str, Any]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(loaded[name])
