"""One folder, one writer: the lease that a job holds on its run's folder, and on a checkpoint folder elsewhere.

A lease is a file `lease-NUMBER.json` with the writer's name, a token and a heartbeat. Numbers only grow, and a file is
created exclusively (in object stores by a conditional put), so that of several contenders exactly one gets a number.
The holder of the highest number is the writer. It refreshes its file; a job that finds one refreshed is refused, and a
writer that finds a higher number, or its own file gone, has lost the folder and stops before it writes anything more.

Whether a holder lives is never read from a clock: a contender watches whether the heartbeat moves. A process of the
same machine that is gone holds nothing, so restarts in place, and jobs that follow a killed one there, do not wait.

In object stores that ignore the condition of a put, two contenders that start in the same moment both begin; the one
whose file was overwritten sees it at its next heartbeat, or before its first commit, and stops.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol

import psutil
import torch.distributed as dist
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from lcl_mcore.config.schema import RunConfig
from lcl_mcore.distributed.context import Context
from lcl_mcore.errors import DataError, LclError, LeaseError, explain
from lcl_mcore.fault_tolerance.heartbeat import process_namespace, process_state
from lcl_mcore.storage import LocalStorage, MissingError, RemoteStorage, make_folder, open_storage, remove_empty
from lcl_mcore.untrusted import open_regular

BEATS = 12
"""Heartbeats in the time after which a silent holder has lost its lease."""
POLL_SECONDS = 0.5
MAX_BYTES = 4096
_FILE = re.compile(r"lease-([0-9]{6})\.json")


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True)
class Holder:
    """What a lease says.

    Attributes:
        token: of one attempt of one job.
        host, pid: its first process.
        namespace: equal for processes that see each other in /proc.
        started: when that process was made, which tells it from a later one with its number.
        seconds: after so long without a heartbeat the lease may be taken over.
        beat: heartbeats so far, with leading zeros: the file keeps its size.
    """

    token: Annotated[str, Field(max_length=64)]
    host: Annotated[str, Field(max_length=256)]
    pid: int
    namespace: Annotated[str, Field(max_length=512)]
    started: float
    seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
    beat: Annotated[str, Field(pattern="^[0-9]{12}$")]

    def name(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_gone(self) -> bool:
        """Whether it was a process of this machine that has ended."""
        if self.namespace != process_namespace():
            return False
        try:
            return not process_state(self.pid) or abs(psutil.Process(self.pid).create_time() - self.started) > 1.0
        except psutil.Error:
            return True


_HOLDER = TypeAdapter(Holder)


def _parsed(content: bytes) -> Holder | None:
    """What a file says; None if it is not one of ours, or is just being written."""
    try:
        return _HOLDER.validate_json(content)
    except ValidationError:
        return None


class Place(Protocol):
    """The folder that holds the lease files."""

    def names(self) -> list[str]:
        """All names in it."""

    def read(self, name: str) -> bytes | None:
        """Content of a small file; None if it is not there."""

    def create(self, name: str, content: bytes) -> bool:
        """Make a file; False if it is there already."""

    def refresh(self, name: str, token: bytes, content: bytes) -> bool:
        """Replace the content of the file with this token in it; False if there is none."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def close(self) -> None:
        """Remove folders that were made for the lease and are still empty."""


