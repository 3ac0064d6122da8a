"""Prepares a data set part by part on several processes; may be killed at any moment and continued.

A reader of one public format divides its input into files and parts. A job prepares one part: it writes shards under
names of its own, then a record of what it saw, kept and dropped. A job without a valid record is simply done again.
Of a damaged file what precedes the damage is kept, and the damage counted. What may pass (no permission, an error of
the disk, a process that dies) is an error at the end, when all others are prepared, and tried again by the next run.
When all jobs are recorded, the manifest is written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from lcl_mcore.data.format import MAX_IMAGES, CannotWriteError, Document, ImageEntry, ShardWriter, write_manifest
from lcl_mcore.data.images import BadImageError
from lcl_mcore.data.prepare.counts import UnitCounts, explain_drops
from lcl_mcore.data.prepare.input_files import is_system_file
from lcl_mcore.data.prepare.job_records import JobRecords, JobResult
from lcl_mcore.data.prepare.normalise import ImageLimits, entry_for, normalise
from lcl_mcore.data.prepare.prepare_plan import PreparePlan, make_plan, printable
from lcl_mcore.data.prepare.records import TOO_SLOW, Dropped, InputFile, InputPart, RawDocument, RawImage, Reader
from lcl_mcore.data.prepare.repeated import image_key, images_of, repeated_keys, write_keys
from lcl_mcore.data.prepare.time_limit import TooSlowError, time_limit
from lcl_mcore.data.prepare.workers import WorkerDied, run_jobs
from lcl_mcore.errors import DataError, explain
from lcl_mcore.untrusted import BadJsonError, clean_text

T = TypeVar("T")
BAD_FILE = (DataError, OSError, MemoryError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)
"""What readers raise about a file that they cannot read further."""
LASTING = (None, errno.EFBIG, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENXIO)
"""Of `OSError`, what is so until the file changes: no regular file, links in a circle, content that does not unpack."""
DAMAGED = "file is damaged here"
UNREADABLE = "file cannot be read"
SHOWN_FILES = 3
DROPPED_WITH = "in a dropped document"


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
    """One part of one input file.

    Attributes:
        name: begins its shards' names; it stays when other files come or go.
        identity: changes whenever something changes from which it is prepared.
        file: the input file's name.
        grouped: it stands for several files, which the places within name themselves.
        repeated: keys of its images that stand in too many documents.
    """

    name: str
    identity: str
    file: str
    part: InputPart
    grouped: bool = False
    repeated: frozenset[int] = frozenset()

    def place(self, where: str) -> str:
        """A place in its file, for messages."""
        return where if self.grouped and where else ", ".join(filter(None, (self.file, where)))


@dataclass(frozen=True)
class BadFile:
    """The outcome of a job that may succeed another time: the message, which names its file."""

    message: str


def prepare(
    reader: Reader,
    output: Path,
    options: PrepareOptions,
    *,
    workers: int = 2,
    quiet: bool = False,
    update: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Write the native data set of a reader's documents; does nothing if it is there and its input is the same.

    Args:
        reader: the input.
        output: the data set's folder.
        options: what is kept, and how large shards are.
        workers: processes.
        quiet: no progress bar.
        update: a finished data set whose input has changed is brought up to date.
        **more: stored in the manifest.

    Returns:
        The manifest.

    Raises:
        DataError: no document is usable, a file cannot be read now, `output` cannot be written or was prepared with
            other settings, or is finished and its input has changed.
    """
    files = _outside([replace(file, name=printable(file.name)) for file in reader.files()], output)
    plan = make_plan({**reader.describe(), **asdict(options)}, files, reader.image_root, output)
    records = JobRecords(output, plan)
    finished = records.finished(update=update)
    if finished is not None:
        return finished
    with records.alone():
        finished = records.finished(update=update)  # another process may have been faster
        if finished is not None:
            return finished
        changes = records.begin()
        if changes:
            print(f"since the last attempt {'; '.join(changes)}: prepared again", file=sys.stderr)
        return _prepare(reader, output, options, files, plan, records, workers=workers, quiet=quiet, more=more)


