"""The folder of a checkpoint: names, manifest, verification. Local or behind a URL; no process group, no model.

    step-00000100/
        .metadata, __0_0.distcp, ...  tensors (torch's distributed checkpoint format), one file per writing rank
        state.json                    step, data position, order hash, counters
        config.yaml                   the run's configuration
        metadata.json, common.pt      so that megatron's `dist_checkpointing.load` reads the folder as `torch_dist`
        manifest.json                 size and SHA-256 of every other file, and its own digest; written last

A folder without a manifest is not a checkpoint. Nothing else is needed to continue: random masks are keyed by
(seed, step, identity) and the schedule is a function of the step, so neither has a state.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lcl_mcore.checkpoint.dcp import Entries
from lcl_mcore.errors import CheckpointError, DataError, explain
from lcl_mcore.storage import Storage, open_storage

PREFIX, PARTIAL = "step-", ".partial"
MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"
MEGATRON, MEGATRON_COMMON = "metadata.json", "common.pt"
_MEGATRON_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
VERSION = 2
_BLOCK = 16 << 20


@dataclass(frozen=True)
class TrainState:
    """Everything besides tensors that a resumed run needs."""

    step: int  # optimizer steps done
    position: dict[str, Any] | None  # data position after the last batch trained on
    order_hash: str
    config_digest: str
    images_seen: int = 0
    tokens_seen: int = 0


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / checkpoint_name(step)


def step_of(name: str) -> int | None:
    """Step of a checkpoint's name; None if it is not one."""
    digits = name.removeprefix(PREFIX)
    return int(digits) if name.startswith(PREFIX) and digits.isdigit() else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a local folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path.name) is not None]
    return sorted(path for path in found if (path / MANIFEST).is_file())


def child(location: str, name: str) -> str:
    """A file or folder below a local path or URL."""
    return f"{location.rstrip('/')}/{name}"


def checkpoint_names(location: str) -> list[str]:
    """Names of all checkpoint folders, complete or not, at a local path or URL; oldest first."""
    if "://" not in location and not Path(location).is_dir():
        return []
    storage = open_storage(location)
    try:
        if not storage.remote:
            return sorted(p.name for p in Path(location).iterdir() if step_of(p.name) is not None)
        return sorted(name for name in storage.sizes() if step_of(name) is not None)
    except DataError:
        return []  # an object store has no empty folders: nothing was saved yet
    finally:
        storage.close()


def write_state(folder: Path, state: TrainState, config: str) -> Entries:
    """`state.json`, `config.yaml` and what megatron's `dist_checkpointing` looks for; their manifest entries."""
    common = io.BytesIO()
    torch.save({"step": state.step}, common)
    files = {
        STATE: json.dumps(asdict(state), indent=1).encode(),
        CONFIG: config.encode(),
        MEGATRON: json.dumps(_MEGATRON_FORMAT).encode(),
        MEGATRON_COMMON: common.getvalue(),
    }
    entries = {}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return entries


def read_state(folder: Path) -> TrainState:
    """The part of a verified local checkpoint that is not tensors."""
    return TrainState(**json.loads((folder / STATE).read_text(encoding="utf-8")))


def _digest(entries: Entries) -> str:
    return hashlib.sha256(json.dumps([VERSION, entries], sort_keys=True).encode()).hexdigest()


def manifest_bytes(entries: Entries) -> bytes:
    """Content of `manifest.json`; its digest covers all of it."""
    content = {"version": VERSION, "digest": _digest(entries), "files": entries}
    return json.dumps(content, indent=1, sort_keys=True).encode()


def parse_manifest(data: bytes) -> Entries:
    """The entries of a manifest.

    Raises:
        ValueError: it is not exactly what was written.
    """
    try:
        content = json.loads(data)
        entries, digest, version = content["files"], content["digest"], content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"unreadable ({error})") from None
    if version != VERSION:
        raise ValueError(f"version {version}, this program reads {VERSION}")
    if len(content) != 3 or digest != _digest(entries):
        raise ValueError("content changed since it was written")
    if any(Path(name).name != name for name in entries):
        raise ValueError("it names files outside the checkpoint")
    return dict(entries)


def read_manifest(storage: Storage) -> Entries:
    """The manifest of a checkpoint.

    Raises:
        ValueError: missing, damaged, or of another version.
    """
    if MANIFEST not in storage.sizes():
        raise ValueError("missing: the checkpoint is not complete")
    return parse_manifest(storage.read_whole(MANIFEST))


def blocks(storage: Storage, name: str, size: int) -> Iterator[bytes]:
    """A file's content in parts of a few megabytes."""
    for start in range(0, size, _BLOCK):
        yield storage.read(name, start, min(_BLOCK, size - start))


def verify(location: Path | str, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint: missing, short or changed files. Empty if nothing is.

    Args:
        part, parts: look at the content of every `parts`-th file only; names and sizes are always compared.
    """
    try:
        storage = open_storage(str(location))
        sizes = storage.sizes()
        entries = read_manifest(storage)
    except (DataError, ValueError) as error:
        return [f"{MANIFEST}: {error}"]
    try:
        problems = []
        for number, (name, entry) in enumerate(sorted(entries.items())):
            if name not in sizes:
                problems.append(f"{name}: missing")
            elif sizes[name] != entry["bytes"]:
                problems.append(f"{name}: {sizes[name]} bytes, {entry['bytes']} written")
            elif number % parts == part and _hash(storage, name, entry["bytes"]) != entry["sha256"]:
                problems.append(f"{name}: content changed since it was written")
    except DataError as error:
        problems = [str(error)]
    finally:
        storage.close()
    return problems


def _hash(storage: Storage, name: str, size: int) -> str:
    total = hashlib.sha256()
    for block in blocks(storage, name, size):
        total.update(block)
    return total.hexdigest()


def require_intact(location: Path | str) -> None:
    """Refuse a checkpoint that does not verify.

    Raises:
        CheckpointError: it is damaged or not complete.
    """
    problems = verify(location)
    if problems:
        raise CheckpointError(
            explain(location, f"is damaged: {'; '.join(problems[:3])}", "Use another checkpoint.")
        )


def outdated(names: list[str], keep: int, keep_every: int) -> list[str]:
    """Checkpoints that retention removes: all but the `keep` newest and every `keep_every`-th step's."""
    ordered = sorted(names)
    return [
        name
        for name in ordered[: max(len(ordered) - keep, 0)]
        if not keep_every or (step_of(name) or 0) % keep_every
    ]


def remove(path: Path) -> None:
    """Remove a local checkpoint; a kill half-way leaves nothing that looks like one."""
    doomed = path.with_name(path.name + ".removed" + PARTIAL)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
