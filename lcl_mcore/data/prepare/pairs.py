"""img2dataset tars: KEY.jpg|png|webp, KEY.txt, KEY.json. A damaged tar gives what is not damaged."""

from __future__ import annotations

import codecs
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lcl_mcore.data.images import MAX_BYTES
from lcl_mcore.data.prepare.input_files import input_files, is_system_file, open_stream
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
from lcl_mcore.data.prepare.tar import Damage, EndMark, TarMember, walk
from lcl_mcore.rng import key64
from lcl_mcore.untrusted import BadJsonError, clean_text, open_regular, parse_object

logger = logging.getLogger(__name__)
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif", "avif")
"""Of several images of one key, the first in this order is used."""
CAPTIONS = ("txt", "caption")
TEXTS = (*CAPTIONS, "json")
MAX_TEXT_BYTES = 4 << 20
MAX_OPEN = 8
"""Samples that are held while more of their members may follow, and the bytes of these."""
MAX_OPEN_BYTES = 4 * MAX_BYTES
MAX_SAMPLES = 1_000_000
"""In one tar: their keys are remembered."""


class PairReader:
    """One pair per key and tar; nothing is ever extracted to disk."""

    def __init__(self, source: Path) -> None:
        self._files = input_files(source, ".tar", ".tgz")
        self.image_root = None  # the images lie in the tars

    def describe(self) -> dict[str, Any]:
        """The format."""
        return {"format": "pairs"}

    def files(self) -> Sequence[InputFile]:
        """The tars."""
        return self._files

    def parts(self, file: InputFile) -> Sequence[InputPart]:
        """The whole tar, weighted by size."""
        (path,) = file.paths
        with open_regular(path) as stream:
            return [InputPart(path, max(1, os.fstat(stream.fileno()).st_size >> 20))]

    def documents(self, part: InputPart) -> Iterator[RawDocument | Dropped]:
        """The pairs of one tar, in its order."""
        samples = _Samples()
        found: TarMember | EndMark | Damage | None = None
        with open_stream(part.where) as stream:
            for found in walk(stream, _is_wanted):
                if isinstance(found, EndMark):
                    yield from samples.close()
                    samples = _Samples()
                elif isinstance(found, Damage):
                    yield from samples.close()
                    yield Dropped("the tar is cut or damaged here", f"byte {found.position}", found.what)
                elif is_system_file(found.name):
                    yield Dropped("system file", f"member {found.name[:500]}")
                elif not found.regular:
                    yield Dropped("link or device in the tar", f"member {found.name[:500]}")
                else:
                    yield from samples.add(found)
        yield from samples.close()
        if isinstance(found, TarMember):
            logger.warning("%s: has no mark of its end and may be cut; all that is there is used.", part.where)


def _is_wanted(name: str, size: int) -> bool:
    extension = name.rpartition(".")[2].lower()
    return size <= (MAX_BYTES if extension in IMAGES else MAX_TEXT_BYTES if extension in TEXTS else -1)


@dataclass
class _Sample:
    """What is known of one key.

    Attributes:
        texts: contents by extension; None if one is too long.
        image: extension, size and content of the best image; the content is None if it is too long.
        extensions: all that were met.
    """

    key: str
    texts: dict[str, bytes | None] = field(default_factory=dict)
    image: tuple[str, int, bytes | None] | None = None
    extensions: set[str] = field(default_factory=set)

    @property
    def size(self) -> int:
        """Bytes held."""
        held = [*self.texts.values(), self.image[2] if self.image else None]
        return sum(len(content) for content in held if content is not None)

    def add(self, extension: str, member: TarMember) -> None:
        """Take in one member; only the best image is held."""
        self.extensions.add(extension)
        if extension in TEXTS:
            self.texts[extension] = member.content
        elif extension in IMAGES and (self.image is None or IMAGES.index(extension) < IMAGES.index(self.image[0])):
            self.image = extension, member.size, member.content


class _Samples:
    """Members to samples.

    A key is a name without its last extension, so that dots may be part of it. Members of a sample follow each other,
    but between them may stand others whose names agree up to the first dot, as webdataset's keys do: `a.jpg`,
    `a.mask.png`, `a.txt`.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Sample] = {}
        self._group = ""
        self._seen: set[int] = set()

    def add(self, member: TarMember) -> Iterator[RawDocument | Dropped]:
        """Take in one member; yields what is complete by now."""
        folder, slash, last = member.name.rpartition("/")
        stem, _, extension = last.rpartition(".")
        key, extension = (folder + slash + stem, extension.lower()) if stem else (member.name, "")
        group = folder + slash + last.partition(".")[0]
        if group != self._group:
            yield from self.close()
            self._group = group
        if key in self._open and extension in self._open[key].extensions:
            yield from self._take(key)
        self._open.setdefault(key, _Sample(key)).add(extension, member)
        while len(self._open) > MAX_OPEN or sum(sample.size for sample in self._open.values()) > MAX_OPEN_BYTES:
            yield from self._take(next(iter(self._open)))

    def close(self) -> Iterator[RawDocument | Dropped]:
        """No more members of the open samples follow."""
        while self._open:
            yield from self._take(next(iter(self._open)))

    def _take(self, key: str) -> Iterator[RawDocument | Dropped]:
        yield from documents_of(f"sample {key[:500]}", lambda: self._pair(self._open.pop(key)))

    def _pair(self, sample: _Sample) -> list[RawDocument]:
        identity = key64(sample.key)
        if identity in self._seen:
            raise BadRecordError("a key stands twice")
        if len(self._seen) >= MAX_SAMPLES:
            raise BadRecordError("too many samples in one tar", f"over {MAX_SAMPLES}")
        self._seen.add(identity)
        if sample.image is None:
            raise BadRecordError("no image in the sample", f"it has {', '.join(sorted(sample.extensions))}")
        text, url = _caption(sample)
        source = sample.key[:200]
        _, size, content = sample.image
        if content is None:
            images = [bad_image("too many bytes", f"{size} > {MAX_BYTES}", source)]
        else:
            images = [RawImage(partial(bytes, content), source=source)]
        others = len(sample.extensions.intersection(IMAGES)) - 1
        images += [bad_image("another image of the same key", source=source)] * others
        return [RawDocument("pair", (text,), tuple(images), {"source_key": clean_text(source), **url})]


def _caption(sample: _Sample) -> tuple[str, dict[str, str]]:
    """The caption of a sample, and its `url` if there is one."""
    details: dict[str, Any] = {}
    problem = ""
    if (content := sample.texts.get("json")) is not None:
        try:
            details = parse_object(content)
        except BadJsonError as error:
            problem = str(error)
    name = next((name for name in CAPTIONS if name in sample.texts), None)
    if name is None:
        text = details.get("caption")
        if not isinstance(text, str):
            raise BadRecordError("no caption", problem)
    else:
        content = sample.texts[name]
        if content is None:
            raise BadRecordError("caption too long", f"over {MAX_TEXT_BYTES} bytes")
        text = _decoded(content)
    text = clean_text(text).strip()
    if not text:
        raise BadRecordError("empty caption")
    url = details.get("url")
    return text, {"url": clean_text(url)[:2000]} if isinstance(url, str) else {}


def _decoded(content: bytes) -> str:
    """UTF-8, or UTF-16 with a byte order mark."""
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadRecordError("caption is not UTF-8", str(error)) from None
