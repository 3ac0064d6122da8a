"""Checkpoints seen from one process, without a process group: weights alone, as a consolidated state
dict, and what `tools/checkpoint.py` does: list, verify, info, consolidate."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lcl_mcore.checkpoint.dcp import SafeReader, read_boxes
from lcl_mcore.checkpoint.shards import WEIGHTS, TensorBox
from lcl_mcore.checkpoint.store import (
    MANIFEST,
    checkpoint_names,
    child,
    open_store,
    read_manifest,
    read_state,
    require_intact,
    step_of,
    verify,
    written_config,
)
from lcl_mcore.checkpoint.weights_file import without_vocabulary_padding, write_consolidated
from lcl_mcore.config.run_folder import write_config
from lcl_mcore.errors import CheckpointError, DataError, explain
from lcl_mcore.storage import open_storage


def resolve(location: str) -> list[str]:
    """Checkpoints at a path or URL: itself, those in it, or those of a run's folder; oldest first.

    Raises:
        CheckpointError: there are none.
    """
    location = location.rstrip("/")
    if step_of(location.rsplit("/", 1)[-1]) is not None:
        return [location]
    for folder in (location, child(location, "checkpoints")):
        names = checkpoint_names(folder)
        if names:
            return [child(folder, name) for name in names]
    raise CheckpointError(
        explain(location, "holds no checkpoints", "Give a run's folder, a folder of checkpoints, or one checkpoint.")
    )


def newest(location: str) -> str:
    """The newest checkpoint at a path or URL; one without a manifest is still being uploaded, or never was to its end.

    Raises:
        CheckpointError: there are none.
    """
    paths = resolve(location)
    complete = (path for path in reversed(paths) if open_storage(path).sizes([MANIFEST]))
    return next(complete, paths[-1])


def list_checkpoints(location: str) -> list[dict[str, Any]]:
    """Path, step, files, bytes and completeness of each checkpoint; contents are not read."""
    found = []
    for path in resolve(location):
        try:
            storage = open_storage(path)
            files = read_manifest(storage).files
            storage.close()
            size, problem = sum(entry["bytes"] for entry in files.values()), ""
        except (DataError, ValueError) as error:
            files, size, problem = {}, 0, str(error)
        found.append(
            {
                "path": path,
                "step": step_of(path.rsplit("/", 1)[-1]),
                "files": len(files),
                "bytes": size,
                "problem": problem,
            }
        )
    return found


def verify_checkpoints(location: str) -> dict[str, list[str]]:
    """Problems of each checkpoint, all contents read and hashed."""
    return {path: verify(path) for path in resolve(location)}


@contextmanager
def intact(location: str) -> Iterator[Path]:
    """The newest checkpoint at a location as a verified local folder; downloaded if it is behind a URL.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = newest(location)
    if "://" not in path:
        require_intact(path)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        parent, name = path.rsplit("/", 1)
        folder, problems = open_store(parent, Path(scratch)).fetch(name, 0, 1)
        if problems:
            raise CheckpointError(explain(path, f"is damaged: {'; '.join(problems)}", "Use another checkpoint."))
        yield folder


def info(location: str) -> dict[str, Any]:
    """State, configuration and tensors of the newest checkpoint at a location."""
    with intact(location) as folder:
        tensors = SafeReader(folder).read_metadata().state_dict_metadata
        kinds: dict[str, dict[str, int]] = {}
        for key, entry in tensors.items():
            assert isinstance(entry, TensorStorageMetadata)
            total = kinds.setdefault(key.split("/", 1)[0], {"tensors": 0, "elements": 0, "boxes": 0})
            total["tensors"] += 1
            total["elements"] += math.prod(entry.size)
            total["boxes"] += len(entry.chunks)
        config = written_config(folder, lambda line: None)
        return {
            "path": newest(location),
            **asdict(read_state(folder)),
            "recipe": config.recipe,
            "written_by": {"tp": config.parallel.tensor_parallel_size, "pp": config.parallel.pipeline_parallel_size},
            "holds": kinds,
        }


def consolidated_weights(path: Path) -> dict[str, Tensor]:
    """All weights of a local checkpoint as whole fp32 tensors by full name; needs no process group.

    Raises:
        CheckpointError: damaged.
    """
    stored = SafeReader(path).read_metadata().state_dict_metadata
    shapes = {key: tuple(entry.size) for key, entry in stored.items() if key.startswith(WEIGHTS)}  # type: ignore[union-attr]
    boxes = [TensorBox(key, shape, (0,) * len(shape), torch.empty(shape)) for key, shape in shapes.items()]
    read_boxes(path, boxes)
    return {box.key.removeprefix(WEIGHTS): box.tensor for box in boxes}


def consolidate(location: str, out: Path) -> Path:
    """Write a checkpoint's weights as one file for `--init-from`, with the `config.yaml` beside it.

    Raises:
        CheckpointError: damaged, or the file cannot be written.
    """
    with intact(location) as folder:
        config = written_config(folder, print)
        state = consolidated_weights(folder)
        state = without_vocabulary_padding(state, config.model.language.vocab_size)
        path = write_consolidated(state, config.model, out)
        write_config(config, out)
    return path
