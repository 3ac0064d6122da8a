"""Where checkpoints live: a local (or shared) folder, or an object store behind an fsspec URL.

In both a checkpoint comes into being by one atomic act of rank 0, after everything else is in place: renaming
the folder, or uploading the manifest.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lcl_mcore.checkpoint.dcp import Entries
from lcl_mcore.checkpoint.manifest import (
    MANIFEST,
    PARTIAL,
    PREFIX,
    blocks,
    checkpoint_names,
    child,
    manifest_bytes,
    read_manifest,
    remove,
    verify,
)
from lcl_mcore.errors import CheckpointError, DataError, explain
from lcl_mcore.storage import open_storage


class Store(Protocol):
    """One run's checkpoints. `clean`, `prepare`, `commit` and `remove` are for rank 0."""

    location: str
    shared: bool
    """Whether all ranks see the same files, so that a verification can be divided among them."""

    def clean(self) -> None:
        """Remove what killed saves left behind."""

    def names(self) -> list[str]:
        """All checkpoint folders, complete or not, oldest first."""

    def prepare(self, name: str) -> None:
        """Make way for a new checkpoint."""

    def staging(self, name: str) -> Path:
        """Local folder in which ranks write it."""

    def publish(self, name: str, entries: Entries) -> None:
        """Bring this rank's files, already on its disk, to where the checkpoint will be."""

    def commit(self, name: str, entries: Entries) -> None:
        """The act that makes it a checkpoint; `entries` are all its files."""

    def abandon(self, name: str) -> None:
        """Remove what a failed save left in the staging folder."""

    def remove(self, names: list[str]) -> None:
        """Remove these checkpoints, each at once as far as a reader can tell."""

    def fetch(self, name: str, part: int, parts: int) -> tuple[Path, list[str]]:
        """Local folder of a checkpoint, and what is wrong with this rank's share of it."""


