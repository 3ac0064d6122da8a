"""Where checkpoints live, and what makes a folder one: names, manifest, verification. No process group, no model.

    step-00000100/
        .metadata, __0_0.distcp, ...  tensors (torch's distributed checkpoint format), one file per writing rank
        state.json                    step, data position, order hash, counters
        config.yaml                   the run's configuration
        metadata.json, common.pt      so that megatron's `dist_checkpointing.load` reads the folder as `torch_dist`
        manifest.json                 run, step, and size and hash of every other file, under one digest; written last
    run-id                            the run whose checkpoints these are

A folder without a manifest is not a checkpoint. Nothing else is needed to continue: random masks are keyed by
(seed, step, identity) and the schedule is a function of the step, so neither has a state.

A checkpoint comes into being by one atomic act of rank 0, after everything else is in place: renaming the folder
(`FolderStore`), or uploading the manifest (`ObjectStore`).
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from lcl_mcore.checkpoint.hashing import Algorithm, hash_of
from lcl_mcore.config.run_folder import read_config
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.errors import CheckpointError, DataError, explain, printable
from lcl_mcore.storage import (
    PARTIAL,
    LocalStorage,
    MissingError,
    RemoteStorage,
    Storage,
    UnreachableError,
    atomic_file,
    atomic_write,
    blocks,
    open_storage,
    sync,
)

PREFIX = "step-"
MANIFEST, STATE, CONFIG, RUN = "manifest.json", "state.json", "config.yaml", "run-id"
MEGATRON, MEGATRON_COMMON = "metadata.json", "common.pt"
_MEGATRON_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
VERSION = 3
_SHA256_VERSION = 2  # the one before: SHA-256, no run, no step

MAX_JSON_BYTES, MAX_JSON_ITEMS = 16 << 20, 1 << 19  # of a manifest or state; ten thousand ranks need a tenth of each

_EXACT = ConfigDict(extra="forbid", strict=True)  # of JSON files: no other fields, no conversions

T = TypeVar("T")
_Count = Annotated[int, Field(ge=0, lt=10**12)]
_Text = Annotated[str, Field(max_length=128)]
_Bytes = Annotated[int, Field(ge=0, lt=2**63)]
_Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Run = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


@with_config(_EXACT)
class FileEntry(TypedDict):
    """What a manifest says of a file."""

    bytes: _Bytes
    hash: _Hash


Entries = dict[str, FileEntry]  # by file name


# --- names ---


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def step_of(name: str) -> int | None:
    """Step of a checkpoint's name; None if it is not one."""
    found = re.fullmatch(PREFIX + "([0-9]{8,12})", name)
    return int(found[1]) if found and checkpoint_name(int(found[1])) == name else None


def _step(name: str) -> int:
    step = step_of(name)
    assert step is not None
    return step


def child(location: str, name: str) -> str:
    """A file or folder below a local path or URL."""
    return f"{location.rstrip('/')}/{name}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a local folder, oldest first."""
    found = [folder / name for name in checkpoint_names(str(folder))]
    return [path for path in found if (path / MANIFEST).is_file()]


def checkpoint_names(location: str) -> list[str]:
    """Names of all checkpoint folders, complete or not, at a local path or URL; oldest first.

    Raises:
        DataError: the place cannot be read. One that does not exist holds none.
    """
    with closing(open_storage(location)) as storage:
        return _names_in(storage)


def _names_in(storage: Storage) -> list[str]:
    try:
        return sorted((name for name in storage.names() if step_of(name) is not None), key=_step)
    except MissingError:
        return []


def outdated(names: list[str], good: Set[str], keep: int, keep_every: int) -> list[str]:
    """Checkpoints that retention removes: what is older than the `keep` newest good ones.

    Args:
        names: all checkpoints, oldest first.
        good: those of them that were verified. Others neither count nor, while they are newer, go.
        keep_every: steps whose multiples stay; 0 for none.
    """
    counted = [name for name in names if name in good][-keep:]
    if len(counted) < keep:
        return []
    older = names[: names.index(counted[0])]
    return [name for name in older if not keep_every or _step(name) % keep_every]


# --- state ---