class LocalPlace:
    """A folder of a disk; it is made if it does not exist."""

    def __init__(self, storage: LocalStorage) -> None:
        self.folder = Path(storage.root)
        self.storage = storage
        self.made = make_folder(self.folder)

    def names(self) -> list[str]:
        return self.storage.names()

    def read(self, name: str) -> bytes | None:
        try:
            with open_regular(self.folder / name) as file:  # not through held descriptors: network disks look again
                return file.read(MAX_BYTES)
        except FileNotFoundError:
            return None

    def create(self, name: str, content: bytes) -> bool:
        try:
            with open(self.folder / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        return True

    def refresh(self, name: str, token: bytes, content: bytes) -> bool:
        """In place: it needs no room on a full disk, and cannot reach a later file of the same name."""
        try:
            with open_regular(self.folder / name, os.O_RDWR) as file:
                if token not in file.read(MAX_BYTES):
                    return False
                file.seek(0)
                file.write(content)
                os.fsync(file.fileno())
        except FileNotFoundError:
            return False
        return True

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        remove_empty(self.made)


class RemotePlace:
    """A folder of an object store."""

    def __init__(self, storage: RemoteStorage) -> None:
        self.storage = storage
        self.create, self.remove, self.close = storage.create, storage.remove, storage.close

    def names(self) -> list[str]:
        try:
            return self.storage.names()
        except MissingError:
            return []

    def read(self, name: str) -> bytes | None:
        try:
            return self.storage.read_whole(name)[:MAX_BYTES]
        except MissingError:
            return None

    def refresh(self, name: str, token: bytes, content: bytes) -> bool:
        if token not in (self.read(name) or b""):
            return False
        self.storage.write(name, content)
        return True


class Lease:
    """One process's claim to one folder: `ask` until it is granted, `require` it before writing, `close` it.

    Args:
        location: path or URL of the folder.
        seconds: after so long without a heartbeat another job may take it.
        log: prints a line.
    """

    def __init__(self, location: str, seconds: float, log: Callable[[str], None]) -> None:
        self.location, self.log = location, log
        process = psutil.Process()
        self.own = Holder(
            uuid.uuid4().hex,
            os.uname().nodename,
            process.pid,
            process_namespace(),
            process.create_time(),
            seconds,
            f"{0:012}",
        )
        storage = open_storage(location)
        self.place: Place = LocalPlace(storage) if isinstance(storage, LocalStorage) else RemotePlace(storage)
        self.number = 0
        """Of the lease that is held; 0: none."""
        self.watched: tuple[int, bytes] | None = None
        self.since = 0.0
        self.lost = ""
        self.seen = 0.0
        """When it was last seen that the lease is held, in monotonic seconds."""
        self.finished = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    # --- taking it ---

    def ask(self) -> bool:
        """Take the lease if it is free; to be repeated until it is, or is refused.

        Raises:
            LeaseError: another process writes this folder.
        """
        if self.number:
            return True
        newest = max(self._numbers(), default=0)
        if newest and not self._is_free(newest):
            return False
        if not self.place.create(_file(newest + 1), self._content()) and self._read(newest + 1) != self.own:
            return False  # somebody else was first
        self.number = newest + 1
        self.thread.start()
        return True

    def _numbers(self) -> list[int]:
        return [int(match[1]) for name in self.place.names() if (match := _FILE.fullmatch(name))]

    def _is_free(self, number: int) -> bool:
        content = self.place.read(_file(number))
        if content is None:
            return False  # given back in this moment: look again
        holder = _parsed(content)
        name = holder.name() if holder else "a process that left no name"
        patience = holder.seconds if holder else self.own.seconds
        if holder and holder.is_gone():
            self.log(f"{self.location}: taken over from {name}, which has ended")
            return True
        if self.watched is None:
            self.watched, self.since = (number, content), time.monotonic()
            self.log(f"{self.location}: {name} may write it; watching for up to {patience:g} s whether it lives")
        elif self.watched != (number, content):
            rule = f"is being written by {name}, whose heartbeat goes on"
            raise LeaseError(explain(self.location, rule, "Wait until it ends, end it, or choose another folder."))
        elif time.monotonic() - self.since >= patience:
            self.log(f"{self.location}: taken over from {name}, which gave no sign of life for {patience:g} s")
            return True
        return False

    def _read(self, number: int) -> Holder | None:
        content = self.place.read(_file(number))
        return _parsed(content) if content is not None else None

    def _content(self) -> bytes:
        return _HOLDER.dump_json(self.own)

    # --- holding it ---

    def clear(self) -> None:
        """Remove the files of those who held it before."""
        for number in self._numbers():
            if number < self.number:
                self.place.remove(_file(number))

    def require(self) -> None:
        """Look whether the lease is still held.

        Raises:
            LeaseError: it is not; nothing may be written any more.
            OSError, DataError: that cannot be seen now.
        """
        if not self.lost:
            own, newer = self._read(self.number), self._read(self.number + 1)
            if newer is not None or own is None or own.token != self.own.token:
                whom = f"taken over by {newer.name()}" if newer else "taken over by another job"
                remedy = "This process stops and saves nothing more; the other one goes on."
                self.lost = explain(self.location, whom, remedy)
        if self.lost:
            raise LeaseError(self.lost)
        self.seen = time.monotonic()

    def require_lately(self) -> None:
        """`require`, if the heartbeat did not look lately: this process may have been stopped meanwhile."""
        if self.lost or time.monotonic() - self.seen > 2 * self.own.seconds / BEATS:
            self.require()

    def _beat(self) -> None:
        token = self.own.token.encode()
        while not self.finished.wait(self.own.seconds / BEATS):
            self.own = replace(self.own, beat=f"{int(self.own.beat) + 1:012}")
            try:
                self.require()
                self.place.refresh(_file(self.number), token, self._content())
            except LeaseError:
                return
            except (OSError, DataError):
                continue  # tried again; should others take it over meanwhile, `require` finds out

    def close(self) -> None:
        """Give the lease back, as if it had never been taken."""
        self.finished.set()
        with contextlib.suppress(OSError, LclError):  # then it goes stale, or is another's by now
            if self.number:
                self.thread.join()
                self.require()
                self.place.remove(_file(self.number))
        self.place.close()


class RunLease:
    """The leases of a run, on its first rank: on its folder, and on that of its checkpoints if that is elsewhere.

    Other ranks have one without leases, which permits everything: they write what the first rank commits.
    """

    def __init__(self) -> None:
        self.leases: dict[str, Lease] = {}
        self.unguarded = ""
        """The run's folder, if it cannot be written and checkpoints go elsewhere."""

    def ask(self, config: RunConfig, context: Context) -> bool:
        """Try to take what a run needs; to be repeated until everything is held.

        Raises:
            LeaseError: another process writes there, or it cannot be written.
        """
        elsewhere, run = config.checkpoint.folder, str(context.run_folder)
        held = True
        for location in {elsewhere or run, run} - {self.unguarded}:
            try:
                if location not in self.leases:
                    self.leases[location] = Lease(location, config.faults.lease_seconds, context.log)
                held = self.leases[location].ask() and held
            except OSError as error:
                rule = f"cannot be written ({error.strerror or error})"
                if location == elsewhere or not elsewhere:
                    remedy = "Choose another folder, or give this one its rights and space back."
                    raise LeaseError(explain(location, rule, remedy)) from error
                self.leases.pop(location, None)
                self.unguarded = location
                context.log(f"WARNING {location}: {rule}; other jobs are kept out of the checkpoints alone")
        return held

    def require(self) -> None:
        """Before a commit: look everywhere.

        Raises:
            LeaseError: another job has taken over.
            OSError, DataError: that cannot be seen now.
        """
        for lease in self.leases.values():
            lease.require()

    def require_lately(self) -> None:
        """Before a line is appended: trust a heartbeat that was lately.

        Raises:
            LeaseError: another job has taken over.
        """
        for lease in self.leases.values():
            with contextlib.suppress(OSError, DataError):  # a fault of the disk is no other writer
                lease.require_lately()

    def clear(self) -> None:
        """The run begins to write: what earlier holders left goes."""
        for lease in self.leases.values():
            with contextlib.suppress(OSError, DataError):
                lease.clear()

    def close(self) -> None:
        """Give everything back."""
        for lease in self.leases.values():
            lease.close()


@contextlib.contextmanager
def hold(config: RunConfig, context: Context) -> Iterator[RunLease]:
    """Take the leases of a run before anything is written, and give them back. Collective.

    Raises:
        LeaseError: another process writes there, or it cannot be written.
    """
    lease = RunLease()
    try:
        _take(lease, config, context)
        yield lease
    finally:
        lease.close()


def _take(lease: RunLease, config: RunConfig, context: Context) -> None:
    """Ask on the first rank until there is an answer, which all ranks get."""
    while True:
        answer: list[tuple[bool, str]] = [(False, "")]
        if context.rank == 0:
            try:
                answer = [(lease.ask(config, context), "")]
            except LclError as error:
                answer = [(False, str(error))]
        dist.broadcast_object_list(answer, group_src=0, group=context.groups.host_control)
        held, problem = answer[0]
        if problem:
            raise LeaseError(problem)
        if held:
            return
        time.sleep(POLL_SECONDS)


def _file(number: int) -> str:
    return f"lease-{number:06d}.json"
