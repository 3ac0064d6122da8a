"""Runs preparation jobs on several processes; may be killed at any moment and continued.

A job covers a fixed part of the input and writes shards under names of its own. Its record in the
`.progress` folder appears after its shards are complete, so a job without record is simply done again.
When all are recorded, the manifest is written and the records go.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lcl_mcore.data.document import MAX_IMAGES, Document, ImageEntry, Kind
from lcl_mcore.data.images import BadImageError
from lcl_mcore.data.prepare.normalise import ImageLimits, entry_for, normalise
from lcl_mcore.data.prepare.progress import Progress
from lcl_mcore.data.shards import MANIFEST, ShardInfo, ShardWriter, write_manifest
from lcl_mcore.data.untrusted_json import BadJsonError, parse_object
from lcl_mcore.errors import DataError, explain
from lcl_mcore.storage import atomic_write

logger = logging.getLogger(__name__)
PROGRESS = ".progress"


@dataclass(frozen=True)
class Options:
    """How documents are prepared, whatever their format.

    limits              what a image must be
    max_repeats         a image used in more documents than this is dropped everywhere (0: no limit)
    require_image       documents left without a image are dropped
    shard_documents, shard_bytes   a shard is closed when it reaches one of these
    """

    limits: ImageLimits = field(default_factory=ImageLimits)
    max_repeats: int = 0
    require_image: bool = True
    shard_documents: int = 10_000
    shard_bytes: int = 1 << 30


@dataclass(frozen=True)
class Job:
    """A part of the input: `name` begins its shards' names, `part` says to the reader what it is."""

    name: str
    part: Any
    weight: int = 1


@dataclass(frozen=True)
class RawImage:
    """A image as found. `read` may raise `BadImageError`."""

    read: Callable[[], bytes]
    text_index: int = 0
    similarity: float = 1.0
    source: str = ""


@dataclass(frozen=True)
class RawDocument:
    """A document as found; `more` is stored with it."""

    kind: Kind
    texts: tuple[str, ...]
    images: tuple[RawImage, ...]
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dropped:
    """A document that cannot be used, and why."""

    reason: str


class Reader(Protocol):
    """One public format."""

    def jobs(self) -> Sequence[Job]:
        """All parts of the input, in a fixed order."""

    def documents(self, job: Job) -> Iterator[RawDocument | Dropped]:
        """The documents of one part, in a fixed order."""

    def describe(self) -> dict[str, Any]:
        """Names the input and every setting that changes the output."""


@runtime_checkable
class FindsImages(Protocol):
    """A reader that can list images without reading documents in full."""

    def images(self, job: Job) -> Iterator[Sequence[RawImage]]:
        """The images of each document of one part; more than `documents` has is allowed."""


@dataclass
class JobResult:
    """What one job wrote and dropped."""

    shards: list[ShardInfo]
    documents: Counter[str]
    images: Counter[str]

    def to_json(self) -> bytes:
        """The content of the job's record."""
        return json.dumps(
            {"shards": [asdict(s) for s in self.shards], "documents": self.documents, "images": self.images}
        ).encode()

    @staticmethod
    def from_json(content: bytes) -> JobResult:
        """The inverse of `to_json`."""
        data = parse_object(content)
        shards = [ShardInfo(**item) for item in data["shards"]]
        return JobResult(shards, Counter(data["documents"]), Counter(data["images"]))


def prepare(
    reader: Reader, output: Path, options: Options, *, workers: int = 2, quiet: bool = False, **more: Any
) -> dict[str, Any]:
    """Write the native data set of a reader's documents to `output`; does nothing if it is there."""
    plan = json.loads(json.dumps({"input": reader.describe(), "options": asdict(options)}))
    progress_folder = output / PROGRESS
    done = _existing(output, plan)
    if done is not None:
        shutil.rmtree(progress_folder, ignore_errors=True)
        return done
    progress_folder.mkdir(parents=True, exist_ok=True)
    _claim(progress_folder / "plan.json", plan, output)
    jobs = list(reader.jobs())
    repeated: frozenset[int] = frozenset()
    if options.max_repeats:
        from lcl_mcore.data.prepare.repeats import find_repeated

        repeated = find_repeated(reader, jobs, progress_folder, options, workers, quiet)
    run = _Run(reader, output, options, repeated)
    _run_jobs(run, jobs, progress_folder, workers, quiet)
    results = [JobResult.from_json((progress_folder / f"{job.name}.json").read_bytes()) for job in jobs]
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
    shutil.rmtree(progress_folder)
    return manifest