@with_config(_EXACT)
@dataclass(frozen=True)
class TrainState:
    """Everything besides tensors that a resumed run needs.

    step           optimizer steps done
    position       data position after the last batch trained on
    order_hash     hash of the order of all samples so far
    config_digest  of the configuration that wrote it
    """

    step: _Count
    position: dict[str, Any] | None
    order_hash: _Text
    config_digest: _Text
    images_seen: Annotated[int, Field(ge=0, lt=10**18)] = 0
    tokens_seen: Annotated[int, Field(ge=0, lt=10**18)] = 0


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
    entries: Entries = {}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        sync(folder / name)
        entries[name] = {"bytes": len(data), "hash": hash_of([data])}
    return entries


def read_state(folder: Path) -> TrainState:
    """The part of a verified local checkpoint that is not tensors.

    Raises:
        CheckpointError: it is not what a run writes, or belongs to another step than the folder's name says.
    """
    try:
        with closing(LocalStorage(folder)) as storage:
            return parse_state(_read_json(storage, STATE), folder.name)
    except (DataError, ValueError) as error:
        raise CheckpointError(explain(folder / STATE, f"cannot be used: {error}", "Use another checkpoint.")) from None


def parse_state(data: bytes, folder: str) -> TrainState:
    """Content of `state.json` in a folder of this name.

    Raises:
        ValueError: it is not what a run writes, or belongs to another step than the folder's name says.
    """
    state, named = _parse(_STATE, data), step_of(folder)
    if named is not None and named != state.step:
        raise ValueError(f"belongs to step {state.step}, the folder's name to step {named}")
    return state


def written_config(folder: Path, log: Callable[[str], None]) -> RunConfig:
    """The configuration that wrote a verified local checkpoint: the copy in it, which its manifest vouches for.

    Checkpoints of early versions have none; for them it is that of the run's folder, and `log` is told.

    Raises:
        ConfigError: it is missing, or not a configuration.
    """
    own = folder / CONFIG
    if own.is_file():
        return read_config(own)
    beside = folder.absolute().parents[1] / CONFIG
    log(f"{folder} holds no {CONFIG}: the configuration is taken from {beside}")
    return read_config(beside)


def _read_json(storage: Storage, name: str) -> bytes:
    """A small file.

    Raises:
        ValueError: it is not there, or larger than any that a run writes; it is not read then.
        DataError: it cannot be read.
    """
    size = storage.sizes([name]).get(name)
    if size is None:
        raise ValueError("missing: the checkpoint is not complete")
    if size > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
    return storage.read(name, 0, size)


def _parse(kind: TypeAdapter[T], data: bytes) -> T:
    """Content of a JSON file.

    Raises:
        ValueError: it is not JSON of this type.
    """
    if data.count(b",") > MAX_JSON_ITEMS:
        raise ValueError(f"unreadable (more than {MAX_JSON_ITEMS} values)")
    try:
        return kind.validate_json(data, strict=True)
    except ValidationError as error:
        if error.error_count() > 1000:  # to spell them out takes a kilobyte each
            raise ValueError(f"unreadable ({error.error_count()} wrong values)") from None
        problem = error.errors(include_url=False)[0]
        place = printable(".".join(str(part) for part in problem["loc"]), 80) or "content"
        value = printable(repr(problem["input"]), 40)
        raise ValueError(f"unreadable ({place} = {value}: {problem['msg']})") from None


# --- manifest ---


@dataclass(frozen=True)
class Manifest:
    """What makes a folder a checkpoint, and says which one.

    run            id of the run; empty before version 3
    step           optimizer steps done; None before version 3
    config_digest  of the configuration that wrote it
    files          every other file
    algorithm      of their hashes
    """

    run: str
    step: int | None
    config_digest: str
    files: Entries
    algorithm: Algorithm = "blake3"


@with_config(ConfigDict(extra="ignore", strict=True))
class _AnyVersion(TypedDict):
    version: int


@with_config(_EXACT)
class _Version3(TypedDict):
    version: int
    run: _Run
    step: _Count
    config_digest: _Text
    files: Entries
    digest: _Hash


@with_config(_EXACT)
class _Sha256Entry(TypedDict):
    bytes: _Bytes
    sha256: _Hash


@with_config(_EXACT)
class _Version2(TypedDict):
    version: int
    files: dict[str, _Sha256Entry]
    digest: _Hash


