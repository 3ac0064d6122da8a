"""A prepared data set: its documents, how shards are written, and random access to them.

A data set is a folder (or object-store prefix) with `dataset.json`, the manifest, and shards `NAME.tar` with their
indices `NAME.index.npy`. A sample of a shard is `KEY.json` followed by `KEY.0.jpg`, `KEY.1.png`, ...; plain
`webdataset` reads it. The index is one int64 array: the number of the first member of every document and one past the
last, then offset and size of every member's content in the tar. The manifest lists the shards; its fingerprint covers
their content. Files appear under their final names only when complete, so a killed writer leaves no half shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from lcl_mcore.errors import DataError, explain
from lcl_mcore.storage import RemoteStorage, atomic_write, open_storage
from lcl_mcore.untrusted import BadJsonError, clean_text, parse_object

FORMAT, VERSION = "lcl-native", 1
MANIFEST = "dataset.json"
MAX_MANIFEST_BYTES = 256 << 20
INDEX_HEADER = 128  # bytes before the array in a .npy file of this shape
SMALL_INDEX = 256 << 10

Kind = Literal["matched", "sequence", "pair"]
CODECS = ("jpg", "png", "webp")
MAX_IMAGES = 1_000
MAX_TEXTS = 100_000


# --- a document ---


@dataclass(frozen=True)
class ImageEntry:
    """One stored image.

    Attributes:
        name: the member's name after `KEY.`, for instance `0.jpg`.
        codec: one of `CODECS`.
        text_index: matched: the text it belongs to; sequence: how many texts come before it; pair: 0.
        similarity: matched: how well it fits that text (1 when unknown).
    """

    name: str
    width: int
    height: int
    codec: str
    sha256: str
    bytes: int
    text_index: int = 0
    similarity: float = 1.0


@dataclass(frozen=True)
class Document:
    """Texts and images of one document.

    Attributes:
        kind: `matched` (MMC4): every image belongs to one of the texts; `sequence` (OBELICS): images stand between
            the texts; `pair` (LAION): one image, the texts are alternative captions of it.
    """

    key: str
    kind: Kind
    texts: tuple[str, ...]
    images: tuple[ImageEntry, ...]

    def to_json(self, **more: Any) -> dict[str, Any]:
        """The object stored as `KEY.json`; field names follow MMC4 where it has one."""
        index_name = "matched_text_index" if self.kind == "matched" else "text_index"
        images = []
        for image in self.images:
            entry = {
                "image_name": image.name,
                "width": image.width,
                "height": image.height,
                "codec": image.codec,
                "sha256": image.sha256,
                "bytes": image.bytes,
                "verdict": "ok",
                index_name: image.text_index,
            }
            if self.kind == "matched":
                entry["matched_sim"] = round(image.similarity, 6)
            images.append(entry)
        return {"kind": self.kind, "text_list": list(self.texts), "image_info": images, **more}

    @staticmethod
    def from_json(key: str, data: dict[str, Any]) -> Document:
        """Check and read the object stored as `KEY.json`.

        Raises:
            BadJsonError: it is not such an object.
        """
        kind: Any = data.get("kind")
        if kind not in get_args(Kind):
            raise BadJsonError(f"kind {kind!r} is not one of {get_args(Kind)}")
        texts, images = data.get("text_list"), data.get("image_info")
        if not isinstance(texts, list) or not isinstance(images, list):
            raise BadJsonError("text_list and image_info must be lists")
        if len(texts) > MAX_TEXTS or len(images) > MAX_IMAGES:
            raise BadJsonError(f"{len(texts)} texts and {len(images)} images, allowed {MAX_TEXTS} and {MAX_IMAGES}")
        index_name = "matched_text_index" if kind == "matched" else "text_index"
        last = len(texts) if kind == "sequence" else max(len(texts) - 1, 0)
        entries = tuple(
            ImageEntry(
                name=_text(image, "image_name"),
                width=_whole(image, "width", 1, 1 << 20),
                height=_whole(image, "height", 1, 1 << 20),
                codec=_codec(image),
                sha256=_text(image, "sha256"),
                bytes=_whole(image, "bytes", 1, 1 << 30),
                text_index=_whole(image, index_name, 0, last),
                similarity=finite_number(image.get("matched_sim", 1.0)),
            )
            for image in images
        )
        return Document(key=key, kind=kind, texts=tuple(clean_text(text) for text in texts), images=entries)


def _whole(data: Any, name: str, low: int, high: int) -> int:
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadJsonError(f"{name} = {value!r} is not an integer in {low}..{high}")
    return value


def _codec(data: Any) -> str:
    codec = _text(data, "codec")
    if codec not in CODECS:
        raise BadJsonError(f"codec {codec[:80]!r} is not one of {CODECS}")
    return codec


def _text(data: Any, name: str) -> str:
    return clean_text(data.get(name) if isinstance(data, dict) else None, max_chars=1_000)


def finite_number(value: Any) -> float:
    """A JSON number as a float.

    Raises:
        BadJsonError: it is not a finite number.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # 1 and 400 zeros
            number = float(value)
            if math.isfinite(number):
                return number
    raise BadJsonError(f"{str(value)[:100]} is not a finite number")


