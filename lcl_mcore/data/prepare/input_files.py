"""Input folders that may hold anything: which files are read, and how, with bounds.

Only regular files are opened, so a pipe cannot stop the program; compressed ones are recognised by their content.
"""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import io
import logging
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, NoReturn

from lcl_mcore.data.images import MAX_BYTES, BadImageError
from lcl_mcore.data.prepare.records import InputFile
from lcl_mcore.errors import DataError, explain
from lcl_mcore.untrusted import open_regular, read_regular, skip_hole

logger = logging.getLogger(__name__)
MAX_RATIO = 200
"""Unpacked to packed bytes, from `SMALL` unpacked bytes on."""
SMALL = 1 << 20
MAX_DIRECTORY = 4 << 20
"""Bytes of a zip's directory."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MAGIC = {b"PK\3\4": "zip", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
UNPACK: dict[str, Callable[[BinaryIO], io.BufferedIOBase]] = {
    "gzip": lambda packed: gzip.GzipFile(fileobj=packed),
    "bzip2": lambda packed: bz2.BZ2File(packed),
}
ENCRYPTED = 1  # flag of a zip's member
SKIPPED_BYTES = 1 << 20  # read at once of a line that is too long


# --- files ---


def inputs(path: Path, *suffixes: str) -> list[Path]:
    """The file itself, or all files with one of the suffixes below a folder, sorted.

    Compressed ones belong to them, and `.JSONL` is as good as `.jsonl`. Links to folders are named and not followed.

    Raises:
        DataError: nothing is there, or a folder cannot be listed.
    """
    if not path.is_dir():
        if not os.path.lexists(path):
            raise DataError(explain(path, "does not exist", "Check the path."))
        return [path]

    def refuse(error: OSError) -> NoReturn:
        raise DataError(explain(error.filename, f"cannot be listed: {error.strerror}", "Check its permissions."))

    wanted = tuple(suffix + more for suffix in suffixes for more in ("", *COMPRESSED))
    found: list[Path] = []
    for folder, inner, names in os.walk(path, onerror=refuse):
        found += [Path(folder, name) for name in names if name.lower().endswith(wanted)]
        for link in (name for name in inner if os.path.islink(os.path.join(folder, name))):
            logger.warning("%s: links to folders are not followed.", os.path.join(folder, link))
    if not found:
        rule = f"holds no {' or '.join(suffixes)} file"
        raise DataError(explain(path, rule, "Check the folder and the format's name."))
    return sorted(found)


def input_files(source: Path, *suffixes: str) -> list[InputFile]:
    """Each of the `inputs`, named by its path below `source`."""
    base = source if source.is_dir() else source.parent
    return [InputFile(path.relative_to(base).as_posix(), (path,)) for path in inputs(source, *suffixes)]


def images_beside(source: Path, images: Path | None) -> Path:
    """The folder of downloaded images: the one that was given, else `images` beside the input files."""
    return images or (source if source.is_dir() else source.parent) / "images"


def is_system_file(name: str) -> bool:
    """Whether a path below the input, or in an archive, is what an operating system or editor left there."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", ".", "..")]
    return bool(parts) and (
        any(part == "__MACOSX" or part.startswith(".") for part in parts)
        or parts[-1].lower() in ("thumbs.db", "desktop.ini")
    )


def read_image(root: Path, name: str) -> bytes:
    """An image file below `root`. Names that lead out of it, and links, are refused."""
    try:
        base = os.path.realpath(root)
        path = Path(base, name)
        if not name or not Path(os.path.realpath(path)).is_relative_to(base):
            raise BadImageError("path leaves the folder")
        if path.is_symlink() or not path.exists():
            raise BadImageError("missing file")
        return read_regular(path, MAX_BYTES)
    except BadImageError:
        raise
    except ValueError as error:  # a name that no file can have
        raise BadImageError("missing file", str(error)[:200]) from None
    except OSError as error:
        reasons = {errno.EFBIG: "too many bytes", errno.ENAMETOOLONG: "missing file"}
        raise BadImageError(reasons.get(error.errno or 0, "unreadable file"), str(error.strerror)) from None


# --- streams ---


