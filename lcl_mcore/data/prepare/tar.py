"""Walks a tar of unknown origin forward, in bounded memory.

The standard library's reader ends at the first mark of an end, keeps a record of every member, and reads the
extensions of a header whole, whatever their size. This walk reads tars that were joined end to end, and goes on at the
next header behind damage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tarfile import (
    BLOCKSIZE,
    DIRTYPE,
    GNUTYPE_LONGLINK,
    GNUTYPE_LONGNAME,
    GNUTYPE_SPARSE,
    NUL,
    REGULAR_TYPES,
    SOLARIS_XHDTYPE,
    SUPPORTED_TYPES,
    XGLTYPE,
    XHDTYPE,
    HeaderError,
    TarInfo,
)
from typing import IO

from lcl_mcore.untrusted import skip_hole

MAX_EXTENSION = 64 << 10
"""Bytes of a long name, or of a header in the pax format."""
PAX_TYPES = (XHDTYPE, SOLARIS_XHDTYPE)
PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=\n]{1,200})=")
PIECE = 1 << 20
SPARSE_GOES_ON, SPARSE_GOES_ON_AGAIN = 482, 504  # bytes of the old GNU format's sparse headers


@dataclass(frozen=True)
class TarMember:
    """Anything but a folder.

    Attributes:
        name: bytes of it that are not UTF-8 are written as `\\xe9`.
        regular: a file with a content of its own; not a link, a device, or a file with holes.
        content: None if it was not wanted.
    """

    name: str
    regular: bool
    size: int
    content: bytes | None


@dataclass(frozen=True)
class EndMark:
    """A tar ends here; another one may follow."""


@dataclass(frozen=True)
class Damage:
    """What lies between this place and the next member is lost."""

    position: int
    what: str


def walk(stream: IO[bytes], wanted: Callable[[str, int], bool]) -> Iterator[TarMember | EndMark | Damage]:
    """Everything in a tar, or in several that were joined, in order.

    Args:
        wanted: of a member's name and size, whether its content is read.
    """
    source = _Source(stream)
    extension = _Extension()
    lost = ended = False
    while block := source.up_to(BLOCKSIZE):
        begin = source.position - len(block)
        if not block.strip(NUL):
            if not ended:
                yield EndMark()
            source.skip_hole()
            lost, ended, extension = False, True, _Extension()
            continue
        header = _header(block)
        if header is None:
            if not lost:
                yield Damage(begin, "no header where one must be")
            lost, ended, extension = True, False, _Extension()
            continue
        lost = ended = False
        try:
            if header.type in (GNUTYPE_LONGNAME, GNUTYPE_LONGLINK, XGLTYPE, *PAX_TYPES):
                extension.read(header, source)
                continue
            name, size = extension.name or header.name, header.size if extension.size is None else extension.size
            holes = extension.holes or header.type == GNUTYPE_SPARSE
            if header.type == GNUTYPE_SPARSE and block[SPARSE_GOES_ON]:
                while source.exactly(BLOCKSIZE)[SPARSE_GOES_ON_AGAIN]:
                    pass
            regular = header.type in REGULAR_TYPES and not holes
            stored = size if regular or holes or header.type not in SUPPORTED_TYPES else 0
            shown = _shown(name)
            content = source.exactly(stored) if regular and not extension.bad and wanted(shown, size) else None
            source.skip(stored if content is None else 0)
            if extension.bad:
                yield Damage(begin, extension.bad)
            elif header.type != DIRTYPE:
                yield TarMember(shown, regular, size, content)
            source.skip_padding(stored)
        except _CutError:
            yield Damage(begin, f"the file ends inside {_shown(extension.name or header.name)[:200]}")
            return
        extension = _Extension()
    if extension.met or not source.position:
        yield Damage(source.position, "the file ends here")


class _CutError(Exception):
    """The stream ends too early."""


class _Source:
    """A stream that knows its position."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.position = self._looked = 0

    def up_to(self, size: int) -> bytes:
        content = self._stream.read(size)
        self.position += len(content)
        return content

    def exactly(self, size: int) -> bytes:
        content = self.up_to(size)
        if len(content) < size:
            raise _CutError
        return content

    def skip(self, size: int) -> None:
        while size > 0:
            size -= len(self.exactly(min(size, PIECE)))

    def skip_hole(self) -> None:
        """Now and then a hole is looked for, so that it takes no time."""
        if self.position >= self._looked + PIECE:
            self._looked = self.position = skip_hole(self._stream, self.position, BLOCKSIZE)

    def skip_padding(self, size: int) -> None:
        """Behind the last member it may be missing."""
        self.up_to(-size % BLOCKSIZE)


class _Extension:
    """What headers of their own say about the member that follows them.

    Attributes:
        met: whether there are any.
        bad: why they cannot be used; then neither can the member.
    """

    def __init__(self) -> None:
        self.met = False
        self.name = ""
        self.size: int | None = None
        self.holes = False
        self.bad = ""

    def read(self, header: TarInfo, source: _Source) -> None:
        self.met = True
        if header.type in (GNUTYPE_LONGLINK, XGLTYPE):
            source.skip(header.size)
        elif header.size > MAX_EXTENSION:
            self.bad = f"a header of {header.size} bytes, at most {MAX_EXTENSION} are read"
            source.skip(header.size)
        elif header.type == GNUTYPE_LONGNAME:
            self.name = source.exactly(header.size).split(NUL, 1)[0].decode("utf-8", "surrogateescape")
        else:
            self._read_pax(source.exactly(header.size))
        source.skip_padding(header.size)

    def _read_pax(self, content: bytes) -> None:
        position, content = 0, content.rstrip(NUL)
        while position < len(content):
            record = PAX_RECORD.match(content, position)
            end = position + int(record[1]) if record else 0
            if record is None or not record.end() < end <= len(content):
                self.bad = "a header in the pax format that cannot be read"
                return
            key, value = record[2], content[record.end() : end - 1]
            if key == b"path":
                self.name = value.decode("utf-8", "surrogateescape")
            elif key == b"size" and value.isdigit() and len(value) < 20:
                self.size = int(value)
            elif key.startswith(b"GNU.sparse."):
                self.holes = True
            position = end


def _header(block: bytes) -> TarInfo | None:
    """None: it is not a header."""
    try:
        header = TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (HeaderError, ValueError):
        return None
    return header if header.size >= 0 else None


def _shown(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
