"""Images in too many documents (logos, buttons): found in bounded memory before the main pass."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from lcl_mcore.data.images import BadImageError
from lcl_mcore.data.prepare.engine import Dropped, FindsImages, Job, Options, RawImage, Reader
from lcl_mcore.data.prepare.progress import Progress

PARTITIONS = 64


def image_key(content: bytes) -> int:
    """64 bits that identify a image's bytes."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def find_repeated(
    reader: Reader, jobs: Sequence[Job], records: Path, options: Options, workers: int, quiet: bool
) -> frozenset[int]:
    """Keys of the images used in more than `options.max_repeats` documents."""
    waiting = [job for job in jobs if not (records / f"{job.name}.keys.npy").exists()]
    progress = Progress(sum(job.weight for job in waiting), "hashing images", quiet=quiet)
    count = _Count(reader, records)
    if workers == 1 or len(waiting) <= 1:
        for job in waiting:
            progress.advance(job.weight, {"images": count(job)})
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for job, found in zip(waiting, pool.map(count, waiting), strict=True):
                progress.advance(job.weight, {"images": found})
    files = [np.load(records / f"{job.name}.keys.npy", mmap_mode="r", allow_pickle=False) for job in jobs]
    repeated: list[int] = []
    for part in range(PARTITIONS):
        low = part << 58
        bounds = np.array([low, low + ((1 << 58) - 1)], dtype=np.uint64)
        slices = [keys[slice(*_range(keys, bounds))] for keys in files]
        keys, counts = np.unique(np.concatenate(slices), return_counts=True)
        repeated += keys[counts > options.max_repeats].tolist()
    return frozenset(repeated)


def _range(keys: np.ndarray, bounds: np.ndarray) -> tuple[int, int]:
    """Where the sorted keys of one partition lie."""
    return int(np.searchsorted(keys, bounds[0], "left")), int(np.searchsorted(keys, bounds[1], "right"))


def images_of(reader: Reader, job: Job) -> Iterator[Sequence[RawImage]]:
    """The images of each document of one part, found as cheaply as the format allows."""
    if isinstance(reader, FindsImages):
        yield from reader.images(job)
        return
    for raw in reader.documents(job):
        if not isinstance(raw, Dropped):
            yield raw.images


class _Count:
    """Writes the sorted keys of one job's images, each once per document."""

    def __init__(self, reader: Reader, records: Path) -> None:
        self._reader = reader
        self._records = records

    def __call__(self, job: Job) -> int:
        keys: list[int] = []
        for images in images_of(self._reader, job):
            found = set()
            for image in images:
                try:
                    found.add(image_key(image.read()))
                except BadImageError:
                    continue
            keys.extend(found)
        path = self._records / f"{job.name}.keys.npy"
        part = path.with_suffix(".part.npy")
        np.save(part, np.sort(np.array(keys, dtype=np.uint64)), allow_pickle=False)
        part.replace(path)
        return len(keys)