# --- writing ---


class CannotWriteError(DataError):
    """A folder that cannot be made, or a file that cannot be written: no permission, no space."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """What the system refuses while a data set is written ends in one sentence."""
    try:
        yield
    except OSError as error:
        rule = f"cannot be written: {error.strerror or error}"
        raise CannotWriteError(explain(folder, rule, "Make room, or choose another output folder.")) from error


_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 48)]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class ShardInfo:
    """One line of the manifest."""

    file: str
    documents: _Count
    images: _Count
    members: _Count
    bytes: _Count
    sha256: str


_SHARDS = TypeAdapter(list[ShardInfo])


def index_name(shard: str) -> str:
    """The index file that belongs to a shard file."""
    return shard.removesuffix(".tar") + ".index.npy"


class ShardWriter:
    """Writes one shard and its index. Equal documents give equal bytes."""

    def __init__(self, path: Path) -> None:
        from webdataset import TarWriter  # imports torch's data loading too: only where something is written

        self._path = path
        self._part = path.with_name(f".{path.name}.part")
        with writing_to(path.parent):
            self._stream = self._part.open("wb")
        self._tar = TarWriter(self._stream, encoder=False, user="", group="", mode=0o644, mtime=0)
        self._first_members: list[int] = []
        self._places: list[tuple[int, int]] = []
        self._keys: set[str] = set()
        self._images = 0

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._first_members)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        offset: int = self._tar.tarstream.offset
        return offset

    def add(self, document: Document, images: Sequence[bytes], **more: Any) -> None:
        """Append a document.

        Args:
            document: its key must be new in this shard.
            images: contents, in the order of `document.images`.
            **more: stored in `KEY.json` beside the document's own fields.

        Raises:
            BadJsonError: no reader would accept it; nothing was written.
        """
        key = document.key
        if key in self._keys or "." in key or "/" in key or not 0 < len(key) <= 80:
            raise ValueError(f"key {key!r} must be new, without dot or slash, of 1 to 80 characters")
        stored = document.to_json(**more)
        try:
            text = json.dumps(stored, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
            Document.from_json(key, parse_object(text))
        except ValueError as error:
            raise BadJsonError(str(error)) from None
        self._keys.add(key)
        self._first_members.append(len(self._places))
        with writing_to(self._path.parent):
            self._member(key, "json", text)
            for image, content in zip(document.images, images, strict=True):
                self._member(key, image.name, content)
        self._images += len(images)

    def _member(self, key: str, name: str, content: bytes) -> None:
        self._places.append((self.size + BLOCKSIZE, len(content)))
        self._tar.write({"__key__": key, name: content})  # one member at a time: it would sort several by name

    def close(self) -> ShardInfo:
        """Complete the shard and its index, and say what the manifest must list."""
        array = np.concatenate(
            [
                np.array([*self._first_members, len(self._places)], dtype="<i8"),
                np.array(self._places, dtype="<i8").reshape(-1),
            ]
        )
        content = io.BytesIO()
        np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
        if content.tell() != INDEX_HEADER + 8 * len(array):
            raise AssertionError("the .npy header has an unexpected size")
        with writing_to(self._path.parent):
            self._tar.close()
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            atomic_write(self._path.with_name(index_name(self._path.name)), content.getvalue())
            with self._part.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = self._part.stat().st_size
            self._part.replace(self._path)
        return ShardInfo(self._path.name, self.documents, self._images, len(self._places), size, digest)

    def discard(self) -> None:
        """Give up an unfinished shard and the space it takes."""
        with contextlib.suppress(OSError):  # what could not be written cannot be flushed either
            self._tar.close()
        with contextlib.suppress(OSError):
            self._stream.close()
        self._part.unlink(missing_ok=True)


def fingerprint(shards: Iterable[ShardInfo]) -> str:
    """Changes whenever a shard's content, or the order of the shards, changes."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.documents} {shard.sha256}\n".encode())
    return digest.hexdigest()[:16]