def _prepare(
    reader: Reader,
    output: Path,
    options: PrepareOptions,
    files: Sequence[InputFile],
    plan: PreparePlan,
    records: JobRecords,
    *,
    workers: int,
    quiet: bool,
    more: dict[str, Any],
) -> dict[str, Any]:
    """All jobs that are not finished, then the manifest."""
    jobs, unused, bad = _jobs(reader, files, plan)
    if options.max_repeats and not bad:
        keys = [records.folder / f"{job.name}.{job.identity}.keys.npy" for job in jobs]
        work = partial(_write_keys, reader, records.folder)
        waiting = [job for job, path in zip(jobs, keys, strict=True) if not path.exists()]
        bad = _run(work, waiting, workers, "hashing images", lambda images: {"images": images}, quiet=quiet)
        if not bad:
            jobs = [_without(job, own) for job, own in zip(jobs, repeated_keys(keys, options.max_repeats), strict=True)]
    if bad and options.max_repeats:
        raise DataError(_unreadable(bad, "Which images are repeated is known when all are read"))
    records.keep_only({records.path(job.name, job.identity) for job in jobs})
    waiting = [job for job in jobs if records.read(job.name, job.identity) is None]
    bad += _run(
        partial(_prepare_job, reader, output, options, records), waiting, workers, "preparing", _summary, quiet=quiet
    )
    if bad:
        raise DataError(_unreadable(bad, "The others are prepared and stay"))
    results = unused + [result for job in jobs if (result := records.read(job.name, job.identity)) is not None]
    documents = UnitCounts.total(result.documents for result in results)
    images = UnitCounts.total(result.images for result in results)
    drops = explain_drops(documents, images, reader.image_root)
    if not documents.kept:
        records.forget()
        rule = f"no document of {documents.seen} could be used, so that nothing is kept of this run"
        remedy = "Check the folders and the format's name."
        raise DataError("\n".join([*drops, explain(output, rule, remedy)]))
    shards = [shard for result in results for shard in result.shards]
    records.finish([records.path(job.name, job.identity) for job in jobs], shards)
    manifest = write_manifest(output, shards, **_counts(results, documents, images), **more)
    shutil.rmtree(records.folder)
    if drops:
        print("\n".join(drops), file=sys.stderr)
    return manifest


def _outside(files: Sequence[InputFile], output: Path) -> list[InputFile]:
    """The input without what lies in the output's folder, which may be one of the input's."""
    folder = os.path.realpath(output) + os.sep
    found = [file for file in files if not any(os.path.realpath(path).startswith(folder) for path in file.paths)]
    if files and not found:
        rule = "holds the input"
        raise DataError(explain(output, rule, "Choose another output folder."))
    return found


def _jobs(
    reader: Reader, files: Sequence[InputFile], plan: PreparePlan
) -> tuple[list[PrepareJob], list[JobResult], list[BadFile]]:
    """The parts of all files; what is said of files without a part; and files that cannot be read now."""
    jobs: list[PrepareJob] = []
    unused: list[JobResult] = []
    bad: list[BadFile] = []
    for file in files:
        if len(file.paths) == 1 and is_system_file(file.name):
            unused.append(_unused(file.name, "system file", file.name))
            continue
        try:
            parts = reader.parts(file)
        except BAD_FILE as error:
            message = _joined(file.name, _what(error))
            if _lasts(error):
                unused.append(_unused(file.name, UNREADABLE, message))
            else:
                bad.append(BadFile(message))
            continue
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(file.name).name.partition(".")[0])[:40] or "input"
        digest = hashlib.sha256(file.name.encode()).hexdigest()[:8]
        for number, part in enumerate(parts):
            identity = plan.identity(file, number, len(parts))
            jobs.append(
                PrepareJob(f"{stem}-{digest}-{number:04d}", identity, file.name, part, grouped=len(file.paths) > 1)
            )
    return jobs, unused, bad


def _unused(file: str, reason: str, example: str) -> JobResult:
    """A file of which nothing is read counts as one document."""
    result = JobResult(file)
    result.documents.seen = 1
    result.documents.drop(reason, example)
    return result


def _lasts(error: BaseException) -> bool:
    """Whether the file itself is bad, so that reading it again would end in the same way."""
    if isinstance(error, OSError):
        return error.errno in LASTING
    return not isinstance(error, MemoryError)


def _what(error: BaseException) -> str:
    """What is wrong with a file that cannot be read further."""
    if isinstance(error, DataError):
        return str(error)
    return getattr(error, "strerror", None) or f"{type(error).__name__} {error}".strip()


