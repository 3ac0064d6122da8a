"""Prepares a data set part by part on several processes; may be killed at any moment and continued.

A reader of one public format divides its input into fixed parts. Each part writes shards under names of its own. Its
record in the `.progress` folder appears after its shards are complete, so a part without a record is simply done
again. When all are recorded, the manifest is written and the records go.

Images in too many documents (logos, buttons) are found before, in bounded memory: every part writes the sorted keys
of its images, each once per document, and the keys are counted range by range.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from lcl_mcore.data.format import (
    MANIFEST,
    MAX_IMAGES,
    Document,
    ImageEntry,
    ShardInfo,
    ShardWriter,
    parse_manifest,
    write_manifest,
)
from lcl_mcore.data.images import BadImageError
from lcl_mcore.data.prepare.normalise import ImageLimits, entry_for, normalise
from lcl_mcore.data.prepare.records import Dropped, FindsImages, InputFile, InputPart, RawDocument, RawImage, Reader
from lcl_mcore.data.untrusted_json import parse_object
from lcl_mcore.errors import DataError, explain
from lcl_mcore.storage import atomic_file, atomic_write

T = TypeVar("T")
PROGRESS = ".progress"
KEY_RANGES = 64


@dataclass(frozen=True)
class PrepareOptions:
    """How documents are prepared, whatever their format.

    Attributes:
        limits: what an image must be.
        max_repeats: an image used in more documents than this is dropped everywhere (0: no limit).
        require_image: documents left without an image are dropped.
        shard_documents, shard_bytes: a shard is closed when it reaches one of these.
    """

    limits: ImageLimits = field(default_factory=ImageLimits)
    max_repeats: int = 0
    require_image: bool = True
    shard_documents: int = 10_000
    shard_bytes: int = 1 << 30


@dataclass(frozen=True)
class PrepareJob:
    """One part of an input file; its name begins its shards' names."""

    name: str
    part: InputPart


@dataclass
class PartResult:
    """What one part wrote and dropped."""

    shards: list[ShardInfo]
    documents: Counter[str]
    images: Counter[str]

    def to_json(self) -> bytes:
        """The content of the part's record."""
        return json.dumps(
            {"shards": [asdict(s) for s in self.shards], "documents": self.documents, "images": self.images}
        ).encode()

    @staticmethod
    def from_json(content: bytes) -> PartResult:
        """The inverse of `to_json`."""
        data = parse_object(content)
        shards = [ShardInfo(**item) for item in data["shards"]]
        return PartResult(shards, Counter(data["documents"]), Counter(data["images"]))


def prepare(
    reader: Reader, output: Path, options: PrepareOptions, *, workers: int = 2, quiet: bool = False, **more: Any
) -> dict[str, Any]:
    """Write the native data set of a reader's documents; does nothing if it is there.

    Args:
        reader: the input.
        output: the data set's folder.
        options: what is kept, and how large shards are.
        workers: processes.
        quiet: no progress bar.
        **more: stored in the manifest.

    Returns:
        The manifest.

    Raises:
        DataError: no document is usable, or `output` was made from something else.
    """
    files = reader.files()
    listing = [[file.name, [path.stat().st_size for path in file.paths]] for file in files]
    plan = json.loads(json.dumps({"input": {**reader.describe(), "files": listing}, "options": asdict(options)}))
    records = output / PROGRESS
    done = _existing(output, plan)
    if done is not None:
        shutil.rmtree(records, ignore_errors=True)
        return done
    records.mkdir(parents=True, exist_ok=True)
    _claim(records / "plan.json", plan, output)
    jobs = [job for file in files for job in _jobs(reader, file)]
    repeated: frozenset[int] = frozenset()
    if options.max_repeats:
        repeated = _find_repeated(reader, jobs, records, options.max_repeats, workers, quiet)
    waiting = [job for job in jobs if not (records / f"{job.name}.json").exists()]
    work = partial(_prepare_part, reader, output, options, repeated)
    _run(work, waiting, workers, "preparing", _summary, quiet=quiet)
    results = [PartResult.from_json((records / f"{job.name}.json").read_bytes()) for job in jobs]
    shards = [shard for result in results for shard in result.shards]
    if not shards:
        reasons = sum((result.documents for result in results), Counter())
        rule = f"no usable document was found; dropped: {dict(reasons) or 'none'}"
        raise DataError(explain(output, rule, "Check the input folder and the format's name."))
    manifest = write_manifest(
        output,
        shards,
        dropped_documents=sum((result.documents for result in results), Counter()),
        dropped_images=sum((result.images for result in results), Counter()),
        plan=plan,
        **more,
    )
    shutil.rmtree(records)
    return manifest


