"""Bytes of a data set by range, from a local folder or an object store."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lcl_mcore.errors import DataError, explain

T = TypeVar("T")
REMOTE_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "hf", "https", "memory")


class Storage(Protocol):
    """Read access to the files of one folder. Safe to use from several threads."""

    root: str
    remote: bool

    def read(self, name: str, start: int, size: int) -> bytes:
        """Exactly `size` bytes of a file from `start` on."""

    def read_whole(self, name: str) -> bytes:
        """A whole small file."""

    def sizes(self) -> dict[str, int]:
        """Name and size of every file in the folder."""

    def close(self) -> None:
        """Give back what is held."""


def open_storage(path: str, *, retries: int = 5, cache_bytes: int = 256 << 20) -> Storage:
    """A local folder, or a folder behind a URL of a known scheme. No shell, no chained URLs."""
    scheme = path.split("://", 1)[0] if "://" in path else ""
    if scheme == "file":
        return LocalStorage(Path(path.removeprefix("file://")))
    if not scheme and not path.startswith("pipe:"):
        return LocalStorage(Path(path))
    if scheme not in REMOTE_SCHEMES or "::" in path:
        rule = f"only local folders and URLs of {', '.join(REMOTE_SCHEMES)} are read"
        raise DataError(explain(f"data path {path}", rule, "Copy the data set to one of these."))
    return RemoteStorage(path.rstrip("/"), retries=retries, cache_bytes=cache_bytes)


class LocalStorage:
    """Files of a folder, through a bounded number of open descriptors."""

    remote = False
    MAX_OPEN = 128

    def __init__(self, folder: Path) -> None:
        self.root = str(folder)
        self._folder = folder
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, start: int, size: int) -> bytes:
        """Exactly `size` bytes; an end of file before that means a damaged file."""
        try:
            with self._lock:  # a descriptor may be closed by another thread once it is outside the lock
                descriptor = os.dup(self._descriptor(name))
            try:
                data = os.pread(descriptor, size, start)
                while len(data) < size and (
                    more := os.pread(descriptor, size - len(data), start + len(data))
                ):
                    data += more
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unreadable(self.root, name, str(error.strerror)) from error
        if len(data) != size:
            raise _too_short(self.root, name, start, size, len(data))
        return data

    def read_whole(self, name: str) -> bytes:
        """A whole small file."""
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise _unreadable(self.root, name, str(error.strerror)) from error

    def sizes(self) -> dict[str, int]:
        """Name and size of every file in the folder."""
        try:
            with os.scandir(self._folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise _unreadable(self.root, "", str(error.strerror)) from error

    def close(self) -> None:
        """Close all descriptors."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _descriptor(self, name: str) -> int:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        if len(self._files) >= self.MAX_OPEN:
            os.close(self._files.popitem(last=False)[1])
        self._files[name] = os.open(self._folder / name, os.O_RDONLY)
        return self._files[name]


class RemoteStorage:
    """Files behind an fsspec URL: range requests, retries with growing pauses, a bounded cache."""

    remote = True
    FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0

    def __init__(self, url: str, *, retries: int, cache_bytes: int) -> None:
        import fsspec

        self.root = url
        self._retries = retries
        self._cache = ByteCache(cache_bytes)
        try:
            # stale listings and open connections must not be shared with another folder's reader
            self._system, self._folder = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            remedy = "Install the fsspec package for this kind of URL (s3fs for s3://)."
            raise DataError(explain(f"data path {url}", str(error), remedy)) from error

    def read(self, name: str, start: int, size: int) -> bytes:
        """Exactly `size` bytes, from the cache when an earlier request covered them."""
        cached = self._cache.find(name, start, size)
        if cached is not None:
            return cached
        path = self._path(name)
        data = self._retried(
            name, lambda: self._system.cat_file(path, start=start, end=start + size), listed=True
        )
        if len(data) != size:
            raise _too_short(self.root, name, start, size, len(data))
        return data

    def read_ahead(self, name: str, start: int, size: int) -> None:
        """Fetch a range into the cache, in one request."""
        if self._cache.find(name, start, size) is None:
            self._cache.add(name, start, self.read(name, start, size))

    def read_whole(self, name: str) -> bytes:
        """A whole small file."""
        data: bytes = self._retried(name, lambda: self._system.cat_file(self._path(name)))
        return data

    def sizes(self) -> dict[str, int]:
        """Name and size of every file in the folder."""
        listing: list[dict[str, Any]] = self._retried(
            "", lambda: self._system.ls(self._folder, detail=True, refresh=True)
        )
        return {item["name"].rsplit("/", 1)[-1]: int(item["size"] or 0) for item in listing}

    def close(self) -> None:
        """Drop the cache."""
        self._cache.clear()

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _retried(self, name: str, request: Callable[[], T], *, listed: bool = False) -> T:
        """The request's answer; failures that may pass are tried again.

        A missing file is missing, unless it was there when the folder was `listed`: stores that restart
        or move data answer so for a while.
        """
        pause = self.FIRST_PAUSE
        for attempt in range(self._retries + 1):
            try:
                return request()
            except Exception as error:  # every back end has its own network exceptions
                final = isinstance(error, PermissionError) or (
                    isinstance(error, FileNotFoundError) and not listed
                )
                if final or attempt == self._retries:
                    detail = f"{attempt + 1} attempts failed, last: {type(error).__name__} {error}"
                    raise _unreadable(self.root, name, detail) from error
                time.sleep(pause)
                pause = min(2 * pause, self.LONGEST_PAUSE)
        raise AssertionError("unreachable")


class ByteCache:
    """Ranges of files, oldest dropped first when their sum exceeds a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._ranges: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._starts: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def find(self, name: str, start: int, size: int) -> bytes | None:
        """The bytes, if one held range covers them."""
        with self._lock:
            starts = self._starts.get(name, [])
            place = bisect_right(starts, start) - 1
            if place < 0:
                return None
            data = self._ranges[name, starts[place]]
            offset = start - starts[place]
            return data[offset : offset + size] if offset + size <= len(data) else None

    def add(self, name: str, start: int, data: bytes) -> None:
        """Hold a range."""
        with self._lock:
            previous = self._ranges.pop((name, start), b"")
            if not previous:
                insort(self._starts.setdefault(name, []), start)
            self._ranges[name, start] = data
            self._held += len(data) - len(previous)
            while self._held > self._limit and len(self._ranges) > 1:
                (old_name, old_start), old = self._ranges.popitem(last=False)
                self._starts[old_name].remove(old_start)
                self._held -= len(old)

    def clear(self) -> None:
        """Hold nothing."""
        with self._lock:
            self._ranges.clear()
            self._starts.clear()
            self._held = 0


def _unreadable(root: str, name: str, detail: str) -> DataError:
    where = f"{root}/{name}" if name else root
    return DataError(
        explain(where, f"cannot be read: {detail}", "Check that the data set is there and complete.")
    )


def _too_short(root: str, name: str, start: int, size: int, got: int) -> DataError:
    rule = f"ends {size - got} bytes too early (wanted {size} bytes from {start}): the file is damaged"
    return DataError(explain(f"{root}/{name}", rule, "Copy the shard again or prepare the data set again."))