def open_store(location: str, staging: Path) -> Store:
    """A store for a local path or a URL; `staging` is a local folder, used for URLs only."""
    return RemoteStore(location, staging) if "://" in location else LocalStore(Path(location))


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_written(folder: Path, entries: Entries) -> None:
    """Read files back, from the disk where the system allows it, and compare with what was meant.

    Raises:
        OSError: a file is not what was written.
    """
    for name, entry in entries.items():
        with open(folder / name, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if os.fstat(file.fileno()).st_size != entry["bytes"] or found != entry["sha256"]:
                raise OSError(f"{name} does not read back as it was written")


class LocalStore:
    """A folder that all ranks see."""

    shared = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.location = folder, str(folder)

    def clean(self) -> None:
        for leftover in self.folder.glob(f"{PREFIX}*{PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)

    def names(self) -> list[str]:
        return checkpoint_names(self.location)

    def staging(self, name: str) -> Path:
        return self.folder / (name + PARTIAL)

    def prepare(self, name: str) -> None:
        shutil.rmtree(self.staging(name), ignore_errors=True)
        self.staging(name).mkdir(parents=True)

    def publish(self, name: str, entries: Entries) -> None:
        """Nothing to do: the files are there."""

    def commit(self, name: str, entries: Entries) -> None:
        staging, final = self.staging(name), self.folder / name
        (staging / MANIFEST).write_bytes(manifest_bytes(entries))
        for item in [staging / MANIFEST, *(staging / name for name in entries), staging]:
            sync(item)  # everything must be on the disk before the final name is
        if final.exists():  # a damaged one that this run was resumed past
            remove(final)
        staging.rename(final)
        sync(self.folder)

    def abandon(self, name: str) -> None:
        shutil.rmtree(self.staging(name), ignore_errors=True)

    def remove(self, names: list[str]) -> None:
        for name in names:
            remove(self.folder / name)

    def fetch(self, name: str, part: int, parts: int) -> tuple[Path, list[str]]:
        return self.folder / name, verify(self.folder / name, part, parts)


class RemoteStore:
    """A folder of an object store. Each rank writes its files to a local folder first, then uploads them.

    An upload is atomic per object, and the manifest is uploaded last.
    """

    shared = False
    ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE = 6, 0.2, 20.0

    def __init__(self, url: str, staging: Path) -> None:
        import fsspec

        open_storage(url).close()  # refuses unknown schemes
        logging.getLogger("s3fs").setLevel(logging.ERROR)
        self.location, self.local = url.rstrip("/"), staging
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.location, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            remedy = "Install the fsspec package for this kind of URL (s3fs for s3://)."
            raise CheckpointError(explain(url, str(error), remedy)) from error

    def clean(self) -> None:
        shutil.rmtree(self.local, ignore_errors=True)
        for name in self.names():
            if not self._has_manifest(name):
                self._remove(name)

    def names(self) -> list[str]:
        return checkpoint_names(self.location)

    def staging(self, name: str) -> Path:
        return self.local / (name + PARTIAL)

    def prepare(self, name: str) -> None:
        shutil.rmtree(self.staging(name), ignore_errors=True)
        self.staging(name).mkdir(parents=True)
        self._remove(name)

    def publish(self, name: str, entries: Entries) -> None:
        for file, entry in entries.items():
            target = f"{self.root}/{name}/{file}"
            self._retried(partial(self.system.put_file, str(self.staging(name) / file), target))
            size = self._retried(partial(self.system.info, target, refresh=True))["size"]
            if size != entry["bytes"]:
                raise OSError(f"{child(self.location, f'{name}/{file}')} arrived with {size} bytes")

    def commit(self, name: str, entries: Entries) -> None:
        data = manifest_bytes(entries)
        self._retried(lambda: self.system.pipe_file(f"{self.root}/{name}/{MANIFEST}", data))

    def abandon(self, name: str) -> None:
        shutil.rmtree(self.staging(name), ignore_errors=True)

    def remove(self, names: list[str]) -> None:
        for name in names:
            self._remove(name)

    def fetch(self, name: str, part: int, parts: int) -> tuple[Path, list[str]]:
        """Download this rank's share of the files, checking them on the way.

        Ranks of one machine share the folder, and so may machines: every file comes under its final name at
        once, whoever is first.
        """
        folder = self.local / name
        storage = open_storage(child(self.location, name))
        try:
            entries = read_manifest(storage)
            folder.mkdir(parents=True, exist_ok=True)
            for file, entry in sorted(entries.items())[part::parts]:
                unfinished = folder / f"{file}.{os.getpid()}{PARTIAL}"
                total = hashlib.sha256()
                with open(unfinished, "wb") as out:
                    for block in blocks(storage, file, entry["bytes"]):
                        total.update(block)
                        out.write(block)
                if total.hexdigest() != entry["sha256"]:
                    unfinished.unlink()
                    return folder, [f"{file}: content changed since it was written"]
                unfinished.rename(folder / file)
        except (DataError, ValueError) as error:
            return folder, [f"{MANIFEST}: {error}" if isinstance(error, ValueError) else str(error)]
        finally:
            storage.close()
        return folder, []

    def _has_manifest(self, name: str) -> bool:
        return bool(self._retried(lambda: self.system.exists(f"{self.root}/{name}/{MANIFEST}")))

    def _remove(self, name: str) -> None:
        """The manifest first: what is left then does not count."""
        folder = f"{self.root}/{name}"
        self.system.invalidate_cache()
        if self._retried(lambda: self.system.exists(f"{folder}/{MANIFEST}")):
            self._retried(lambda: self.system.rm_file(f"{folder}/{MANIFEST}"))
        if self._retried(lambda: self.system.exists(folder)):
            self._retried(lambda: self.system.rm(folder, recursive=True))

    def _retried(self, request: Callable[[], Any]) -> Any:
        """The request's answer; failures that may pass are tried again."""
        pause = self.FIRST_PAUSE
        for attempt in range(self.ATTEMPTS):
            try:
                return request()
            except Exception as error:  # every back end has its own network exceptions
                if attempt == self.ATTEMPTS - 1 or isinstance(error, (PermissionError, FileNotFoundError)):
                    raise OSError(f"{self.location}: {type(error).__name__} {error}") from error
                time.sleep(pause)
                pause = min(2 * pause, self.LONGEST_PAUSE)
        raise AssertionError("unreachable")
