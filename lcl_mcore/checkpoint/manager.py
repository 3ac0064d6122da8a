"""When a run saves, how saves end, and where it goes on.

What the training loop uses is one `CheckpointManager` from `open_checkpoints(config, context, tensors, ...)`:

    state = checkpoints.resume()             newest intact checkpoint, loaded and logged; None at step 0
    checkpoints.begin()                      nothing refuses any more: the folder may be changed
    checkpoints.due(step)                    by the number of steps done, alike on every rank
    checkpoints.time_to_save()               by the first rank's clock; it asks the others
    checkpoints.out_of_time()                likewise: the job ends soon
    checkpoints.poll()                       logs once how a save ended; True: saves keep failing, stop
    checkpoints.save(state, final=False)     begins a checkpoint; a final one is seen through
    checkpoints.wait()                       for the save under way
    checkpoints.go_back(accept)              an earlier checkpoint, loaded; later ones are removed

Below it a `Checkpointer` saves and restores. A save copies this rank's shards into host memory, which is all the
training loop waits for. A thread then writes them, with process groups of its own: every rank writes and hashes its
part, reads it back, and when all have, rank 0 commits (see `checkpoint.store`). At most one save is under way. Its
outcome is agreed by the writing threads, so that every rank's `wait` returns the same.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from lcl_mcore.checkpoint.dcp import SafeReader, read_boxes, write_boxes
from lcl_mcore.checkpoint.shards import Shard, Snapshot, training_shards
from lcl_mcore.checkpoint.store import (
    RUN,
    CheckpointStore,
    Entries,
    Manifest,
    TrainState,
    checkpoint_name,
    child,
    open_store,
    outdated,
    read_state,
    run_of_checkpoint,
    run_of_folder,
    step_of,
    verify,
    verify_written,
    write_state,
    written_config,
)
from lcl_mcore.config.run_folder import change_of_model_or_objective, config_text, differences, listed
from lcl_mcore.config.schema import CheckpointConfig, RunConfig
from lcl_mcore.distributed.context import Context
from lcl_mcore.distributed.groups import gather_objects
from lcl_mcore.errors import CheckpointError, LclError, explain
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.optimizer import Optimizer
from lcl_mcore.storage import UnreachableError

T = TypeVar("T")
MAX_FAILED_SAVES = 2  # in a row
_ECHO = "seen from here: "


class Tensors(Protocol):
    """The state of this rank that a checkpoint holds."""

    def shards(self) -> list[Shard]:
        """This rank's ranges; views of live memory."""

    def loaded(self, steps: int) -> None:
        """Called on all ranks when new values, `steps` updates old, are in the shards."""


class TrainingTensors:
    """Master weights and moments of a run."""

    def __init__(self, model: LclModel, optimizer: Optimizer, tp: dist.ProcessGroup) -> None:
        self.model, self.optimizer, self.tp = model, optimizer, (tp.rank(), tp.size())

    def shards(self) -> list[Shard]:
        return training_shards(self.model, self.optimizer, self.tp)

    def loaded(self, steps: int) -> None:
        self.optimizer.restored(steps)


@dataclass(frozen=True)
class Outcome:
    """How a save ended: `problem` is empty if the checkpoint is complete; `seconds` from start to the end of retention,
    and what kept that from removing old ones."""

    step: int
    path: str
    problem: str
    seconds: float
    kept: str = ""


@dataclass(frozen=True)
class Unusable:
    """A checkpoint that a restore skipped: `fault` is one of the constants below."""

    path: str
    fault: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.fault}, skipped: {self.reason}"


DAMAGED, UNREACHABLE, UNLOADABLE = "damaged", "out of reach", "cannot be loaded"
FOREIGN, OTHER_MODEL = "of another run", "of another model or objective"