def compression(stream: BinaryIO) -> str:
    """How the content at the beginning of a file is compressed; empty if it is not."""
    beginning = stream.read(6)
    stream.seek(0)
    return next((kind for magic, kind in MAGIC.items() if beginning.startswith(magic)), "")


@contextmanager
def open_stream(path: Path, member: str = "") -> Iterator[IO[bytes]]:
    """A file's content, unpacked if it is compressed by gzip or bzip2; or that of one member of a zip.

    Raises:
        DataError: it is compressed in another way, or (while it is read) unpacks to more than `MAX_RATIO` times its
            size. A damaged one raises what the standard library does.
    """
    with open_regular(path) as packed:
        if member:
            with _zip(packed) as archive, _zip_member(archive, member) as stream:
                yield stream
            return
        kind = compression(packed)
        if not kind:
            yield packed
        elif kind in UNPACK:
            limit = max(MAX_RATIO * os.fstat(packed.fileno()).st_size, SMALL)
            with UNPACK[kind](packed) as unpacked:
                yield io.BufferedReader(_Limited(unpacked, limit))
        else:
            raise DataError(f"is compressed ({kind}). Unpack it first.")


def zip_members(path: Path) -> list[zipfile.ZipInfo]:
    """The files in a zip.

    Raises:
        DataError: it is damaged or encrypted, or one of them unpacks to more than `MAX_RATIO` times its size.
    """
    with open_regular(path) as packed:
        try:
            with _zip(packed) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise DataError(f"is damaged: {error}. Download it again.") from error
    for info in members:
        if info.flag_bits & ENCRYPTED:
            raise DataError(f"is encrypted ({info.filename[:200]}). Unpack it first.")
        if info.file_size > max(MAX_RATIO * info.compress_size, SMALL):
            rule = f"unpacks to {info.file_size} bytes, more than {MAX_RATIO} times its size"
            raise DataError(f"{rule}. Unpack it by hand if you trust it.")
    return members


def _zip_member(archive: zipfile.ZipFile, member: str) -> IO[bytes]:
    try:
        return archive.open(member)
    except (NotImplementedError, RuntimeError, KeyError, ValueError) as error:
        raise DataError(f"holds {member[:200]} in a form that cannot be read: {error}. Unpack it first.") from error


def _zip(packed: BinaryIO) -> zipfile.ZipFile:
    """A zip whose directory is of bounded size: it is read into memory at once."""
    return zipfile.ZipFile(_SmallReads(io.FileIO(os.dup(packed.fileno()))))


class _SmallReads(io.BufferedReader):
    """Refuses to read very much at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory has {size} bytes, at most {MAX_DIRECTORY} are read")
        return super().read(size)


class _Limited(io.RawIOBase):
    """Passes on at most `limit` bytes, then refuses."""

    def __init__(self, stream: io.BufferedIOBase, limit: int) -> None:
        self._stream, self._left = stream, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        content = self._stream.read(len(buffer))
        self._left -= len(content)
        if self._left < 0:
            raise DataError(f"unpacks to more than {MAX_RATIO} times its size. Unpack it by hand if you trust it.")
        buffer[: len(content)] = content
        return len(content)


def lines(
    stream: IO[bytes], max_bytes: int, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, bytes | None]]:
    """The lines that begin in a range of bytes.

    Args:
        stream: positioned at 0, or anything that seeks if `start` is not 0.
        max_bytes: of one line; of a longer one nothing is held.

    Yields:
        Where the line begins, and the line, or None if it is too long. Empty lines are skipped, and so is a byte
        order mark at the beginning of the file.
    """
    position = start
    if start:
        stream.seek(start - 1)
        position = _skip_line(stream, start - 1, end)
    while end is None or position < end:
        begin = position
        line = stream.readline(max_bytes + 1)
        if not line:
            return
        position += len(line)
        if len(line) > max_bytes and not line.endswith(b"\n"):
            position = _skip_line(stream, position, None)
            yield begin, None
            continue
        if begin == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield begin, line


def _skip_line(stream: IO[bytes], position: int, end: int | None) -> int:
    """Read from a position to the end of the line, or to `end`; returns the position then."""
    while end is None or position < end:
        position = skip_hole(stream, position)
        piece = stream.readline(SKIPPED_BYTES)
        position += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return position
