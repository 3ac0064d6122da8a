"""MMC4: `docs_*.jsonl[.zip]`, one document per line, images in a folder or as base64 in the line."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lcl_mcore.data.format import MAX_TEXTS, finite_number
from lcl_mcore.data.images import BadImageError
from lcl_mcore.data.prepare.input_files import input_files, lines, open_lines, read_image
from lcl_mcore.data.prepare.records import Dropped, InputFile, InputPart, RawDocument, RawImage
from lcl_mcore.data.untrusted_json import BadJsonError, clean_text, parse_object

LINES_PER_PART = 2_000
MAX_LISTED = 20_000


class Mmc4Reader:
    """Matched documents. `images` is the folder with the downloaded images."""

    def __init__(self, source: Path, images: Path | None = None) -> None:
        self._files = input_files(source, ".jsonl", ".jsonl.zip")
        self._images = images or (source if source.is_dir() else source.parent) / "images"

    @property
    def image_root(self) -> Path | None:
        """The folder with the downloaded images."""
        return self._images

    def describe(self) -> dict[str, Any]:
        """The format."""
        return {"format": "mmc4"}

    def files(self) -> Sequence[InputFile]:
        """The `.jsonl` and `.jsonl.zip` files."""
        return self._files

    def parts(self, file: InputFile) -> Sequence[InputPart]:
        """Some thousand lines each."""
        (path,) = file.paths
        with open_lines(path) as stream:
            count = sum(1 for _ in lines(stream))
        return [
            InputPart((str(path), start), min(LINES_PER_PART, count - start))
            for start in range(0, count, LINES_PER_PART)
        ]

    def documents(self, part: InputPart) -> Iterator[RawDocument | Dropped]:
        """The documents of some lines."""
        path, start = part.where
        with open_lines(Path(path)) as stream:
            for number, line in enumerate(lines(stream)):
                if number >= start + LINES_PER_PART:
                    return
                if number >= start:
                    yield self._document(line)

    def _document(self, line: bytes | None) -> RawDocument | Dropped:
        if line is None:
            return Dropped("line too long")
        try:
            data = parse_object(line)
            texts, infos = data.get("text_list"), data.get("image_info")
            if not isinstance(texts, list) or not isinstance(infos, list):
                raise BadJsonError("text_list and image_info must be lists")
            if len(texts) > MAX_TEXTS or len(infos) > MAX_LISTED:
                return Dropped("too many texts or images")
            cleaned = tuple(clean_text(text) for text in texts)
            images = tuple(self._image(info, len(texts)) for info in infos)
        except BadJsonError:
            return Dropped("bad JSON")
        url = data.get("url")
        return RawDocument("matched", cleaned, images, {"url": clean_text(url)[:2000]} if isinstance(url, str) else {})

    def _image(self, info: Any, texts: int) -> RawImage:
        if not isinstance(info, dict):
            raise BadJsonError("image_info must hold objects")
        index, similarity = info.get("matched_text_index"), finite_number(info.get("matched_sim"))
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < texts:
            raise BadJsonError(f"matched_text_index {index!r} is not one of the {texts} texts")
        encoded = info.get("image_base64")
        if isinstance(encoded, str):
            return RawImage(partial(_from_base64, encoded), index, similarity, "base64")
        name = clean_text(info.get("image_name"), max_chars=1000)
        return RawImage(partial(read_image, self._images, name), index, similarity, name)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadImageError("bad base64") from None
