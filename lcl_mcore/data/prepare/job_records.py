"""What is finished of a data set in the making, and what a finished one was made from.

While it is made, the folder `.progress` holds the plan and a record of every finished job, whose name holds the
identity of what the job was prepared from: a record is found only while that has not changed, and the others are
removed before anything is written. A finished data set keeps plan and records in `prepare.jsonl`, so that it can be
brought up to date: only what changed is prepared again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter, ValidationError

from lcl_mcore.data.format import MANIFEST, ShardInfo, index_name, parse_manifest, writing_to
from lcl_mcore.data.prepare.counts import UnitCounts
from lcl_mcore.data.prepare.prepare_plan import PreparePlan
from lcl_mcore.errors import DataError, explain
from lcl_mcore.storage import atomic_file, atomic_write

PROGRESS = ".progress"
HISTORY = "prepare.jsonl"
OURS = re.compile(
    r"\.?[\w-]+-[0-9a-f]{8}-\d{4,}-\d{3,}(\.tar|\.tar\.part|\.index\.npy)(\.\d+\.partial)?"
    r"|\.(dataset\.json|prepare\.jsonl)\.\d+\.partial"
)
"""Names of the files that are written beside `.progress`, and of what a kill leaves of them."""
RECORDS = "*.*.json"
RECORD = re.compile(r"[\w-]+\.[0-9a-f]+\.json")
LOCK = "lock"


@dataclass
class JobResult:
    """What one job saw, wrote and dropped."""

    file: str
    shards: list[ShardInfo] = field(default_factory=list)
    documents: UnitCounts = field(default_factory=UnitCounts)
    images: UnitCounts = field(default_factory=UnitCounts)


@dataclass(frozen=True)
class StoredRecord:
    """A line of `prepare.jsonl`: the name of a job's record and its content."""

    name: str
    record: JobResult


RESULT, PLAN, STORED = TypeAdapter(JobResult), TypeAdapter(PreparePlan), TypeAdapter(StoredRecord)
"""How the records are written, and read: nothing but what was written so is accepted."""


class JobRecords:
    """The records of one output folder.

    Args:
        output: the data set's folder.
        plan: what it is to be prepared from now.
    """

    def __init__(self, output: Path, plan: PreparePlan) -> None:
        self.folder = output / PROGRESS
        self._output = output
        self._plan = plan
        self._set_aside: list[str] = []

    def finished(self, *, update: bool) -> dict[str, Any] | None:
        """The manifest of the finished data set; None if there is none, or it is to be brought up to date.

        Raises:
            DataError: it was prepared with other settings, or from other input and there is no `update`.
        """
        path = self._output / MANIFEST
        if not path.exists():
            return None
        earlier = _read_plan(self._history()[0])
        if earlier is None:
            rule = "holds a data set that another tool or an earlier version made"
            raise DataError(explain(self._output, rule, "Choose another output folder, or move this one away."))
        self._require_settings(earlier)
        changes = self._plan.other_input(earlier)
        if not changes:
            shutil.rmtree(self.folder, ignore_errors=True)  # a kill may have left it
            return parse_manifest(str(path), path.read_bytes())
        if not update:
            rule = f"was prepared before its input changed: {'; '.join(changes)}"
            remedy = "--update prepares again what changed and no more; or choose another output folder."
            raise DataError(explain(self._output, rule, remedy))
        return None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder against other processes.

        Raises:
            DataError: another one prepares it, or it cannot be written.
        """
        with writing_to(self._output):
            lock = self._lock()
            while not _is_at(lock, self.folder / LOCK):  # who held it has finished and removed it
                lock.close()
                lock = self._lock()
        with lock:
            yield

    def begin(self) -> list[str]:
        """Take up what is finished already; says what changed since.

        Raises:
            DataError: it was begun with other settings, or cannot be written.
        """
        path = self.folder / "plan.json"
        with writing_to(self._output):
            if not path.exists():
                plan, *lines = self._history()
                for line in lines:
                    with contextlib.suppress(ValidationError):  # damaged: that job is done again
                        stored = STORED.validate_json(line)
                        if RECORD.fullmatch(stored.name):
                            atomic_write(self.folder / stored.name, RESULT.dump_json(stored.record))
                atomic_write(path, plan)
            earlier = _read_plan(path.read_bytes()) or self._plan
            if any(self.folder.glob(RECORDS)):
                self._require_settings(earlier)
            atomic_write(path, PLAN.dump_json(self._plan))
            for name in (HISTORY, MANIFEST):
                if (self._output / name).exists():
                    (self._output / name).replace(self.folder / name)
                    self._set_aside.append(name)
        return self._plan.other_input(earlier)

    def path(self, job: str, identity: str) -> Path:
        """Where the record of a finished job lies."""
        return self.folder / f"{job}.{identity}.json"

    def write(self, job: str, identity: str, result: JobResult) -> None:
        """Record a finished job."""
        with writing_to(self._output):
            atomic_write(self.path(job, identity), RESULT.dump_json(result))

    def read(self, job: str, identity: str) -> JobResult | None:
        """The result of a job that is finished, with all its shards."""
        try:
            result = RESULT.validate_json(self.path(job, identity).read_bytes())
            if all(
                (self._output / shard.file).stat().st_size == shard.bytes
                and (self._output / index_name(shard.file)).exists()
                for shard in result.shards
            ):
                return result
        except (OSError, ValidationError):
            pass  # none, or torn: it is done again
        return None

    def keep_only(self, valid: set[Path]) -> None:
        """Remove the records of what is not prepared any more, before its shards are replaced."""
        with writing_to(self._output):
            for path in self.folder.glob(RECORDS):
                if path not in valid:
                    path.unlink()

    def forget(self) -> None:
        """Nothing was begun here: a data set that was to be brought up to date is there again, its shards untouched."""
        for name in self._set_aside:
            (self.folder / name).replace(self._output / name)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds something else
            self._output.rmdir()

    def finish(self, paths: Sequence[Path], shards: Sequence[ShardInfo]) -> None:
        """Keep plan and records beside the data set, and remove what jobs wrote that do not belong to it."""
        listed = {name for shard in shards for name in (shard.file, index_name(shard.file))}
        with writing_to(self._output):
            with atomic_file(self._output / HISTORY) as unfinished, unfinished.open("wb") as stream:
                stream.write(PLAN.dump_json(self._plan) + b"\n")
                for path in paths:
                    record = StoredRecord(path.name, RESULT.validate_json(path.read_bytes()))
                    stream.write(STORED.dump_json(record) + b"\n")
            for path in self._output.iterdir():
                if OURS.fullmatch(path.name) and path.name not in listed:
                    path.unlink()

    def _history(self) -> list[bytes]:
        """The lines of `prepare.jsonl`, the first of which is the plan; it is empty if there is none."""
        try:
            return (self._output / HISTORY).read_bytes().split(b"\n")
        except FileNotFoundError:
            return [b""]

    def _lock(self) -> IO[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / LOCK).open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = "is being prepared by another process"
            raise DataError(explain(self._output, rule, "Wait for it, or choose another output folder.")) from None
        return lock

    def _require_settings(self, earlier: PreparePlan) -> None:
        changes = self._plan.other_settings(earlier)
        if changes:
            rule = f"was prepared with other settings: {'; '.join(changes)}"
            raise DataError(explain(self._output, rule, "Give the same ones, or choose another output folder."))


def _read_plan(content: bytes) -> PreparePlan | None:
    try:
        return PLAN.validate_json(content)
    except ValidationError:
        return None


def _is_at(lock: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False
