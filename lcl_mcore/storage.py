"""Files of one folder, local or in an object store: reads by range, and writes that are whole or not at all.

`open_storage` gives the folder; `atomic_write` and `atomic_file` replace one local file. Every request to an object
store goes through one place that repeats what may pass, with growing pauses.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
import threading
import time
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lcl_mcore.errors import ConfigError, DataError, explain
from lcl_mcore.untrusted import open_regular, read_regular

T = TypeVar("T")
REMOTE_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "hf", "https", "memory")
PARTIAL = ".partial"
MAX_WHOLE = 1 << 30
"""Bytes of the longest local file that is read as a whole."""
_BLOCK = 16 << 20


class MissingError(DataError):
    """A file or folder that is not there, as opposed to one that cannot be read."""


class UnreachableError(DataError):
    """A store that did not answer, however often it was asked: what it holds may be as good as ever."""


# --- local writes ---


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes the name `path` once it is complete and on the disk.

    After an error, or a kill, `path` is what it was before. Several processes may replace the same file.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: bytes | str) -> None:
    """The file has either its old or its new content (text as UTF-8), whatever happens meanwhile.

    Raises:
        OSError: it cannot be written; the old content is still there.
    """
    with atomic_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder with its parents; returns those that were not there, the innermost first.

    Raises:
        OSError: it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, as long as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def require_writable(path: Path, option: str, *, file: bool = False) -> None:
    """Refuse an output that cannot be written, before any work is done for it; leaves nothing behind.

    Args:
        path: the folder, or with `file` the file.
        option: how it was given, for the message.

    Raises:
        ConfigError: it cannot be written.
    """
    remedy = "Choose another place, or correct its rights."
    if file and path.is_dir():
        raise ConfigError(explain(f"{option} {path}", "is a folder, a file is written here", remedy))
    if not file and path.exists() and not path.is_dir():
        raise ConfigError(explain(f"{option} {path}", "is a file, a folder is written here", remedy))
    folder, made = path.parent if file else path, list[Path]()
    try:
        made = make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(explain(f"{option} {path}", f"cannot be written ({error.strerror})", remedy)) from None
    finally:
        remove_empty(made)


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- folders ---


def open_storage(path: str, *, retries: int = 5, cache_bytes: int = 256 << 20) -> Storage:
    """A local folder, or a folder behind a URL of a known scheme. No shell, no chained URLs.

    Args:
        retries: how often a request to an object store is repeated.
        cache_bytes: bound of what is read ahead from an object store.

    Raises:
        DataError: a URL of another kind, or its fsspec package is not installed.
    """
    scheme = path.split("://", 1)[0] if "://" in path else ""
    if scheme == "file":
        return LocalStorage(Path(path.removeprefix("file://")))
    if not scheme and not path.startswith("pipe:"):
        return LocalStorage(Path(path))
    if scheme not in REMOTE_SCHEMES or "::" in path:
        rule = f"only local folders and URLs of {', '.join(REMOTE_SCHEMES)} are read"
        raise DataError(explain(f"path {path}", rule, "Copy the files to one of these."))
    return RemoteStorage(path.rstrip("/"), retries=retries, cache_bytes=cache_bytes)


class LocalStorage:
    """Files of a folder, through a bounded number of open descriptors. Safe to use from several threads.

    Raises:
        MissingError: by every method, when the file or folder does not exist.
        DataError: by every method, when it cannot be read, or a file ends too early.
    """

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
                while len(data) < size and (more := os.pread(descriptor, size - len(data), start + len(data))):
                    data += more
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unreadable(name, error) from error
        if len(data) != size:
            raise _too_short(self.root, name, start, size, len(data))
        return data

    def read_whole(self, name: str) -> bytes:
        """A whole small file."""
        try:
            return read_regular(self._folder / name, MAX_WHOLE)
        except OSError as error:
            raise self._unreadable(name, error) from error

    def sizes(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """Name and size of every regular file in the folder, or of those of `names` that are there."""
        found = {}
        try:
            for name in os.listdir(self._folder) if names is None else names:
                try:
                    status = os.stat(self._folder / name)
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ELOOP):
                        continue
                    raise
                if stat.S_ISREG(status.st_mode):
                    found[name] = status.st_size
        except OSError as error:
            raise self._unreadable("", error) from error
        return found

    def names(self) -> list[str]:
        """Names of the files and folders in it."""
        try:
            return os.listdir(self._folder)
        except OSError as error:
            raise self._unreadable("", error) from error

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
        with open_regular(self._folder / name) as file:
            self._files[name] = os.dup(file.fileno())
        return self._files[name]

    def _unreadable(self, name: str, error: OSError) -> DataError:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return _unreadable(self.root, name, str(error.strerror), MissingError if missing else DataError)


class RemoteStorage:
    """Files behind an fsspec URL: range requests, retries with growing pauses, a bounded read-ahead cache.

    Reads, and fails, as `LocalStorage` does; names may hold slashes. fsspec's own caches belong to one open file
    each and fetch fixed blocks; the documents that are read ahead here lie anywhere in thousands of files, under
    one bound for all of them.
    """

    remote = True
    FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0

    def __init__(self, url: str, *, retries: int, cache_bytes: int) -> None:
        import fsspec

        logging.getLogger("s3fs").setLevel(logging.ERROR)  # it reports each failed try; we say the last
        self.root = url
        self._retries = retries
        self._cache = ByteCache(cache_bytes)
        try:
            # stale listings and open connections must not be shared with another folder's reader
            self._system, self._folder = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            remedy = "Install the fsspec package for this kind of URL (s3fs for s3://)."
            raise DataError(explain(f"path {url}", str(error), remedy)) from error

    # reading

    def read(self, name: str, start: int, size: int) -> bytes:
        """Exactly `size` bytes, from the cache when an earlier request covered them."""
        cached = self._cache.find(name, start, size)
        if cached is not None:
            return cached
        path = self._path(name)

        def request() -> bytes:
            data: bytes = self._system.cat_file(path, start=start, end=start + size)
            if len(data) < size:
                raise _too_short(self.root, name, start, size, len(data))
            if len(data) > size:
                rule = f"{len(data)} bytes came for the {size} from {start}"
                raise DataError(explain(f"{self.root}/{name}", rule, "Use a server that answers range requests."))
            return data

        return self._retried(name, request, listed=True) if size else b""

    def read_ahead(self, name: str, start: int, size: int) -> None:
        """Fetch a range into the cache, in one request."""
        if self._cache.find(name, start, size) is None:
            self._cache.add(name, start, self.read(name, start, size))

    def read_whole(self, name: str) -> bytes:
        """A whole small file."""
        size = self._size(name)
        if size is None:  # some web servers do not tell
            data: bytes = self._retried(name, lambda: self._system.cat_file(self._path(name)))
            return data
        return self.read(name, 0, size)

    def sizes(self, names: Collection[str] | None = None) -> dict[str, int]:
        """Name and size of every file in the folder, or of those of `names` that are there."""
        found = {name: size for name, size, folder in self._listing() if not folder}
        return found if names is None else {name: found[name] for name in names if name in found}

    def names(self) -> list[str]:
        """Names of the files and folders in it."""
        return [name for name, _, _ in self._listing()]

    def below(self, name: str) -> RemoteStorage:
        """A folder in it, through the same connections: a new client costs more than many requests."""
        inner = copy(self)
        inner.root, inner._folder, inner._cache = f"{self.root}/{name}", self._path(name), ByteCache(0)
        return inner

    def has(self, name: str) -> bool:
        """Whether there is such a file or folder now."""
        self._system.invalidate_cache()
        return bool(self._retried(name, lambda: self._system.exists(self._path(name))))

    # writing

    def upload(self, path: Path, name: str, size: int) -> None:
        """Bring a local file of `size` bytes there; the object appears at once or not at all."""
        self._send(name, size, lambda target: self._system.put_file(str(path), target))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; the object appears at once or not at all."""
        self._send(name, len(data), lambda target: self._system.pipe_file(target, data))

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless there is one of this name, by the store's conditional put; whether it was written.

        After a lost answer a try that succeeded is followed by one that does not: look at the content.
        """

        def request() -> bool:
            try:
                self._system.pipe_file(self._path(name), data, mode="create")
            except Exception:  # every back end says in its own way that the object is there
                self._system.invalidate_cache()
                if self._system.exists(self._path(name)):
                    return False
                raise
            return True

        return self._retried(name, request)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, if there is one."""
        if self.has(name):
            self._retried(name, lambda: self._system.rm(self._path(name), recursive=True))

    def move(self, name: str, target: str) -> None:
        """Give the files of a folder another one; each is copied, then all are removed, which is not atomic."""
        self._system.invalidate_cache()
        for path in self._retried(name, lambda: self._system.find(self._path(name))):
            goal = self._path(target) + path.removeprefix(self._path(name))
            self._retried(name, partial(self._system.cp_file, path, goal))
        self.remove(name)

    def close(self) -> None:
        """Drop the cache."""
        self._cache.clear()

    def _send(self, name: str, size: int, put: Callable[[str], object]) -> None:
        def request() -> None:
            put(self._path(name))
            arrived = self._system.info(self._path(name), refresh=True)["size"]
            if arrived != size:
                rule = f"arrived with {arrived} bytes of {size}"
                raise DataError(explain(f"{self.root}/{name}", rule, "Check the object store."))

        self._retried(name, request)

    def _size(self, name: str) -> int | None:
        size: int | None = self._retried(name, lambda: self._system.info(self._path(name), refresh=True)).get("size")
        return size

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _listing(self) -> list[tuple[str, int, bool]]:
        """Name, size and whether it is a folder, of everything in the folder."""
        found: list[dict[str, Any]] = self._retried(
            "", lambda: self._system.ls(self._folder, detail=True, refresh=True)
        )
        return [
            (item["name"].rstrip("/").rsplit("/", 1)[-1], int(item["size"] or 0), item["type"] == "directory")
            for item in found
        ]

    def _retried(self, name: str, request: Callable[[], T], *, listed: bool = False) -> T:
        """The request's answer; failures that may pass, an answer of another length among them, are tried again.

        A missing file is missing, unless it was there when the folder was `listed`: stores that restart
        or move data answer so for a while.
        """
        pause = self.FIRST_PAUSE
        for attempt in range(self._retries + 1):
            try:
                return request()
            except Exception as error:  # every back end has its own network exceptions
                missing = isinstance(error, FileNotFoundError)
                final = isinstance(error, PermissionError) or (missing and not listed)
                if final or attempt == self._retries:
                    if isinstance(error, DataError):
                        raise
                    detail = f"{attempt + 1} attempts failed, last: {type(error).__name__} {error}"
                    kind = MissingError if missing else UnreachableError
                    raise _unreadable(self.root, name, detail, kind) from error
                time.sleep(pause)
                pause = min(2 * pause, self.LONGEST_PAUSE)
        raise AssertionError("unreachable")


Storage = LocalStorage | RemoteStorage


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


def blocks(storage: Storage, name: str, size: int) -> Iterator[bytes]:
    """A file's first `size` bytes, in blocks of a few megabytes."""
    for start in range(0, size, _BLOCK):
        yield storage.read(name, start, min(_BLOCK, size - start))


def _unreadable(root: str, name: str, detail: str, kind: type[DataError]) -> DataError:
    where = f"{root}/{name}" if name else root
    return kind(explain(where, f"cannot be read: {detail}", "Check that it is there and complete."))


def _too_short(root: str, name: str, start: int, size: int, got: int) -> DataError:
    rule = f"ends {size - got} bytes too early (wanted {size} bytes from {start}): the file is damaged"
    return DataError(explain(f"{root}/{name}", rule, "Copy the file again or make it again."))