class Checkpointer:
    """Saves and restores one run; all ranks call every method together, except `poll`."""

    def __init__(
        self,
        store: CheckpointStore,
        tensors: Tensors,
        control: dist.ProcessGroup,
        background: dist.ProcessGroup,
        *,
        keep: int,
        keep_every: int = 0,
        config: str = "",
        changes: Callable[[Path], dict[str, str]] = lambda folder: {},
        node: tuple[int, int] = (0, 1),
        require_lease: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            control, background: all ranks over gloo; `background` serves the writing thread alone.
            keep, keep_every: retention, see `CheckpointConfig`.
            config: text of `config.yaml`, stored in every checkpoint.
            changes: `differences` between the configuration of a verified checkpoint and this run's.
            node: (index, number) of this process among those of its machine.
            require_lease: raises unless this job is the one that may write; called before everything that changes
                the store.
        """
        self.store, self.tensors, self.control, self.background = store, tensors, control, background
        self.keep, self.keep_every, self.config, self.node = keep, keep_every, config, node
        self.require_lease = require_lease
        self.compare, self.changes = changes, dict[str, str]()
        self.rank = control.rank()
        self.run = ""
        """Id of the run; that of the checkpoints it continues, or made with the first one. On the first rank."""
        self.good: set[str] = set()
        """Names of checkpoints that this process wrote or verified; complete on the first rank."""
        self.origin = ""
        """Name of the checkpoint that this process resumed from."""
        self.origin_run = ""
        """What that one says is its run; nothing if it was written by an early version."""
        self.snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        # torch warns that a folder exists, and about each failed rank; we say it once, in a line.
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)

    # --- saving ---

    def allocate(self) -> None:
        """Make the host copies' memory ahead of the first save."""
        if self.snapshot is None:
            self.snapshot = Snapshot(self.tensors.shards())

    def start(self, state: TrainState) -> None:
        """Begin a checkpoint; returns when the values are safe from the steps that follow.

        Raises:
            RuntimeError: the save before has not been waited for.
        """
        if self._thread is not None:
            raise RuntimeError("a save is under way: call `wait` first")
        began = time.perf_counter()
        self.allocate()
        assert self.snapshot is not None
        self.snapshot.take()
        self._thread = threading.Thread(
            target=self._save, args=(state, began), name=f"checkpoint-{state.step}", daemon=True
        )
        self._outcome = None
        self._thread.start()

    def poll(self) -> Outcome | None:
        """How the save under way ended, if this rank knows already; does not wait."""
        return self._outcome

    def wait(self) -> Outcome | None:
        """How the save under way ended, after waiting for it; None if there is none."""
        if self._thread is None:
            return None
        self._thread.join()
        outcome, self._thread, self._outcome = self._outcome, None, None
        return outcome

    def _save(self, state: TrainState, began: float) -> None:
        """The writing thread: each stage begins when all ranks have done the one before."""
        name, kept = checkpoint_name(state.step), ""
        entries: Entries = {}

        def prepare() -> None:
            if self.rank == 0:
                self.require_lease()
                self.store.prepare(name)

        def write() -> None:
            assert self.snapshot is not None
            folder = self.store.staging(name)
            entries.update(write_boxes(folder, self.snapshot.boxes(), self.background))
            if self.rank == 0:
                entries.update(write_state(folder, state, self.config))
            verify_written(folder, entries)

        def commit() -> None:
            if self.rank == 0:
                self.require_lease()
                self.run = self.run or self._run_of(self.store.names()) or secrets.token_hex(8)
                self.store.commit(name, Manifest(self.run, state.step, state.config_digest, everything))
                self.good.add(name)

        try:
            problem = self._together(prepare)
            problem = problem or self._together(write)
            problem = problem or self._together(lambda: self.store.publish(name, entries))
            if not problem:
                parts = gather_objects(entries, self.background)
                everything = {file: entry for part in parts for file, entry in part.items()}
                problem = self._together(commit)
            if not problem:
                kept = self._remove_outdated(name)
        except RuntimeError as error:  # the ranks cannot agree: one of them is gone
            problem = f"rank {self.rank}: {_reason(error)}"
        if not self.store.shared or (problem and self.rank == 0 and not self._attempt(self.require_lease)):
            shutil.rmtree(self.store.staging(name), ignore_errors=True)
        path = child(self.store.location, name)
        self._outcome = Outcome(state.step, path, problem, time.perf_counter() - began, kept)

    def _remove_outdated(self, committed: str) -> str:
        """Remove what retention does not keep; what prevented it.

        Neither what was committed last, nor what this process resumed from, nor another run's goes. Only this run's
        verified checkpoints count. Of those that earlier processes left, as many are verified here, by all ranks
        together, as are needed for the count: with what was committed and resumed from, none for `keep` of 2.
        """
        names: list[str] = []

        def look() -> None:
            if self.rank == 0:
                held = self.store.names()
                names.extend(name for name in held if name in self.good or self._is_ours(name))

        def remove() -> None:
            if self.rank == 0:
                gone = outdated(names, self.good, self.keep, self.keep_every)
                gone = [name for name in gone if name not in (committed, self.origin)]
                self.require_lease()
                self.store.remove(gone)
                self.good.difference_update(gone)

        problem = self._together(look)
        names, good = gather_objects((names, self.good), self.background)[0]
        counted = 0
        for name in reversed(names):
            if problem or counted == self.keep:
                break
            if name not in good and self._problems(name, self.background):
                continue
            self.good.add(name)
            counted += 1
        return problem or self._together(remove)

    def _is_ours(self, name: str) -> bool:
        """Whether a checkpoint is this run's, as far as it says."""
        return run_of_checkpoint(self.store.storage_of(name)) in (None, "", self.run)

    def _problems(self, name: str, group: dist.ProcessGroup) -> str:
        """What is wrong with a checkpoint where it lies. The ranks share the work, and agree."""
        own = verify(child(self.store.location, name), group.rank(), group.size())
        return "; ".join(problem for part in gather_objects(own, group) for problem in part)

    @staticmethod
    def _attempt(action: Callable[[], object]) -> str:
        """Run `action`; its failure as one line, or nothing."""
        try:
            action()
        except (Exception, CheckpointException) as error:  # whatever went wrong, the run must hear of it
            return _reason(error)
        return ""

    def _together(self, action: Callable[[], object]) -> str:
        """Run `action` on every rank; the first problem, those first that are not the echo of another rank's."""
        answers = gather_objects(self._attempt(action), self.background)
        own = [f"rank {rank}: {a}" for rank, a in enumerate(answers) if a and not a.startswith(_ECHO)]
        echoes = [a.removeprefix(_ECHO) for a in answers if a.startswith(_ECHO)]
        return (own or echoes or [""])[0]

    # --- restoring ---

    def names(self) -> list[str]:
        """All checkpoints, damaged or not, oldest first; what the first rank sees.

        Raises:
            CheckpointError: it cannot see; raised on every rank.
        """
        store = self.store
        return self._first(lambda: [name for name in store.names() if not store.unfinished(name)])

    def _first(self, ask: Callable[[], T]) -> T:
        """What the first rank finds, on every rank.

        Raises:
            CheckpointError: it cannot find out.
        """
        found: T | None = None
        problem = ""
        if self.rank == 0:
            try:
                found = ask()
            except LclError as error:
                problem = str(error)
        found, problem = gather_objects((found, problem), self.control)[0]
        if problem:
            raise CheckpointError(problem)
        return found  # type: ignore[return-value]

    def restore(
        self, accept: Callable[[TrainState], bool] = lambda state: True
    ) -> tuple[TrainState | None, list[Unusable]]:
        """Load the newest checkpoint of this run that is intact, accepted and fits this model, of any layout.

        Nothing is written. `changes` are then the settings that were others when it was written.

        Returns:
            The state, None if no checkpoint could be used; and the newer ones that could not, newest first.

        Raises:
            CheckpointError: it cannot be told which run's checkpoints to use; raised on every rank.
        """
        skipped: list[Unusable] = []
        names = self.names()
        self.run = self._first(lambda: self._run_of(names))
        for name in reversed(names):
            where = child(self.store.location, name)
            run = self._first(partial(run_of_checkpoint, self.store.storage_of(name)))
            if run not in (None, "", self.run):
                remedy = "to continue that one, give it a folder of its own"
                reason = f"it belongs to run {run}, this folder to run {self.run} ({remedy})"
                skipped.append(Unusable(where, FOREIGN, reason))
                continue
            path, problem, fault = self._verify(name)
            if problem:
                skipped.append(Unusable(where, fault, problem))
                continue
            state = read_state(path)
            if not accept(state):
                continue
            problem = self._agree(self._attempt(lambda path=path: self._compare(path)))  # type: ignore[misc]
            if not problem and (other := change_of_model_or_objective(self.changes)):
                skipped.append(Unusable(where, OTHER_MODEL, other))
                continue
            problem = problem or self._load(path, state)
            if problem:
                skipped.append(Unusable(where, UNLOADABLE, problem))
                continue
            self.good.add(name)
            self.origin, self.origin_run = name, run or ""
            return state, skipped
        return None, skipped

    def _run_of(self, names: list[str]) -> str:
        """The run that the folder belongs to: by its file, else by its checkpoints.

        Raises:
            CheckpointError: they are of several runs, or some do not say.
        """
        if not names:
            return ""
        known = run_of_folder(self.store.storage_of())
        if known:
            return known
        runs = {run_of_checkpoint(self.store.storage_of(name)): name for name in names}
        runs.pop(None, None)  # unreadable
        if len(runs) > 1:
            found = ", ".join(f"{name} of {run or 'an unnamed one'}" for run, name in runs.items())
            rule = f"holds checkpoints of several runs ({found}), and no file {RUN} says which is meant"
            raise CheckpointError(explain(self.store.location, rule, "Leave those of one run."))
        return next(iter(runs), None) or ""

    def _compare(self, path: Path) -> None:
        self.changes = self.compare(path)

    def clean(self) -> None:
        """Remove what killed saves left behind."""
        if self.rank == 0:
            self._attempt(self.store.clean)

    def set_aside(self, unusable: Unusable) -> str:
        """Rename a checkpoint that cannot be used, so that nothing takes it for one; what became of it."""
        if unusable.fault == UNREACHABLE:
            return "is left as it is: it may be intact"
        reason = "foreign" if unusable.fault in (FOREIGN, OTHER_MODEL) else "damaged"
        try:
            return f"is now {self.store.set_aside(unusable.path.rsplit('/', 1)[-1], reason)}"
        except (OSError, LclError) as error:
            return f"could not be renamed: {_reason(error)}"

    def set_all_aside(self) -> None:
        """Name all checkpoints `former-step-...`, oldest first. Collective.

        Raises:
            CheckpointError: one of them cannot be renamed.
        """
        problem = ""
        try:
            for name in self.store.names() if self.rank == 0 else ():
                self.store.set_aside(name, "former")
        except (OSError, LclError) as error:
            problem = _reason(error)
        problem = self._agree(problem)
        if problem:
            rule = f"its checkpoints cannot be renamed: {problem}"
            raise CheckpointError(explain(self.store.location, rule, "Mend that, or choose another folder."))

    def _verify(self, name: str) -> tuple[Path, str, str]:
        """Local folder of a checkpoint, what is wrong with it, and which kind of fault. The ranks agree."""
        part, parts = (self.rank, self.control.size()) if self.store.shared else self.node
        fault = DAMAGED
        try:
            path, problems = self.store.fetch(name, part, parts)
        except (OSError, LclError) as error:
            path, problems = Path(name), [_reason(error)]
            fault = UNREACHABLE if isinstance(error, UnreachableError) else DAMAGED
        answers = gather_objects((problems, fault), self.control)
        found = sorted({problem for own, _ in answers for problem in own})
        unreachable = any(kind == UNREACHABLE for _, kind in answers)
        return path, "; ".join(found[:3]), UNREACHABLE if unreachable else DAMAGED

    def _agree(self, problem: str) -> str:
        """The first rank's problem, on all ranks."""
        return next((answer for answer in gather_objects(problem, self.control) if answer), "")

    def _load(self, path: Path, state: TrainState) -> str:
        """Fill the tensors from a verified checkpoint; what is wrong with it, and then no rank's tensors changed."""
        shards = self.tensors.shards()
        own = {s.key for s in shards if s.mine and s.start == 0 and not any(s.origin)}
        expected = {key for keys in gather_objects(own, self.control) for key in keys}
        space = [torch.empty(shard.flat.numel(), dtype=shard.flat.dtype) for shard in shards]

        def read() -> None:
            _require_no_others(path, expected)
            pairs = zip(shards, space, strict=True)
            read_boxes(path, [box for shard, flat in pairs for box in shard.boxes(flat)])

        problem = self._agree(self._attempt(read))
        if not problem:
            for shard, flat in zip(shards, space, strict=True):
                shard.flat.copy_(flat)
            self.tensors.loaded(state.step)
        return problem

    def discard_after(self, step: int) -> str:
        """Remove this run's checkpoints of later steps; what prevented it. No save may be under way."""
        if self.rank != 0:
            return ""
        self.require_lease()
        return self._attempt(
            lambda: self.store.remove(
                [name for name in self.store.names() if (step_of(name) or 0) > step and self._is_ours(name)]
            )
        )


def _require_no_others(path: Path, expected: set[str]) -> None:
    """Refuse a checkpoint with tensors that no rank of this run has.

    Raises:
        CheckpointError: it has some, or is damaged.
    """
    extra = sorted(set(SafeReader(path).read_metadata().state_dict_metadata) - expected)
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        raise CheckpointError(
            explain(
                path,
                f"holds tensors that this model lacks: {', '.join(extra[:3])}{more}",
                "Use the configuration it was written with.",
            )
        )


def _reason(error: BaseException) -> str:
    """The telling line of an error; of one that torch made of all ranks' failures, the first rank's."""
    if isinstance(error, CheckpointException) and error.failures:
        rank = min(error.failures)
        return f"{_ECHO}rank {rank}: {_reason(error.failures[rank][0])}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# --- policy ---


def slurm_seconds_left(log: Callable[[str], None]) -> float | None:
    """Seconds until SLURM ends this job; None outside SLURM, or when this machine's clock cannot be right."""
    if "SLURM_JOB_END_TIME" not in os.environ:
        return None
    start, end = (float(os.environ.get(f"SLURM_JOB_{name}_TIME", "nan")) for name in ("START", "END"))
    now = time.time()
    if now >= end or now < start:  # false for NaN: older SLURM does not tell the start
        span = f"the SLURM job's {start:.0f} to {end:.0f}"
        log(f"WARNING this machine's clock says {now:.0f}, outside {span}: the job's end is not used")
        return None
    return end - now


class CheckpointManager:
    """One run's checkpoints for the training loop. All ranks call every method together but those that ask.

    Steps decide on every rank alike. Clocks decide on the first rank, which asks the others with the step's own
    reduction. A failed save is logged and tried again at the next checkpoint; two in a row, or the last one, end
    the run.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        config: CheckpointConfig,
        rank: int,
        log: Callable[[str], None],
        seconds_left: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take over a run's checkpoints.

        Args:
            log: prints a line once, on the first rank.
            seconds_left: until the job is ended from outside, if that is known.
            clock: monotonic seconds.
        """
        self.checkpointer, self.config, self.rank = checkpointer, config, rank
        self.log, self.clock = log, clock
        self.begun = self.last_save = clock()
        self.longest = 0.0
        """Seconds of the longest save so far."""
        self.saved_step: int | None = None
        """Step of the newest checkpoint begun; there is no need for another one of it."""
        self.failed = 0
        """Saves in a row that failed."""
        self._logged: Outcome | None = None
        self._unusable: list[Unusable] = []
        ends = [] if seconds_left is None else [self.begun + seconds_left]
        if config.max_hours:
            ends.append(self.begun + 3600 * config.max_hours)
        self.end = min(ends, default=None)
        # Before any save has been timed: a twentieth of what is left, at most two minutes.
        self.reserve = min(120.0, (self.end - self.begun) / 20) if self.end is not None else 0.0

    # --- asked in every step; no rank waits for another ---

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return self.config.every > 0 and step % self.config.every == 0

    def time_to_save(self) -> bool:
        """Whether `checkpoint.minutes` are over since the last save; on the first rank only."""
        limit = 60 * self.config.minutes
        return self.rank == 0 and limit > 0 and self.clock() - self.last_save >= limit

    def out_of_time(self) -> bool:
        """Whether it is time for the last checkpoint, by `checkpoint.max_hours` or SLURM; on the first rank only."""
        if self.rank != 0 or self.end is None:
            return False
        return self.clock() + max(2 * self.longest, self.reserve) >= self.end

    def poll(self) -> bool:
        """Log how the save under way ended, as soon as this rank knows; True if too many have failed to go on.

        The count itself is taken by `save` and `wait`, on all ranks together.
        """
        outcome = self.checkpointer.poll()
        if outcome is None:
            return False
        self._report(outcome)
        return outcome.problem != "" and self.failed + 1 >= MAX_FAILED_SAVES

    # --- saving ---

    def save(self, state: TrainState, *, final: bool = False) -> None:
        """Begin a checkpoint, unless this step has one; a `final` one is seen through.

        Raises:
            CheckpointError: the save before was the second in a row to fail, or the final one failed.
        """
        self._settle(self.checkpointer.wait(), final=False)
        if state.step == self.saved_step:
            return
        self.saved_step, self.last_save = state.step, self.clock()
        self.checkpointer.start(state)
        if final or not self.config.asynchronous:
            self._settle(self.checkpointer.wait(), final)

    def wait(self) -> None:
        """See the save under way through, and log how it ended; for a run that ends because of something else."""
        outcome = self.checkpointer.wait()
        if outcome is not None:
            self._report(outcome)

    def _settle(self, outcome: Outcome | None, final: bool) -> None:
        """Act on how a save ended; the same on every rank."""
        if outcome is None:
            return
        if not outcome.problem:
            self.failed = 0
            self.longest = max(self.longest, outcome.seconds)
        else:
            self.failed += 1
            if self.saved_step == outcome.step:
                self.saved_step = None
            if final or self.failed >= MAX_FAILED_SAVES:
                raise CheckpointError(_save_failed(outcome))
        self._report(outcome)

    def _report(self, outcome: Outcome) -> None:
        """Log an outcome once."""
        if outcome is self._logged:
            return
        self._logged = outcome
        if outcome.problem:
            self.log(f"WARNING {_save_failed(outcome)} Training goes on and tries again at the next checkpoint.")
        else:
            self.log(f"checkpoint {outcome.path} complete after {outcome.seconds:.1f} s")
        if outcome.kept:
            self.log(f"WARNING older checkpoints could not be removed: {outcome.kept}")

    # --- restoring ---

    def resume(self) -> TrainState | None:
        """Load the newest checkpoint that can be used, and log why newer ones cannot; None if there are none at all.

        Nothing is written, so that what follows may still refuse to go on.

        Raises:
            CheckpointError: there are checkpoints, and none can be used.
        """
        location = self.checkpointer.store.location
        state, self._unusable = self._restore(lambda state: True)
        if state is not None:
            path = child(location, checkpoint_name(state.step))
            self.log(f"resume: {path}, {state.step} steps done")
            if not self.checkpointer.origin_run:
                self.log(f"resume: {path} is of an earlier version and names no run; it is taken for this run's")
            if self.changes:
                self.log(f"resume: settings that were others until then: {listed(self.changes)}")
            self.saved_step = state.step
            return state
        if self._unusable:
            newest = self._unusable[0]
            rule = f"{newest.fault}, and no other checkpoint can be used: {newest.reason.removesuffix('.')}"
            remedy = "Put back a good copy, or start at step 0 with --start-over in place of --resume."
            if newest.fault == OTHER_MODEL:
                remedy = "Resume with the former values, or start a new run from its weights (--out, --init-from)."
            raise CheckpointError(explain(newest.path, rule, remedy))
        self.log(f"resume: no complete checkpoint in {location}, starting at step 0")
        return None

    @property
    def changes(self) -> dict[str, str]:
        """Settings that were others when the checkpoint that was loaded was written, by path."""
        return self.checkpointer.changes

    def begin(self) -> None:
        """Make order before the first save: unusable checkpoints get another name, leftovers of killed saves go."""
        self.checkpointer.clean()
        self._set_aside()

    def set_all_aside(self) -> None:
        """Give all checkpoints names that do not count (former-step-...), the newest last: a kill half-way loses none.

        Raises:
            CheckpointError: one of them cannot be renamed. Collective.
        """
        self.checkpointer.set_all_aside()
        self.log(f"start over: checkpoints in {self.checkpointer.store.location} are now named former-...")

    def _set_aside(self) -> None:
        unusable, self._unusable = self._unusable, []
        for item in unusable if self.rank == 0 else ():
            self.log(f"{item.path} {self.checkpointer.set_aside(item)}")

    def _restore(self, accept: Callable[[TrainState], bool]) -> tuple[TrainState | None, list[Unusable]]:
        state, skipped = self.checkpointer.restore(accept)
        for unusable in skipped:
            self.log(str(unusable))
        return state, skipped

    def go_back(self, accept: Callable[[TrainState], bool]) -> TrainState | None:
        """Load the newest intact checkpoint whose state is accepted, and remove all later ones; None if there is none.

        No parameters may be on their way between ranks meanwhile.

        Raises:
            CheckpointError: the save under way was the second in a row to fail.
        """
        self._settle(self.checkpointer.wait(), final=False)
        state, self._unusable = self._restore(accept)
        if state is None:
            return None
        self._set_aside()
        problem = self.checkpointer.discard_after(state.step)
        if problem:
            self.log(f"WARNING later checkpoints could not be removed, remove them before a restart: {problem}")
        self.saved_step = state.step
        path = child(self.checkpointer.store.location, checkpoint_name(state.step))
        self.log(f"went back to {path}, {state.step} steps done")
        return state


def open_checkpoints(
    config: RunConfig, context: Context, tensors: Tensors, may_hold: bool, require_lease: Callable[[], None]
) -> CheckpointManager:
    """The checkpoints of a run. Collective.

    Args:
        may_hold: whether there may be checkpoints already, to resume from or to set aside.
        require_lease: see `Checkpointer`.

    Raises:
        CheckpointError: there are checkpoints already, and there may be none.
    """
    staging = context.run_folder / "checkpoints"
    store = open_store(config.checkpoint.folder or str(staging), staging)
    node = (int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    checkpointer = Checkpointer(
        store,
        tensors,
        context.groups.host_control,
        context.groups.host_checkpoint,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        config=config_text(config),
        changes=lambda folder: differences(written_config(folder, context.log), config),
        node=node,
        require_lease=require_lease,
    )
    held = checkpointer.names()
    if held and not may_hold:
        raise CheckpointError(
            explain(
                store.location,
                f"already holds checkpoints ({held[-1]} and others)",
                "Add --resume to continue, or --start-over, or choose another folder.",
            )
        )
    return CheckpointManager(
        checkpointer, config.checkpoint, context.rank, context.log, slurm_seconds_left(context.log)
    )


def _save_failed(outcome: Outcome) -> str:
    return explain(
        f"checkpoint {outcome.path}",
        f"could not be written: {outcome.problem}",
        "Free or enlarge the disk; earlier checkpoints are intact.",
    )