def _existing(output: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a complete earlier run; refuses one made from something else."""
    path = output / MANIFEST
    if not path.exists():
        return None
    manifest = parse_manifest(str(path), path.read_bytes())
    if manifest.get("plan") != plan:
        raise DataError(_other_plan(output))
    return manifest


def _claim(path: Path, plan: dict[str, Any], output: Path) -> None:
    """Record what this folder is being made from, or find that it is just that."""
    if path.exists() and json.loads(path.read_text()) != plan:
        raise DataError(_other_plan(output))
    atomic_write(path, json.dumps(plan).encode())


def _other_plan(output: Path) -> str:
    rule = "was made from another input or with other options"
    return explain(output, rule, "Choose another output folder, or delete this one first.")


def _run(
    work: Callable[[PrepareJob], T],
    waiting: Sequence[PrepareJob],
    workers: int,
    what: str,
    summary: Callable[[T], dict[str, int]],
    *,
    quiet: bool,
) -> None:
    """`work` on every waiting part, on `workers` processes; what `summary` counts is added up in the bar."""
    counts: Counter[str] = Counter()
    with tqdm(total=sum(job.part.weight for job in waiting), desc=what, disable=quiet) as bar:

        def advance(job: PrepareJob, result: T) -> None:
            counts.update(summary(result))
            bar.set_postfix(counts, refresh=False)
            bar.update(job.part.weight)

        if workers == 1 or len(waiting) <= 1:
            for job in waiting:
                advance(job, work(job))
            return
        context = multiprocessing.get_context("spawn")  # forking a process with threads can deadlock
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures: dict[Future[T], PrepareJob] = {pool.submit(work, job): job for job in waiting}
            for future in as_completed(futures):
                advance(futures[future], future.result())


def _jobs(reader: Reader, file: InputFile) -> list[PrepareJob]:
    """The parts of one file under names of their own, which stay when other files come or go."""
    try:
        parts = reader.parts(file)
    except DataError as error:
        raise DataError(f"{file.name}: {error}") from error
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(file.name).name.partition(".")[0])[:40] or "input"
    digest = hashlib.sha256(file.name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return [PrepareJob(f"{stem}-{digest}-{number:04d}", part) for number, part in enumerate(parts)]


# --- one part ---


def _prepare_part(
    reader: Reader, output: Path, options: PrepareOptions, repeated: frozenset[int], job: PrepareJob
) -> PartResult:
    """Write the shards of one part, then its record."""
    result = PartResult([], Counter(), Counter())
    writer: ShardWriter | None = None
    for ordinal, raw in enumerate(reader.documents(job.part)):
        if isinstance(raw, Dropped):
            result.documents[raw.reason] += 1
            continue
        made = _document(f"{job.name}-{ordinal:08d}", raw, options, repeated, result)
        if made is None:
            continue
        if writer is None:
            writer = ShardWriter(output / f"{job.name}-{len(result.shards):03d}.tar")
        writer.add(*made, **raw.more)
        if writer.documents >= options.shard_documents or writer.size >= options.shard_bytes:
            result.shards.append(writer.close())
            writer = None
    if writer is not None:
        result.shards.append(writer.close())
    atomic_write(output / PROGRESS / f"{job.name}.json", result.to_json())
    return result


def _document(
    key: str, raw: RawDocument, options: PrepareOptions, repeated: frozenset[int], result: PartResult
) -> tuple[Document, list[bytes]] | None:
    """The document with the images that are kept; None if it is dropped."""
    if len(raw.images) > MAX_IMAGES:
        result.documents["too many images"] += 1
        return None
    entries: list[ImageEntry] = []
    contents: list[bytes] = []
    for image in raw.images:
        try:
            content = image.read()
            if repeated and image_key(content) in repeated:
                raise BadImageError("over-repeated")
            stored = normalise(content, options.limits)
        except BadImageError as error:
            result.images[error.reason] += 1
            raw.more.setdefault("dropped_images", []).append(
                {"source": image.source[:500], "verdict": str(error)[:200]}
            )
            continue
        entries.append(entry_for(len(entries), stored, image.text_index, image.similarity))
        contents.append(stored[0])
    if not entries and (options.require_image or not any(raw.texts)):
        result.documents["no image left"] += 1
        return None
    return Document(key=key, kind=raw.kind, texts=raw.texts, images=tuple(entries)), contents


def _summary(result: PartResult) -> dict[str, int]:
    return {
        "documents": sum(shard.documents for shard in result.shards),
        "images": sum(shard.images for shard in result.shards),
        "dropped documents": result.documents.total(),
        "dropped images": result.images.total(),
    }


# --- repeated images ---


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


def _find_repeated(
    reader: Reader, jobs: Sequence[PrepareJob], records: Path, limit: int, workers: int, quiet: bool
) -> frozenset[int]:
    """Keys of the images used in more than `limit` documents."""
    waiting = [job for job in jobs if not (records / f"{job.name}.keys.npy").exists()]
    work = partial(_write_keys, reader, records)
    _run(work, waiting, workers, "hashing images", lambda images: {"images": images}, quiet=quiet)
    files = [np.load(records / f"{job.name}.keys.npy", mmap_mode="r", allow_pickle=False) for job in jobs]
    repeated: list[int] = []
    for number in range(KEY_RANGES):
        low = number << 58
        bounds = np.array([low, low + ((1 << 58) - 1)], dtype=np.uint64)
        slices = [keys[slice(*_range(keys, bounds))] for keys in files]
        keys, counts = np.unique(np.concatenate(slices), return_counts=True)
        repeated += keys[counts > limit].tolist()
    return frozenset(repeated)


def _range(keys: np.ndarray, bounds: np.ndarray) -> tuple[int, int]:
    """Where the sorted keys between two bounds lie."""
    return int(np.searchsorted(keys, bounds[0], "left")), int(np.searchsorted(keys, bounds[1], "right"))


def _write_keys(reader: Reader, records: Path, job: PrepareJob) -> int:
    """Write the sorted keys of one part's images, each once per document; returns their number."""
    keys: list[int] = []
    for images in images_of(reader, job.part):
        found = set()
        for image in images:
            try:
                found.add(image_key(image.read()))
            except BadImageError:
                continue
        keys.extend(found)
    with atomic_file(records / f"{job.name}.keys.npy") as unfinished, unfinished.open("wb") as stream:
        np.save(stream, np.sort(np.array(keys, dtype=np.uint64)), allow_pickle=False)
    return len(keys)