def _without(job: PrepareJob, repeated: frozenset[int]) -> PrepareJob:
    """The job with the images that it drops; prepared again when they are others."""
    digest = hashlib.sha256(f"{job.identity} {sorted(repeated)}".encode()).hexdigest()[:16]
    return replace(job, identity=digest, repeated=repeated)


def _run(
    work: Callable[[PrepareJob], T | BadFile],
    waiting: Sequence[PrepareJob],
    workers: int,
    what: str,
    summary: Callable[[T], dict[str, int]],
    *,
    quiet: bool,
) -> list[BadFile]:
    """`work` on every waiting job; what `summary` counts is added up in the bar. Returns what could not be done."""
    counts: Counter[str] = Counter()
    bad: list[BadFile] = []
    with tqdm(total=sum(job.part.weight for job in waiting), desc=what, disable=quiet) as bar:
        for job, outcome in run_jobs(work, waiting, workers):
            if isinstance(outcome, WorkerDied):
                rule = f"the process that prepared it died twice, {outcome.how}"
                remedy = "If memory was short, free some; or take the file out of the input."
                bad.append(BadFile(explain(job.file, rule, remedy)))
            elif isinstance(outcome, BadFile):
                bad.append(outcome)
            else:
                counts.update(summary(outcome))
                bar.set_postfix(counts, refresh=False)
            bar.update(job.part.weight)
    return bad


def _unreadable(bad: Sequence[BadFile], others: str) -> str:
    """The message about all files that cannot be read."""
    messages = sorted({item.message for item in bad})
    shown = messages[:SHOWN_FILES]
    more = f" ({len(messages)} in all)" if len(shown) < len(messages) else ""
    return "\n".join([*shown, f"Some input could not be read now{more}. {others}: run the same command again."])


def _counts(results: Sequence[JobResult], documents: UnitCounts, images: UnitCounts) -> dict[str, Any]:
    """What the manifest says about kept and dropped units, in sum and file by file."""
    files: dict[str, list[JobResult]] = {}
    for result in results:
        files.setdefault(result.file, []).append(result)
    inputs = []
    for name, parts in files.items():
        counts = {
            "documents": UnitCounts.total(part.documents for part in parts).to_json(examples=False),
            "images": UnitCounts.total(part.images for part in parts).to_json(examples=False),
        }
        inputs.append({"file": name, **counts})
    return {
        "seen_documents": documents.seen,
        "seen_images": images.seen,
        "dropped_documents": documents.dropped,
        "dropped_images": images.dropped,
        "examples_of_dropped": {"documents": documents.examples, "images": images.examples},
        "inputs": inputs,
    }


# --- one job ---


def _write_keys(reader: Reader, folder: Path, job: PrepareJob) -> int | BadFile:
    """Write the keys of one job's images."""
    try:
        return write_keys(_until_damage(images_of(reader, job.part)), folder / f"{job.name}.{job.identity}.keys.npy")
    except CannotWriteError:
        raise
    except OSError as error:
        return BadFile(_joined(job.file, _what(error)))


def _until_damage(items: Iterator[T]) -> Iterator[T]:
    """The items that come before the file's damage, which is counted when it is prepared."""
    try:
        yield from items
    except BAD_FILE as error:
        if not _lasts(error):
            raise


def _prepare_job(
    reader: Reader, output: Path, options: PrepareOptions, records: JobRecords, job: PrepareJob
) -> JobResult | BadFile:
    """Write the shards of one job, then its record."""
    result = JobResult(job.file)
    shards = _JobShards(output, job.name, options, result)
    try:
        bad = _read_part(reader, job, options, shards, result)
        if bad is not None:
            shards.discard()
            return bad
        shards.close()
    except BaseException:
        shards.discard()
        raise
    result.documents.kept = sum(shard.documents for shard in result.shards)
    result.images.kept = sum(shard.images for shard in result.shards)
    result.documents.require_complete(f"documents of {job.name}")
    result.images.require_complete(f"images of {job.name}")
    records.write(job.name, job.identity, result)
    return result


