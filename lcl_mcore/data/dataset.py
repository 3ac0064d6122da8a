"""Random access to the documents and images of one prepared data set."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from tarfile import BLOCKSIZE

import numpy as np

from lcl_mcore.data.document import Document
from lcl_mcore.data.shards import INDEX_HEADER, MANIFEST, index_name, parse_manifest
from lcl_mcore.data.untrusted_json import BadJsonError, parse_object
from lcl_mcore.errors import DataError, explain
from lcl_mcore.storage import RemoteStorage, open_storage

MAX_MANIFEST_BYTES = 256 << 20
SMALL_INDEX = 256 << 10


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
    """

    def __init__(self, path: str, *, name: str = "", retries: int = 5, cache_mb: int = 256) -> None:
        self.path = path
        self.name = name or path.rstrip("/").rsplit("/", 1)[-1]
        self.storage = open_storage(path, retries=retries, cache_bytes=cache_mb << 20)
        where = f"{path}/{MANIFEST}"
        try:
            manifest = parse_object(self.storage.read_whole(MANIFEST), max_bytes=MAX_MANIFEST_BYTES)
        except BadJsonError as error:
            raise DataError(explain(where, f"is damaged: {error}", "Prepare the data set again.")) from error
        self._shards = parse_manifest(where, manifest)
        self.manifest = {name: value for name, value in manifest.items() if name != "shards"}
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
        """Texts and image list of one document; a damaged shard is a `DataError`."""
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
        """The content of one image; `ImageDamagedError` if it is not the one that was prepared."""
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
        return DataError(
            explain(f"{self.path}/{file}", f"is damaged: {detail}", "Prepare the data set again.")
        )

    def _require_files(self) -> None:
        """One listing shows missing and cut shards before a run starts."""
        sizes = self.storage.sizes()
        for shard in self._shards:
            index_size = INDEX_HEADER + 8 * (shard.documents + 1) + 16 * shard.members
            for file, wanted in [(shard.file, shard.bytes), (index_name(shard.file), index_size)]:
                if sizes.get(file) != wanted:
                    found = f"has {sizes[file]} bytes" if file in sizes else "is missing"
                    rule = f"{found}, the manifest says {wanted} bytes"
                    raise DataError(
                        explain(f"{self.path}/{file}", rule, "Copy it again or prepare it again.")
                    )
