"""Images in too many documents (logos, buttons), found before anything is prepared, in bounded memory.

Every job writes the sorted keys of its images, each once per document; the keys are then counted range by range.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lcl_mcore.data.format import writing_to
from lcl_mcore.data.images import BadImageError
from lcl_mcore.data.prepare.records import Dropped, FindsImages, InputPart, RawImage, Reader
from lcl_mcore.storage import atomic_file

KEY_RANGES = 64


def image_key(content: bytes) -> int:
    """64 bits that identify an image's bytes."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def images_of(reader: Reader, part: InputPart) -> Iterator[Sequence[RawImage]]:
    """The images of each document of one part, found as cheaply as the format allows."""
    if isinstance(reader, FindsImages):
        yield from reader.images(part)
        return
    for raw in reader.documents(part):
        if not isinstance(raw, Dropped):
            yield raw.images


def write_keys(documents: Iterator[Sequence[RawImage]], path: Path) -> int:
    """Write the sorted keys of the images of some documents, each once per document; returns their number."""
    keys: list[int] = []
    for images in documents:
        found = set()
        for image in images:
            try:
                found.add(image_key(image.read()))
            except BadImageError:
                continue
        keys.extend(found)
    with writing_to(path.parent.parent), atomic_file(path) as unfinished, unfinished.open("wb") as stream:
        np.save(stream, np.sort(np.array(keys, dtype=np.uint64)), allow_pickle=False)
    return len(keys)


def repeated_keys(paths: Sequence[Path], limit: int) -> list[frozenset[int]]:
    """For each file of keys those that stand more than `limit` times in all files together."""
    files = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    repeated: list[set[int]] = [set() for _ in paths]
    for number in range(KEY_RANGES):
        low = number << 58
        bounds = np.array([low, low + ((1 << 58) - 1)], dtype=np.uint64)
        slices = [keys[slice(*_range(keys, bounds))] for keys in files]
        keys, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *slices]), return_counts=True)
        wanted = keys[counts > limit]
        for found, own in zip(repeated, slices, strict=True):
            found.update(np.intersect1d(own, wanted).tolist())
    return [frozenset(found) for found in repeated]


def _range(keys: np.ndarray, bounds: np.ndarray) -> tuple[int, int]:
    """Where the sorted keys between two bounds lie."""
    return int(np.searchsorted(keys, bounds[0], "left")), int(np.searchsorted(keys, bounds[1], "right"))