_STATE, _RUN, _ANY_VERSION = TypeAdapter(TrainState), TypeAdapter(_Run), TypeAdapter(_AnyVersion)
_VERSION_3, _VERSION_2 = TypeAdapter(_Version3), TypeAdapter(_Version2)
_FILE_NAME = re.compile(r"[\w.-]{1,128}", re.ASCII)


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def manifest_bytes(manifest: Manifest) -> bytes:
    """Content of `manifest.json`; its digest covers all of it."""
    content = {"version": VERSION, **asdict(manifest)}
    del content["algorithm"]
    return json.dumps({**content, "digest": hash_of([_canonical(content)])}, indent=1, sort_keys=True).encode()


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in a file.

    Raises:
        ValueError: it is not exactly what was written.
    """
    version = _parse(_ANY_VERSION, data)["version"]
    if version == VERSION:
        new = _parse(_VERSION_3, data)
        digest = hash_of([_canonical({name: value for name, value in new.items() if name != "digest"})])
        manifest = Manifest(new["run"], new["step"], new["config_digest"], new["files"])
        written = new["digest"]
    elif version == _SHA256_VERSION:
        old = _parse(_VERSION_2, data)
        digest = hash_of([_canonical([version, old["files"]])], "sha256")
        files: Entries = {name: {"bytes": e["bytes"], "hash": e["sha256"]} for name, e in old["files"].items()}
        manifest, written = Manifest("", None, "", files, "sha256"), old["digest"]
    else:
        raise ValueError(f"version {version}, this program reads {_SHA256_VERSION} and {VERSION}")
    if digest != written:
        raise ValueError("content changed since it was written")
    if any(not _FILE_NAME.fullmatch(name) or name in (".", "..", MANIFEST) for name in manifest.files):
        raise ValueError("it names files outside the checkpoint")
    return manifest


def read_manifest(storage: Storage) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: missing, damaged, of another version, or of another step than the folder's name says.
        DataError: it cannot be read.
    """
    manifest = parse_manifest(_read_json(storage, MANIFEST))
    if STATE not in manifest.files:
        raise ValueError(f"it lacks {STATE}")
    named = step_of(storage.root.rstrip("/").rsplit("/", 1)[-1])
    if None not in (named, manifest.step) and named != manifest.step:
        raise ValueError(f"it belongs to step {manifest.step}, the folder's name to step {named}")
    return manifest


# --- the run ---


def run_of_folder(storage: Storage) -> str:
    """Id of the run whose checkpoints a folder holds; empty if that is not known.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with closing(storage):
            return _RUN.validate_python(_read_json(storage, RUN).decode("ascii", "replace").strip())
    except (MissingError, ValueError):
        return ""


def run_of_checkpoint(storage: Storage) -> str | None:
    """Id of the run that a checkpoint belongs to; empty if it does not say, None if its manifest cannot be read."""
    try:
        with closing(storage):
            return read_manifest(storage).run
    except (DataError, ValueError):
        return None


# --- verification ---


def verify(location: Path | str, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint: missing, short or changed files. Empty if nothing is.

    Args:
        part, parts: look at every `parts`-th file only, and at the manifest.
    """
    problems = []
    try:
        with closing(open_storage(str(location))) as storage:
            manifest = read_manifest(storage)
            own = dict(sorted(manifest.files.items())[part::parts])
            sizes = storage.sizes(own)
            for name, entry in own.items():
                if name not in sizes:
                    problems.append(f"{name}: missing")
                elif sizes[name] != entry["bytes"]:
                    problems.append(f"{name}: {sizes[name]} bytes, {entry['bytes']} written")
                elif hash_of(blocks(storage, name, entry["bytes"]), manifest.algorithm) != entry["hash"]:
                    problems.append(f"{name}: content changed since it was written")
            if STATE in own and not problems:
                problems = _state_problems(_read_json(storage, STATE), storage.root)
    except DataError as error:
        problems.append(str(error))
    except ValueError as error:
        problems.append(f"{MANIFEST}: {error}")
    return problems


def _state_problems(data: bytes, location: str) -> list[str]:
    try:
        parse_state(data, location.rstrip("/").rsplit("/", 1)[-1])
    except ValueError as error:
        return [f"{STATE}: {error}"]
    return []


