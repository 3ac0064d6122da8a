"""img2dataset tars: KEY.jpg|png|webp, KEY.txt, KEY.json. Of a damaged tar, what is before the damage."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lcl_mcore.data.images import MAX_BYTES
from lcl_mcore.data.prepare.input_files import input_files
from lcl_mcore.data.prepare.records import Dropped, InputFile, InputPart, RawDocument, RawImage
from lcl_mcore.data.untrusted_json import BadJsonError, clean_text, parse_object

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "json", "caption")


class PairReader:
    """One pair per key and tar; nothing is ever extracted to disk."""

    def __init__(self, source: Path) -> None:
        self._files = input_files(source, ".tar")

    @property
    def image_root(self) -> Path | None:
        """None: the images lie in the tars."""
        return None

    def describe(self) -> dict[str, Any]:
        """The format."""
        return {"format": "pairs"}

    def files(self) -> Sequence[InputFile]:
        """The tars."""
        return self._files

    def parts(self, file: InputFile) -> Sequence[InputPart]:
        """The whole tar, weighted by size."""
        (path,) = file.paths
        return [InputPart(str(path), max(1, path.stat().st_size >> 20))]

    def documents(self, part: InputPart) -> Iterator[RawDocument | Dropped]:
        """The pairs of one tar, in its order."""
        seen: set[str] = set()
        key = ""
        members: dict[str, bytes] = {}
        size = Path(part.where).stat().st_size
        try:
            with tarfile.open(part.where, "r:") as tar:
                for member in tar:
                    if member.offset_data + member.size > size:
                        raise EOFError
                    stem, extension = _split(member.name)
                    if not member.isfile() or extension not in IMAGES + TEXTS:
                        continue
                    if stem != key:
                        yield from self._pair(key, members, seen)
                        key, members = stem, {}
                    if member.size > MAX_BYTES:
                        members[extension] = b""
                        continue
                    stream = tar.extractfile(member)
                    members[extension] = stream.read() if stream else b""
                if tar.offset >= size:  # the blocks that end every tar are not there
                    raise EOFError
        except (tarfile.TarError, OSError, EOFError, ValueError):
            yield Dropped("the tar is cut or damaged here")
            return
        yield from self._pair(key, members, seen)

    def _pair(self, key: str, members: dict[str, bytes], seen: set[str]) -> Iterator[RawDocument | Dropped]:
        if not members:
            return
        if key in seen:
            yield Dropped("a key stands twice")
            return
        seen.add(key)
        image = next((members[e] for e in IMAGES if e in members), None)
        if image is None:
            yield Dropped("no image in the sample")
            return
        try:
            details = parse_object(members["json"]) if "json" in members else {}
            caption = members.get("txt", members.get("caption"))
            text = caption.decode("utf-8", "replace") if caption is not None else details.get("caption")
            text = clean_text(text).strip()
        except BadJsonError:
            yield Dropped("bad JSON or no caption")
            return
        if not text:
            yield Dropped("empty caption")
            return
        more = {"source_key": clean_text(key)[:200]}
        if isinstance(details.get("url"), str):
            more["url"] = clean_text(details["url"])[:2000]
        yield RawDocument("pair", (text,), (RawImage(lambda: image, source=key[:200]),), more)


def _split(name: str) -> tuple[str, str]:
    """Key and extension: the extension begins at the first dot after the last slash."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()