def _read_part(
    reader: Reader, job: PrepareJob, options: PrepareOptions, shards: _JobShards, result: JobResult
) -> BadFile | None:
    """Store or count every document of a part, up to the file's damage if there is one."""
    last = ""

    def place() -> str:
        return job.place(f"after {last}" if last else "")

    try:
        for ordinal, raw in enumerate(reader.documents(job.part)):
            last = raw.where
            result.documents.seen += 1
            if isinstance(raw, Dropped):
                result.documents.drop(raw.reason, _joined(job.place(raw.where), raw.detail))
            else:
                result.images.seen += len(raw.images)
                _add(shards, f"{job.name}-{ordinal:08d}", raw, options, job, result)
    except CannotWriteError:
        raise
    except BAD_FILE as error:
        if not _lasts(error):
            return BadFile(_joined(place(), _what(error)))
        result.documents.seen += 1
        result.documents.drop(DAMAGED if last else UNREADABLE, _joined(place(), _what(error)))
    except Exception as error:
        error.add_note(f"while {place()} was prepared")
        raise
    return None


def _add(
    shards: _JobShards, key: str, raw: RawDocument, options: PrepareOptions, job: PrepareJob, result: JobResult
) -> None:
    """Store a document with the images that are kept, or count it as dropped."""
    place = job.place(raw.where)
    if len(raw.images) > MAX_IMAGES:
        result.documents.drop("too many images", f"{place}: {len(raw.images)}")
        result.images.drop(DROPPED_WITH, place, len(raw.images))
        return
    entries: list[ImageEntry] = []
    contents: list[bytes] = []
    dropped: list[dict[str, str]] = []
    for image in raw.images:
        try:
            stored = _read_image(image, options, job)
        except BadImageError as error:
            source, verdict = clean_text(image.source[:500]), clean_text(str(error)[:200])
            dropped.append({"source": source, "verdict": verdict})
            detail = verdict.removeprefix(error.reason).removeprefix(": ")
            result.images.drop(error.reason, _joined(place, source, detail if detail != source else ""))
            continue
        entries.append(entry_for(len(entries), stored, image.text_index, image.similarity))
        contents.append(stored[0])
    if not entries and (options.require_image or not any(raw.texts)):
        result.documents.drop("no image left" if raw.images else "no image", place)
        return
    more = {**raw.more, "dropped_images": dropped} if dropped else raw.more
    try:
        shards.add(Document(key=key, kind=raw.kind, texts=raw.texts, images=tuple(entries)), contents, more)
    except BadJsonError as error:
        result.documents.drop("cannot be stored", f"{place}: {error}")
        result.images.drop(DROPPED_WITH, place, len(entries))


def _read_image(image: RawImage, options: PrepareOptions, job: PrepareJob) -> tuple[bytes, str, int, int]:
    """The image as it is stored."""
    try:
        with time_limit():
            content = image.read()
            if job.repeated and image_key(content) in job.repeated:
                raise BadImageError("over-repeated")
            return normalise(content, options.limits)
    except TooSlowError as error:
        raise BadImageError(TOO_SLOW, str(error)) from None


def _joined(*parts: str) -> str:
    """The parts that are there, from outside inwards."""
    return ": ".join(filter(None, parts))


class _JobShards:
    """The shards of one job, one after the other."""

    def __init__(self, output: Path, name: str, options: PrepareOptions, result: JobResult) -> None:
        self._output = output
        self._name = name
        self._options = options
        self._result = result
        self._writer: ShardWriter | None = None

    def add(self, document: Document, contents: Sequence[bytes], more: dict[str, Any]) -> None:
        """Store a document."""
        if self._writer is None:
            self._writer = ShardWriter(self._output / f"{self._name}-{len(self._result.shards):03d}.tar")
        self._writer.add(document, contents, **more)
        if self._writer.documents >= self._options.shard_documents or self._writer.size >= self._options.shard_bytes:
            self.close()

    def close(self) -> None:
        """Complete the open shard."""
        if self._writer is not None:
            if self._writer.documents:
                self._result.shards.append(self._writer.close())
            else:
                self._writer.discard()
            self._writer = None

    def discard(self) -> None:
        """Give up the open shard."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None


def _summary(result: JobResult) -> dict[str, int]:
    return {
        "documents": result.documents.kept,
        "images": result.images.kept,
        "dropped documents": result.documents.dropped.total(),
        "dropped images": result.images.dropped.total(),
    }
