"""JSON lines beside a run's checkpoints: read whatever lies there, appended whatever the disk does.

These files are optional: no fault of theirs ends a run. Imports nothing heavy: a command reads them first of all.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lcl_mcore.storage import atomic_file
from lcl_mcore.untrusted import open_regular

MAX_LINE = 1 << 20
"""Bytes of the longest line that is read."""
MAX_FILE = 4 << 30
"""Bytes of the longest file that is read or rewritten; a longer one is left as it is."""
MAX_WAITING = 16 << 20
"""Bytes kept in memory while a file cannot be written."""
RETRY_SECONDS = 10.0
LF = b"\n"

Record = dict[str, Any]


class Records(NamedTuple):
    """What a file holds: its records in order, and how many of its lines are damaged."""

    records: list[Record]
    damaged: int


def number(record: Record, name: str) -> bool:
    """Whether a field is a finite number."""
    value = record.get(name)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_records(path: Path, valid: Callable[[Record], bool]) -> Records:
    """Read a file; nothing if there is no regular file to read.

    Args:
        path: file of one JSON object per line.
        valid: whether an object is what the file should hold.
    """
    records, damaged = [], 0
    for line, begins in _pieces(path):
        record = _parsed(line, valid) if begins else None
        if record is not None:
            records.append(record)
        elif begins and line.strip():
            damaged += 1
    return Records(records, damaged)


def _parsed(line: bytes, valid: Callable[[Record], bool]) -> Record | None:
    if len(line) > MAX_LINE:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also text that is not UTF-8
        return None
    return record if isinstance(record, dict) and valid(record) else None


def _pieces(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Lines with their ends, one that is too long in pieces; and whether a piece begins a line."""
    try:
        file = open_regular(path, os.O_RDONLY)
    except OSError:
        return
    with file:
        if os.fstat(file.fileno()).st_size > MAX_FILE:
            return
        begins = True
        while piece := file.readline(MAX_LINE + 1):
            yield piece, begins
            begins = piece.endswith(LF)


class LineWriter:
    """Appends records to a file. What cannot be written waits in memory and is tried again; the user is told once."""

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        """Nothing is opened before the first record."""
        self.path, self.log = path, log
        self._file: BinaryIO | None = None
        self._waiting = bytearray()
        self._inside_line = False  # the end of the file is the beginning of our own waiting line
        self._retry_at: float | None = None  # monotonic seconds; None while the file can be written
        self._lost = 0

    def write(self, record: Record, *, durable: bool = False) -> None:
        """Append one record.

        Args:
            record: plain JSON values.
            durable: whether it is on the disk when this returns, if the disk permits.
        """
        line = json.dumps(record).encode() + LF
        if len(self._waiting) + len(line) > MAX_WAITING:
            self._lost += 1
        else:
            self._waiting += line
        if self._retry_at is None or time.monotonic() >= self._retry_at:
            self._flush(durable)

    def drop(self, valid: Callable[[Record], bool], unwanted: Callable[[Record], bool]) -> list[Record]:
        """Remove records from the file; damaged lines stay as they are.

        Returns:
            The records removed; they are still there, and the user is told, if the file cannot be replaced.
        """

        def unwanted_record(piece: bytes, begins: bool) -> Record | None:
            record = _parsed(piece, valid) if begins else None
            return record if record is not None and unwanted(record) else None

        self.close()
        dropped = [record for piece in _pieces(self.path) if (record := unwanted_record(*piece))]
        if dropped:
            try:
                with atomic_file(self.path) as unfinished, open(unfinished, "wb") as file:
                    file.writelines(piece[0] for piece in _pieces(self.path) if not unwanted_record(*piece))
            except OSError as error:
                self.log(
                    f"WARNING {self.path} cannot be replaced ({error.strerror or error}): it keeps lines of lost steps"
                )
        return dropped

    def close(self) -> None:
        """Write what waits, if that is possible now; the writer may be used again."""
        if self._waiting:
            self._flush(durable=False)
        if self._waiting:
            self.log(f"WARNING {self.path}: its last {self._waiting.count(LF)} lines could not be written")
        self._close_file()

    def _flush(self, durable: bool) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            while self._waiting:
                written = os.write(self._file.fileno(), self._waiting)
                self._inside_line = not self._waiting[:written].endswith(LF)
                del self._waiting[:written]
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._failed(error)
            return
        if self._retry_at is not None:
            lost = f"; {self._lost} lines were lost" if self._lost else ""
            self.log(f"{self.path} can be written again{lost}")
            self._retry_at, self._lost = None, 0

    def _failed(self, error: OSError) -> None:
        if self._retry_at is None:
            reason = error.strerror or str(error)
            self.log(f"WARNING {self.path} cannot be written ({reason}): training goes on, its lines wait in memory")
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self._close_file()

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        if file.seek(0, os.SEEK_END) and not self._inside_line:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != LF:  # a crash cut the last line: what follows begins a new one
                self._waiting[:0] = LF
        return file

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:  # a network disk may report an earlier write here
                self.log(f"WARNING {self.path}: {error.strerror or error}")