def _existing(output: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a complete earlier run; refuses one made from something else."""
    if not (output / MANIFEST).exists():
        return None
    try:
        manifest = parse_object((output / MANIFEST).read_bytes(), max_bytes=256 << 20)
    except BadJsonError as error:
        remedy = "Delete the folder and prepare it again."
        raise DataError(explain(output / MANIFEST, f"is damaged: {error}", remedy)) from error
    if manifest.get("plan") != plan:
        raise DataError(_other_plan(output))
    return manifest


def _claim(path: Path, plan: dict[str, Any], output: Path) -> None:
    """Note what this folder is being made from, or find that it is just that."""
    if path.exists() and json.loads(path.read_text()) != plan:
        raise DataError(_other_plan(output))
    atomic_write(path, json.dumps(plan).encode())


def _other_plan(output: Path) -> str:
    rule = "was made from another input or with other options"
    return explain(output, rule, "Choose another output folder, or delete this one first.")


def _run_jobs(run: _Run, jobs: Iterable[Job], records: Path, workers: int, quiet: bool) -> None:
    """Every job that has no record yet, on `workers` processes."""
    waiting = [job for job in jobs if not (records / f"{job.name}.json").exists()]
    if not waiting:
        return
    progress = Progress(sum(job.weight for job in waiting), "preparing", quiet=quiet)
    if workers == 1 or len(waiting) == 1:
        for job in waiting:
            progress.advance(job.weight, _summary(run(job)))
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads can deadlock
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures: dict[Future[JobResult], Job] = {pool.submit(run, job): job for job in waiting}
        for future in as_completed(futures):
            progress.advance(futures[future].weight, _summary(future.result()))


def _summary(result: JobResult) -> dict[str, int]:
    return {
        "documents": sum(shard.documents for shard in result.shards),
        "images": sum(shard.images for shard in result.shards),
        "dropped documents": result.documents.total(),
        "dropped images": result.images.total(),
    }


class _Run:
    """Does one job in whatever process it is called."""

    def __init__(self, reader: Reader, output: Path, options: Options, repeated: frozenset[int]) -> None:
        self._reader = reader
        self._output = output
        self._options = options
        self._repeated = repeated

    def __call__(self, job: Job) -> JobResult:
        result = JobResult([], Counter(), Counter())
        writer: ShardWriter | None = None
        for ordinal, raw in enumerate(self._reader.documents(job)):
            if isinstance(raw, Dropped):
                result.documents[raw.reason] += 1
                continue
            made = self._document(f"{job.name}-{ordinal:08d}", raw, result)
            if made is None:
                continue
            if writer is None:
                writer = ShardWriter(self._output / f"{job.name}-{len(result.shards):03d}.tar")
            writer.add(*made, **raw.more)
            full = (
                writer.documents >= self._options.shard_documents or writer.size >= self._options.shard_bytes
            )
            if full:
                result.shards.append(writer.close())
                writer = None
        if writer is not None:
            result.shards.append(writer.close())
        atomic_write(self._output / PROGRESS / f"{job.name}.json", result.to_json())
        return result

    def _document(self, key: str, raw: RawDocument, result: JobResult) -> tuple[Document, list[bytes]] | None:
        """The document with the images that are kept; None if it is dropped."""
        if len(raw.images) > MAX_IMAGES:
            result.documents["too many images"] += 1
            return None
        entries: list[ImageEntry] = []
        contents: list[bytes] = []
        for image in raw.images:
            try:
                stored = self._image(image)
            except BadImageError as error:
                result.images[error.reason] += 1
                raw.more.setdefault("dropped_images", []).append(
                    {"source": image.source[:500], "verdict": str(error)[:200]}
                )
                continue
            entries.append(entry_for(len(entries), stored, image.text_index, image.similarity))
            contents.append(stored[0])
        if not entries and (self._options.require_image or not any(raw.texts)):
            result.documents["no image left"] += 1
            return None
        return Document(key=key, kind=raw.kind, texts=raw.texts, images=tuple(entries)), contents

    def _image(self, image: RawImage) -> tuple[bytes, str, int, int]:
        content = image.read()
        if self._repeated:
            from lcl_mcore.data.prepare.repeats import image_key

            if image_key(content) in self._repeated:
                raise BadImageError("over-repeated")
        return normalise(content, self._options.limits)