def write_manifest(
    folder: Path,
    shards: Sequence[ShardInfo],
    *,
    dropped_documents: Counter[str] | None = None,
    dropped_images: Counter[str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write `dataset.json`, which makes the folder a data set."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(shards),
        "documents": sum(shard.documents for shard in shards),
        "images": sum(shard.images for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "dropped_documents": dict(sorted((dropped_documents or Counter()).items())),
        "dropped_images": dict(sorted((dropped_images or Counter()).items())),
        **more,
        "shards": [asdict(shard) for shard in shards],
    }
    with writing_to(folder):
        atomic_write(folder / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    return manifest


def parse_manifest(where: str, content: bytes) -> dict[str, Any]:
    """The content of `dataset.json`.

    Raises:
        DataError: it is not valid JSON.
    """
    try:
        return parse_object(content, max_bytes=MAX_MANIFEST_BYTES)
    except BadJsonError as error:
        remedy = "Copy it again; or delete this file and prepare again, which takes up the finished shards."
        raise DataError(explain(where, f"is damaged: {error}", remedy)) from error


def listed_shards(where: str, manifest: dict[str, Any]) -> list[ShardInfo]:
    """The shards that a manifest lists.

    Raises:
        DataError: another format or version, or a list that does not fit the fingerprint.
    """
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, VERSION):
        rule = f"format and version are {found}, this program reads {(FORMAT, VERSION)}"
        raise DataError(explain(where, rule, "Prepare the data set again with tools/prepare_data.py."))
    try:
        shards = _SHARDS.validate_python(manifest.get("shards"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        rule = f"is damaged: {'.'.join(map(str, ('shards', *first['loc'])))}: {first['msg']}"
        raise DataError(explain(where, rule, "Prepare the data set again.")) from error
    for shard in shards:
        if "/" in shard.file or shard.file.startswith("."):
            raise DataError(explain(f"{where}: shard {shard.file!r}", "must be a plain name", "Prepare it again."))
    if fingerprint(shards) != manifest.get("fingerprint"):
        rule = f"fingerprint {manifest.get('fingerprint')} does not fit its shard list"
        raise DataError(explain(where, rule, "Restore the manifest or prepare the data set again."))
    return shards


# --- reading ---


class ImageDamagedError(ValueError):
    """A stored image is not what the manifest says."""


@dataclass(frozen=True)
class Members:
    """Where a document lies: its shard, and offset and size of each member (the first is the JSON)."""

    shard: str
    places: tuple[tuple[int, int], ...]


class NativeDataset:
    """The documents 0..len-1 of a prepared data set.

    Held in memory: the manifest's list of shards. Indices and contents are read by range when needed,
    so start and memory do not depend on the number of documents.

    Args:
        path: folder or URL.
        name: in messages and positions; default: the last part of the path.
        retries: for failed reads of an object store.
        cache_mb: memory for bytes fetched from an object store and not yet used.

    Raises:
        DataError: the manifest is damaged, or a shard is missing or has another size than it says.
    """

    def __init__(self, path: str, *, name: str = "", retries: int = 5, cache_mb: int = 256) -> None:
        self.path = path
        self.name = name or path.rstrip("/").rsplit("/", 1)[-1]
        self.storage = open_storage(path, retries=retries, cache_bytes=cache_mb << 20)
        where = f"{path}/{MANIFEST}"
        manifest = parse_manifest(where, self.storage.read_whole(MANIFEST))
        self._shards = listed_shards(where, manifest)
        self.manifest = {name: value for name, value in manifest.items() if name not in ("shards", "inputs")}
        self.fingerprint: str = manifest["fingerprint"]
        self._ends = np.cumsum([shard.documents for shard in self._shards], dtype=np.int64)
        self._require_files()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def members(self, index: int, *, block: int = 1) -> Members:
        """Where document `index` lies; with `block`, its aligned neighbours are read ahead (remote only)."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no document {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        local = index - (int(self._ends[number - 1]) if number else 0)
        places = self._places(number, local, local + 1)
        if isinstance(self.storage, RemoteStorage):
            first, last = places[0], places[-1]
            if block > 1:
                begin = local // block * block
                around = self._places(number, begin, min(begin + block, shard.documents))
                first, last = around[0], around[-1]
            start = first[0] - BLOCKSIZE
            self.storage.read_ahead(shard.file, start, last[0] + last[1] - start)
        return Members(shard.file, places)

    def document(self, index: int, *, block: int = 1) -> tuple[Document, Members]:
        """Texts and image list of one document, and where it lies.

        Raises:
            DataError: the shard is damaged there.
        """
        members = self.members(index, block=block)
        offset, size = members.places[0]
        content = self.storage.read(members.shard, offset - BLOCKSIZE, BLOCKSIZE + size)
        key = content[:100].rstrip(b"\0").decode("ascii", "replace").removesuffix(".json")  # the tar header
        try:
            document = Document.from_json(key, parse_object(content[BLOCKSIZE:]))
            if len(document.images) != len(members.places) - 1:
                raise BadJsonError(f"{len(document.images)} images listed, {len(members.places) - 1} stored")
        except BadJsonError as error:
            where = f"{self.path}/{members.shard}, document {key or index}"
            raise DataError(
                explain(where, f"is damaged: {error}", "Copy the shard again or prepare the data set again.")
            ) from error
        return document, members

    def image(self, document: Document, members: Members, number: int, *, verify: bool = True) -> bytes:
        """The content of one image.

        Raises:
            ImageDamagedError: it is not the one that was prepared.
        """
        content = self.storage.read(members.shard, *members.places[1 + number])
        if verify and hashlib.sha256(content).hexdigest() != document.images[number].sha256:
            raise ImageDamagedError("sha256 differs from the manifest")
        return content

    def close(self) -> None:
        """Give back files and memory."""
        self.storage.close()

    def _places(self, number: int, first: int, last: int) -> tuple[tuple[int, int], ...]:
        """Offset and size of all members of documents first..last-1 of one shard."""
        shard = self._shards[number]
        file = index_name(shard.file)
        index_size = INDEX_HEADER + 8 * (shard.documents + 1) + 16 * shard.members
        if isinstance(self.storage, RemoteStorage) and index_size <= SMALL_INDEX:
            self.storage.read_ahead(file, 0, index_size)  # one request instead of two per document
        count = last - first + 1
        raw = self.storage.read(file, INDEX_HEADER + 8 * first, 8 * count)
        bounds = struct.unpack(f"<{count}q", raw)
        if not 0 <= bounds[0] < bounds[-1] <= shard.members:
            raise self._bad_index(file, f"document {first} has members {bounds[0]}..{bounds[-1]}")
        start = INDEX_HEADER + 8 * (shard.documents + 1) + 16 * bounds[0]
        raw = self.storage.read(file, start, 16 * (bounds[-1] - bounds[0]))
        numbers = struct.unpack(f"<{len(raw) // 8}q", raw)
        places = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        if any(offset < BLOCKSIZE or size < 0 or offset + size > shard.bytes for offset, size in places):
            raise self._bad_index(file, f"document {first} lies outside the shard")
        return places

    def _bad_index(self, file: str, detail: str) -> DataError:
        return DataError(explain(f"{self.path}/{file}", f"is damaged: {detail}", "Prepare the data set again."))

    def _require_files(self) -> None:
        """One listing shows missing and cut shards before a run starts."""
        sizes = self.storage.sizes()
        for shard in self._shards:
            index_size = INDEX_HEADER + 8 * (shard.documents + 1) + 16 * shard.members
            for file, wanted in [(shard.file, shard.bytes), (index_name(shard.file), index_size)]:
                if sizes.get(file) != wanted:
                    found = f"has {sizes[file]} bytes" if file in sizes else "is missing"
                    rule = f"{found}, the manifest says {wanted} bytes"
                    raise DataError(explain(f"{self.path}/{file}", rule, "Copy it again or prepare it again."))
