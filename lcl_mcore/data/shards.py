"""Writing the native format: tar shards that plain `webdataset` reads, an index beside each, a manifest.

A sample is `KEY.json` followed by `KEY.0.jpg`, `KEY.1.png`, ... The index `SHARD.index.npy` is one int64
array: the number of the first member of every document and one past the last, then offset and size of
every member's content in the tar. `dataset.json` lists the shards; its fingerprint covers their content.
Files appear under their final names only when complete, so a killed writer leaves no half shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcl_mcore.data.document import Document
from lcl_mcore.errors import DataError, explain
from lcl_mcore.storage import atomic_write

FORMAT, VERSION = "lcl-native", 1
MANIFEST = "dataset.json"
INDEX_HEADER = 128  # bytes before the array in a .npy file of this shape


@dataclass(frozen=True)
class ShardInfo:
    """One line of the manifest."""

    file: str
    documents: int
    images: int
    members: int
    bytes: int
    sha256: str


def index_name(shard: str) -> str:
    """The index file that belongs to a shard file."""
    return shard.removesuffix(".tar") + ".index.npy"


class ShardWriter:
    """Writes one shard and its index. Equal documents give equal bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.part")
        self._stream = self._part.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._stream, mode="w", format=tarfile.USTAR_FORMAT)
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
        return self._tar.offset

    def add(self, document: Document, images: Sequence[bytes], **more: Any) -> None:
        """Append a document and the content of its images, in the order of `document.images`."""
        key = document.key
        if key in self._keys or "." in key or "/" in key or not 0 < len(key) <= 80:
            raise ValueError(f"key {key!r} must be new, without dot or slash, of 1 to 80 characters")
        self._keys.add(key)
        self._first_members.append(len(self._places))
        text = json.dumps(
            document.to_json(**more), ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
        self._member(f"{key}.json", text.encode())
        for image, content in zip(document.images, images, strict=True):
            self._member(f"{key}.{image.name}", content)
        self._images += len(images)

    def _member(self, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        header.mode = 0o644
        self._places.append((self._tar.offset + tarfile.BLOCKSIZE, len(content)))
        self._tar.addfile(header, io.BytesIO(content))

    def close(self) -> ShardInfo:
        """Complete the shard and its index, and say what the manifest must list."""
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
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
        atomic_write(self._path.with_name(index_name(self._path.name)), content.getvalue())
        with self._part.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = self._part.stat().st_size
        self._part.replace(self._path)
        return ShardInfo(self._path.name, self.documents, self._images, len(self._places), size, digest)

    def abandon(self) -> None:
        """Leave nothing behind."""
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
    atomic_write(folder / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    return manifest


def parse_manifest(where: str, manifest: dict[str, Any]) -> list[ShardInfo]:
    """The shards that a manifest lists; refuses other formats and versions."""
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, VERSION):
        rule = f"format and version are {found}, this program reads {(FORMAT, VERSION)}"
        raise DataError(explain(where, rule, "Prepare the data set again with tools/prepare_data.py."))
    try:
        shards = [ShardInfo(**item) for item in manifest["shards"]]
    except (TypeError, KeyError) as error:
        raise DataError(explain(where, f"is damaged: {error}", "Prepare the data set again.")) from error
    for shard in shards:
        if "/" in shard.file or shard.file.startswith("."):
            raise DataError(
                explain(f"{where}: shard {shard.file!r}", "must be a plain name", "Prepare it again.")
            )
    if fingerprint(shards) != manifest.get("fingerprint"):
        rule = f"fingerprint {manifest.get('fingerprint')} does not fit its shard list"
        raise DataError(explain(where, rule, "Restore the manifest or prepare the data set again."))
    return shards
