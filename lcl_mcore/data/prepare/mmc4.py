"""MMC4: `docs_*.jsonl[.zip]`, one document per line, images in a folder or as base64 in the line."""

from __future__ import annotations

import base64
import binascii
import codecs
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lcl_mcore.data.format import MAX_TEXTS, finite_number
from lcl_mcore.data.images import MAX_BYTES, BadImageError
from lcl_mcore.data.prepare.input_files import (
    compression,
    images_beside,
    input_files,
    is_system_file,
    lines,
    open_stream,
    read_image,
    zip_members,
)
from lcl_mcore.data.prepare.records import (
    BadRecordError,
    Dropped,
    InputFile,
    InputPart,
    RawDocument,
    RawImage,
    bad_image,
    documents_of,
)
from lcl_mcore.errors import DataError
from lcl_mcore.untrusted import BadJsonError, clean_text, open_regular, parse_object, skip_hole

MAX_LINE_BYTES = 128 << 20
"""Two images of the largest size as base64, and their text."""
MAX_VALUES = 1_000_000
PART_BYTES = 32 << 20
MAX_LISTED = 20_000


class Mmc4Reader:
    """Matched documents.

    Args:
        source: the file, or a folder of them.
        images: the folder with the downloaded images.
        max_line_bytes: a longer line is dropped.
    """

    def __init__(self, source: Path, images: Path | None = None, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._files = input_files(source, ".jsonl", ".jsonl.zip")
        self.image_root = images_beside(source, images)
        self._max_line_bytes = max_line_bytes

    def describe(self) -> dict[str, Any]:
        """The format and the longest line."""
        return {"format": "mmc4", "max_line_bytes": self._max_line_bytes}

    def files(self) -> Sequence[InputFile]:
        """The `.jsonl` and `.jsonl.zip` files."""
        return self._files

    def parts(self, file: InputFile) -> Sequence[InputPart]:
        """Ranges of bytes of a plain file; a compressed one, and each member of a zip, is one part.

        Nothing is read: a part begins with the first line that begins in its range. Of a hole in a sparse file only
        the first range is one: a line may begin there, and none further on.
        """
        (path,) = file.paths
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            kind = compression(stream)
            marked = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            starts = [0]
            while (start := max(starts[-1] + PART_BYTES, skip_hole(stream, starts[-1], PART_BYTES))) < size:
                starts.append(start)
        if kind == "zip" or path.suffix.lower() == ".zip":
            members = zip_members(path)
            if not any(_is_jsonl(info.filename) for info in members):
                raise DataError("holds no .jsonl file. Check the format's name.")
            return [InputPart((path, info.filename, 0, None), max(1, info.file_size // PART_BYTES)) for info in members]
        if kind:
            return [InputPart((path, "", 0, None), max(1, size // PART_BYTES))]
        if marked:
            raise DataError("is UTF-16. Write it as UTF-8.")
        return [InputPart((path, "", start, start + PART_BYTES)) for start in starts]

    def documents(self, part: InputPart) -> Iterator[RawDocument | Dropped]:
        """The documents of the lines that begin in one part."""
        path, member, start, end = part.where
        inside = f"{member}, " if member else ""
        if member and (is_system_file(member) or not _is_jsonl(member)):
            yield Dropped("system file" if is_system_file(member) else "no .jsonl file", f"member {member}")
            return
        with open_stream(path, member) as stream:
            for position, line in lines(stream, self._max_line_bytes, start, end):
                yield from documents_of(
                    f"{inside}line at byte {position}",
                    lambda line=line: [self._document(line)],  # type: ignore[misc]
                )

    def _document(self, line: bytes | None) -> RawDocument:
        if line is None:
            raise BadRecordError("line too long", f"over {self._max_line_bytes} bytes")
        if line.count(b",") > MAX_VALUES:
            raise BadRecordError("too many values in one line", f"over {MAX_VALUES}")
        try:
            data = parse_object(line, max_bytes=len(line))
        except BadJsonError as error:
            raise BadRecordError("bad JSON", str(error)) from None
        texts, infos = data.get("text_list"), data.get("image_info")
        if not isinstance(texts, list) or not isinstance(infos, list):
            raise BadRecordError("no text_list or image_info")
        if len(texts) > MAX_TEXTS or len(infos) > MAX_LISTED:
            raise BadRecordError("too many texts or images", f"{len(texts)} and {len(infos)}")
        try:
            cleaned = tuple(clean_text(text) for text in texts)
        except BadJsonError as error:
            raise BadRecordError("bad text", str(error)) from None
        url = data.get("url")
        more = {"url": clean_text(url[:2000])} if isinstance(url, str) else {}
        return RawDocument("matched", cleaned, tuple(self._image(info, len(texts)) for info in infos), more)

    def _image(self, info: Any, texts: int) -> RawImage:
        """One entry; one that cannot be used becomes a dropped image."""
        try:
            if not isinstance(info, dict):
                raise BadJsonError(f"an object is expected, found {type(info).__name__}")
            index, similarity = info.get("matched_text_index"), finite_number(info.get("matched_sim"))
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < texts:
                raise BadJsonError(f"matched_text_index {_brief(index)} is not one of the {texts} texts")
            encoded = info.get("image_base64")
            if isinstance(encoded, str):
                return RawImage(partial(_from_base64, encoded), index, similarity, "base64")
            name = clean_text(info.get("image_name"), max_chars=1000)
        except (BadJsonError, OverflowError) as error:
            return bad_image("bad entry", str(error)[:500])
        return RawImage(partial(read_image, self.image_root, name), index, similarity, name)


def _is_jsonl(member: str) -> bool:
    return member.lower().endswith(".jsonl") and not is_system_file(member)


def _brief(value: Any) -> str:
    return repr(value)[:100]


def _from_base64(text: str) -> bytes:
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise BadImageError("too many bytes", f"{len(text)} characters of base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadImageError("bad base64") from None
