"""Reading images and lines from input folders that may hold anything."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lcl_mcore.data.images import MAX_BYTES, BadImageError
from lcl_mcore.data.prepare.records import InputFile
from lcl_mcore.data.untrusted_json import MAX_BYTES as MAX_LINE
from lcl_mcore.errors import DataError, explain

MAX_RATIO = 200
REMEDY = "Download the file again."


def read_image(root: Path, name: str) -> bytes:
    """An image file below `root`. Names that lead out of it, and links, are refused."""
    base = root.resolve()
    path = base / name
    try:
        if not name or "\0" in name or not path.resolve().is_relative_to(base):
            raise BadImageError("path leaves the folder", name[:200])
        if path.is_symlink() or not path.is_file():
            raise BadImageError("missing file", name[:200])
        if path.stat().st_size > MAX_BYTES:
            raise BadImageError("too many bytes", name[:200])
        return path.read_bytes()
    except OSError as error:
        raise BadImageError("unreadable file", f"{name[:200]}: {error.strerror}") from None


@contextmanager
def open_lines(path: Path) -> Iterator[IO[bytes]]:
    """A `.jsonl` file, or the one such member of a `.zip` (its unpacked size is checked first)."""
    if path.suffix != ".zip":
        with path.open("rb") as stream:
            yield stream
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".jsonl")]
            if len(members) != 1:
                raise DataError(explain(path, f"holds {len(members)} .jsonl files, expected one", REMEDY))
            info = members[0]
            if info.file_size > MAX_RATIO * max(info.compress_size, 1):
                rule = f"unpacks to {info.file_size} bytes, more than {MAX_RATIO} times its size"
                raise DataError(explain(path, rule, "Unpack it by hand if you trust it."))
            with archive.open(info) as stream:
                yield stream
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(explain(path, f"is damaged: {error}", REMEDY)) from error


def lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines without their end; None for one that is too long (it is skipped, not held)."""
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE)
            yield None
        elif line.strip():
            yield line


def inputs(path: Path, *suffixes: str) -> list[Path]:
    """The file itself, or all files with one of the suffixes below a folder, sorted."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(explain(path, "does not exist", "Check the path."))
    found = [
        Path(folder) / name
        for folder, _, names in os.walk(path)
        for name in names
        if name.endswith(suffixes) and not name.startswith(".")
    ]
    if not found:
        rule = f"holds no {' or '.join(suffixes)} file"
        raise DataError(explain(path, rule, "Check the folder and the format's name."))
    return sorted(found)


def input_files(source: Path, *suffixes: str) -> list[InputFile]:
    """Each of the `inputs`, named by its path below `source`."""
    base = source if source.is_dir() else source.parent
    return [InputFile(path.relative_to(base).as_posix(), (path,)) for path in inputs(source, *suffixes)]
