"""What a reader hands to the engine: input files, their parts, documents as found, and losses with their reason.

A reader divides its input into files, files into parts, and yields for every record of a part its documents or a
`Dropped`; nothing that was read disappears without one. There are two boundaries for bad input. `documents_of` is
that of one record: what is bad in it becomes a counted drop. The engine's is that of one file: a reader that cannot
go on raises `DataError`, the file is named, and the others are still prepared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

from lcl_mcore.data.format import Kind
from lcl_mcore.data.images import BadImageError
from lcl_mcore.data.prepare.time_limit import TooSlowError, time_limit

TOO_SLOW = "took too long"


@dataclass(frozen=True)
class InputFile:
    """A file of the input, or a few small ones that are read together.

    Attributes:
        name: differs between the files of one input and stays when others come or go: the path below the input.
        paths: what is read; prepared again when the size or the time of one changes. Empty for input that is no file.
    """

    name: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class InputPart:
    """A part of a file, prepared by one process.

    Attributes:
        where: says to the reader what it is; picklable.
        weight: its share of the work, for the progress bar.
    """

    where: Any
    weight: int = 1


@dataclass(frozen=True)
class RawImage:
    """An image as found. `read` may raise `BadImageError`."""

    read: Callable[[], bytes]
    text_index: int = 0
    similarity: float = 1.0
    source: str = ""


def bad_image(reason: str, detail: str = "", source: str = "") -> RawImage:
    """An entry of a document's images that cannot be used: counted as dropped, while the document stays."""

    def read() -> NoReturn:
        raise BadImageError(reason, detail)

    return RawImage(read, source=source)


@dataclass(frozen=True)
class RawDocument:
    """A document as found.

    Attributes:
        more: stored with it.
        where: its place in the file, as in `Dropped`; `documents_of` fills it.
    """

    kind: Kind
    texts: tuple[str, ...]
    images: tuple[RawImage, ...]
    more: dict[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Dropped:
    """A record or document that cannot be used.

    Attributes:
        reason: a short phrase, the same for all of its kind: it is counted.
        where: its place in the file: "line 17", "row 5 of row group 0", "member a/b.jpg".
        detail: what was found there; one example per reason is shown.
    """

    reason: str
    where: str = ""
    detail: str = ""


class BadRecordError(ValueError):
    """Raised while a record is read, where it cannot be used; becomes a `Dropped`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def documents_of(where: str, read: Callable[[], Iterable[RawDocument | Dropped]]) -> list[RawDocument | Dropped]:
    """What one record holds: its documents, or why there is none. It has `ITEM_SECONDS` of time.

    Args:
        where: the record's place in its file.
        read: parses it. `BadRecordError` is a drop with its reason. So is what the standard library and ours raise
            about bad content: `ValueError` (bad JSON, text, base64 and images among them), `ArithmeticError` and
            `RecursionError`. Every other exception is a bug, or concerns the file.
    """
    try:
        with time_limit():
            found = [replace(outcome, where=outcome.where or where) for outcome in read()]
        return found or [Dropped("empty record", where)]
    except TooSlowError as error:
        return [Dropped(TOO_SLOW, where, str(error))]
    except BadRecordError as error:
        return [Dropped(error.reason, where, error.detail)]
    except (ValueError, ArithmeticError, RecursionError) as error:
        return [Dropped("unreadable record", where, f"{type(error).__name__}: {error}")]


class Reader(Protocol):
    """One public format."""

    @property
    def image_root(self) -> Path | None:
        """The folder in which images are looked up; None if they lie in the input files."""

    def describe(self) -> dict[str, Any]:
        """The format's name and every setting that changes the output; neither files nor folders."""

    def files(self) -> Sequence[InputFile]:
        """All files of the input, in a fixed order."""

    def parts(self, file: InputFile) -> Sequence[InputPart]:
        """The parts of one file, in a fixed order; cheap. `DataError`: it cannot be read."""

    def documents(self, part: InputPart) -> Iterator[RawDocument | Dropped]:
        """The documents of one part, in a fixed order. `DataError` names the place where the file is damaged."""


@runtime_checkable
class FindsImages(Protocol):
    """A reader that can list images without reading documents in full."""

    def images(self, part: InputPart) -> Iterator[Sequence[RawImage]]:
        """The images of each document of one part; more than `documents` has is allowed."""