def require_intact(location: Path | str) -> None:
    """Refuse a checkpoint that does not verify.

    Raises:
        CheckpointError: it is damaged or not complete.
    """
    problems = verify(location)
    if problems:
        raise CheckpointError(explain(location, f"is damaged: {'; '.join(problems[:3])}", "Use another checkpoint."))


def verify_written(folder: Path, entries: Entries) -> None:
    """Read files back, from the disk where the system allows it, and compare with what was meant.

    Raises:
        OSError: a file is not what was written.
    """
    for name, entry in entries.items():
        with open(folder / name, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = hash_of(iter(partial(file.read, 1 << 20), b""))
            if os.fstat(file.fileno()).st_size != entry["bytes"] or found != entry["hash"]:
                raise OSError(f"{name} does not read back as it was written")


# --- stores ---


class CheckpointStore(Protocol):
    """One run's checkpoints. `clean`, `prepare`, `commit` and `remove` are for rank 0."""

    location: str
    shared: bool
    """Whether all ranks see the same files, so that a verification can be divided among them."""

    def storage_of(self, name: str = "") -> Storage:
        """The files of a checkpoint, or those beside the checkpoints."""

    def names(self) -> list[str]:
        """All checkpoint folders, complete or not, oldest first."""

    def clean(self) -> None:
        """Remove what killed saves left behind."""

    def unfinished(self, name: str) -> bool:
        """Whether this is what a save left that did not end, and no checkpoint, damaged or not."""

    def staging(self, name: str) -> Path:
        """Local folder in which ranks write a checkpoint."""

    def prepare(self, name: str) -> None:
        """Make way for a new checkpoint."""

    def publish(self, name: str, entries: Entries) -> None:
        """Bring this rank's files, already on its disk, to where the checkpoint will be."""

    def commit(self, name: str, manifest: Manifest) -> None:
        """The act that makes it a checkpoint, of files that are already on the disk; the folder is then its run's."""

    def remove(self, names: list[str]) -> None:
        """Remove these checkpoints, each at once as far as a reader can tell."""

    def set_aside(self, name: str, reason: str) -> str:
        """Give a checkpoint that cannot be used a name that does not count as one, `REASON-step-...`; returns it."""

    def fetch(self, name: str, part: int, parts: int) -> tuple[Path, list[str]]:
        """Local folder of a checkpoint, and what is wrong with this rank's share of it."""


def open_store(location: str, staging: Path) -> CheckpointStore:
    """A store for a local path or a URL; `staging` is a local folder, used for object stores only.

    Raises:
        CheckpointError: a URL of an unknown kind, or its fsspec package is not installed.
    """
    try:
        storage = open_storage(location.rstrip("/"))
    except DataError as error:
        raise CheckpointError(str(error)) from error
    if isinstance(storage, LocalStorage):
        return FolderStore(Path(storage.root))
    return ObjectStore(storage, staging)


def _aside(name: str, reason: str, taken: Collection[str]) -> str:
    """A new name for a checkpoint that cannot be used."""
    names = (f"{reason}-{name}" + (f".{number}" if number else "") for number in count())
    return next(aside for aside in names if aside not in taken)


def _delete(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class FolderStore:
    """A folder that all ranks see."""

    shared = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.location = folder, str(folder)

    def storage_of(self, name: str = "") -> Storage:
        return LocalStorage(self.folder / name)

    def names(self) -> list[str]:
        return _names_in(self.storage_of())

    def clean(self) -> None:
        for pattern in (f"{PREFIX}*{PARTIAL}", f".{RUN}.*{PARTIAL}"):
            for leftover in self.folder.glob(pattern):
                _delete(leftover)

    def unfinished(self, name: str) -> bool:
        return False  # it has another name until it is complete

    def staging(self, name: str) -> Path:
        return self.folder / (name + PARTIAL)

    def prepare(self, name: str) -> None:
        _delete(self.staging(name))
        self.staging(name).mkdir(parents=True)

    def publish(self, name: str, entries: Entries) -> None:
        """Nothing to do: the files are there."""

    def commit(self, name: str, manifest: Manifest) -> None:
        staging = self.staging(name)
        (staging / MANIFEST).write_bytes(manifest_bytes(manifest))
        for item in (staging / MANIFEST, staging):
            sync(item)  # all must be on the disk before the final name is
        if run_of_folder(self.storage_of()) != manifest.run:
            atomic_write(self.folder / RUN, f"{manifest.run}\n")
        if os.path.lexists(self.folder / name):  # what a restore could not set aside, or somebody else's
            self.set_aside(name, "replaced")
        staging.rename(self.folder / name)
        sync(self.folder)

    def remove(self, names: list[str]) -> None:
        """A kill half-way leaves nothing that looks like a checkpoint."""
        for path in (self.folder / name for name in names):
            if os.path.lexists(path):
                doomed = path.with_name(f"{path.name}.removed{PARTIAL}")
                _delete(doomed)
                path.rename(doomed)
                _delete(doomed)

    def set_aside(self, name: str, reason: str) -> str:
        aside = _aside(name, reason, os.listdir(self.folder))
        (self.folder / name).rename(self.folder / aside)
        sync(self.folder)
        return aside

    def fetch(self, name: str, part: int, parts: int) -> tuple[Path, list[str]]:
        return self.folder / name, verify(self.folder / name, part, parts)


class ObjectStore:
    """A folder of an object store. Each rank writes its files to a local folder first, then uploads them.

    An upload is atomic per object, and the manifest is uploaded last.
    """

    shared = False

    def __init__(self, storage: RemoteStorage, staging: Path) -> None:
        self.storage, self.location, self.local = storage, storage.root, staging

    def storage_of(self, name: str = "") -> Storage:
        return self.storage.below(name) if name else self.storage

    def names(self) -> list[str]:
        return _names_in(self.storage)

    def clean(self) -> None:
        shutil.rmtree(self.local, ignore_errors=True)
        self.remove([name for name in self.names() if self.unfinished(name)])

    def unfinished(self, name: str) -> bool:
        return not self.storage.has(f"{name}/{MANIFEST}")

    def staging(self, name: str) -> Path:
        return self.local / (name + PARTIAL)

    def prepare(self, name: str) -> None:
        _delete(self.staging(name))
        self.staging(name).mkdir(parents=True)
        if self.storage.has(f"{name}/{MANIFEST}"):  # what a restore could not set aside, or somebody else's
            self.set_aside(name, "replaced")
        self.remove([name])

    def publish(self, name: str, entries: Entries) -> None:
        for file, entry in entries.items():
            self.storage.upload(self.staging(name) / file, f"{name}/{file}", entry["bytes"])

    def commit(self, name: str, manifest: Manifest) -> None:
        if run_of_folder(self.storage_of()) != manifest.run:
            self.storage.write(RUN, f"{manifest.run}\n".encode())
        self.storage.write(f"{name}/{MANIFEST}", manifest_bytes(manifest))

    def remove(self, names: list[str]) -> None:
        """The manifest first: what is left then does not count."""
        for name in names:
            self.storage.remove(f"{name}/{MANIFEST}")
            self.storage.remove(name)

    def set_aside(self, name: str, reason: str) -> str:
        """Not atomic: a kill half-way leaves files under both names, which count as damaged or not complete."""
        aside = _aside(name, reason, self.storage.names())
        self.storage.move(name, aside)
        return aside

    def fetch(self, name: str, part: int, parts: int) -> tuple[Path, list[str]]:
        """Download this rank's share of the files, checking them on the way.

        Ranks of one machine share the folder, and so may machines: every file comes under its final name at
        once, whoever is first.
        """
        folder = self.local / name
        storage = self.storage.below(name)
        try:
            manifest = read_manifest(storage)
            folder.mkdir(parents=True, exist_ok=True)
            for file, entry in sorted(manifest.files.items())[part::parts]:
                with atomic_file(folder / file) as unfinished, open(unfinished, "wb") as out:
                    content = _kept(blocks(storage, file, entry["bytes"]), out)
                    if hash_of(content, manifest.algorithm) != entry["hash"]:
                        raise DataError(f"{file}: content changed since it was written")
                if file == STATE and (problems := _state_problems((folder / file).read_bytes(), name)):
                    return folder, problems
        except UnreachableError:
            raise
        except (DataError, ValueError) as error:
            return folder, [f"{MANIFEST}: {error}" if isinstance(error, ValueError) else str(error)]
        finally:
            storage.close()
        return folder, []


def _kept(content: Iterable[bytes], out: BinaryIO) -> Iterator[bytes]:
    """The same blocks, each written on the way."""
    for block in content:
        out.write(block)
        yield block
