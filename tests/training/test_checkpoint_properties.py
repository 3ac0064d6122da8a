"""Whatever lies in a folder, whatever is kept, wherever a process dies: what was reported saved is found again.

A kill is an exception at one operation on files, or one request; from then on every further one fails too.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from checkpoint_toys import Run
from lcl_mcore.checkpoint.store import checkpoint_names, run_of_checkpoint, step_of, verify
from lcl_mcore.config.schema import CheckpointConfig
from lcl_mcore.errors import CheckpointError
from lcl_mcore.storage import RemoteStorage, open_storage

MANY = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
DAMAGE = ("flipped", "cut", "without manifest", "huge manifest", "renamed")
IN_ITS_PLACE = ("foreign", "file", "empty", "loop", "dangling")
KINDS = st.sampled_from(["good", "good", "good", "linked", *DAMAGE, *IN_ITS_PLACE])
SAVES = st.lists(st.integers(1, 9), min_size=1, max_size=4)  # steps ahead of the one before
RULES = st.tuples(st.integers(1, 4), st.sampled_from([0, 0, 5, 10]))  # keep, keep_every
KILLS = st.none() | st.integers(0, 60)


class KilledError(BaseException):
    """This process is dead."""


@dataclass
class Life:
    """What counts: operations below `folder`, and requests. How many are `left`; None: it lives on."""

    folder: str = "/nowhere/"
    left: int | None = None

    def operation(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KilledError


LIFE = Life()


def _audit(happened: str, arguments: tuple[Any, ...]) -> None:
    watched = happened in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
    if watched and str(arguments[0]).startswith(LIFE.folder):
        LIFE.operation()


@pytest.fixture(scope="module", autouse=True)
def _mortal(groups: Any) -> Iterator[None]:
    """Have operations count."""
    sys.addaudithook(_audit)  # for good: there is no way to take one out
    spoken, retried = threading.excepthook, RemoteStorage._retried

    def counted(self: RemoteStorage, *arguments: Any, **options: Any) -> Any:
        LIFE.operation()
        return retried(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda args: None if args.exc_type is KilledError else spoken(args))
        patch.setattr(RemoteStorage, "_retried", counted)
        yield
    LIFE.folder = "/nowhere/"


@pytest.fixture(scope="module")
def pair(groups: Any) -> list[dist.ProcessGroup]:
    """Two groups of this process, for all runs."""
    return [dist.new_group([0], backend="gloo") for _ in range(2)]


@dataclass
class Place:
    """Where one example's checkpoints are."""

    folder: Path
    groups: list[dist.ProcessGroup]
    location: str
    starts: Iterator[int] = field(default_factory=count)

    def run(self, keep: int = 99, keep_every: int = 0) -> Run:
        """A process that starts."""
        staging = self.folder / str(next(self.starts)) if "://" in self.location else self.folder
        config = CheckpointConfig(keep=keep, keep_every=keep_every)
        return Run(staging, config, location=self.location, groups=self.groups)

    def good(self, run: str) -> list[int]:
        """Steps of the run's checkpoints that verify."""
        paths = {step_of(name) or 0: f"{self.location}/{name}" for name in checkpoint_names(self.location)}
        return [
            step for step, path in paths.items() if run_of_checkpoint(open_storage(path)) == run and not verify(path)
        ]


def wanted(good: list[int], keep: int, keep_every: int, always: set[int]) -> list[int]:
    """The steps that retention leaves."""
    return [s for s in good if s in good[-keep:] or s in always or (keep_every and s % keep_every == 0)]


def save(run: Run, step: int, kill: int | None) -> bool:
    """Save, and die at the `kill`-th operation of it if there are so many; whether it died."""
    LIFE.left = kill
    try:
        run.save(step, final=True)
        return LIFE.left is not None and LIFE.left < 0  # in the thread that writes
    except KilledError:
        return True
    finally:
        LIFE.left = None


def check(place: Place, rules: tuple[int, int], saves: list[int], kill: int | None, good: list[int]) -> None:
    """Start on what is there, save some steps, perhaps die; then start again."""
    run, reported = place.run(*rules), max(good, default=0)
    state = run.manager.resume()
    assert (state.step if state else 0) == reported
    assert state is None or run.holds(state.step)
    run.manager.begin()
    origin, died = reported, False
    for ahead in saves:
        died = save(run, reported + ahead, kill)
        if died:
            break
        reported += ahead
        good = wanted(sorted({*good, reported}), *rules, {origin, reported})
        assert place.good(run.manager.checkpointer.run) == good
    event("killed" if died else "lived")
    again = place.run(*rules)
    state = again.manager.resume()
    if state is None:
        assert (reported, died) == (0, True)
        return
    assert state.step >= reported
    assert again.holds(state.step)
    again.manager.begin()
    again.save(state.step + 1, final=True)
    assert max(place.good(again.manager.checkpointer.run)) == state.step + 1


def spoil(path: Path, kind: str, foreign: Path) -> None:
    """Make this of a checkpoint in a local folder."""
    if kind == "flipped":
        content = bytearray((path / "__0_0.distcp").read_bytes())
        content[len(content) // 2] ^= 4
        (path / "__0_0.distcp").write_bytes(content)
    elif kind == "cut":
        (path / "state.json").write_bytes((path / "state.json").read_bytes()[:-1])
    elif kind == "without manifest":
        (path / "manifest.json").unlink()
    elif kind == "huge manifest":
        os.truncate(path / "manifest.json", 3 << 30)
    elif kind == "renamed":
        path.rename(path.with_name(f"step-{999_999_999_000 + (step_of(path.name) or 0)}"))
    elif kind == "linked":  # as good as any
        moved = path.with_name(f"moved-{path.name}")
        path.rename(moved)
        path.symlink_to(moved)
    else:
        shutil.rmtree(path)
        if kind == "foreign":
            shutil.copytree(foreign / path.name, path)
        elif kind == "file":
            path.write_text("x")
        elif kind == "empty":
            path.mkdir()
        else:
            path.symlink_to(path if kind == "loop" else path.with_name("gone"))


def test_a_local_folder(pair: list[dist.ProcessGroup], tmp_path: Path) -> None:
    """Good, damaged, foreign and misplaced things of every kind, before the first start."""
    number = count()

    @MANY
    @given(st.dictionaries(st.integers(1, 30), KINDS, max_size=6), RULES, SAVES, KILLS)
    def examples(held: dict[int, str], rules: tuple[int, int], saves: list[int], kill: int | None) -> None:
        folder, strangers = tmp_path / f"{next(number)}", tmp_path / f"{next(number)}"
        LIFE.folder = f"{folder}/"
        place = Place(folder, pair, str(folder))
        first, other = place.run(), Place(strangers, pair, str(strangers)).run()
        for step, kind in sorted(held.items()):
            first.save(step, final=True)
            if kind == "foreign":
                other.save(step, final=True)
        for step, kind in held.items():
            if kind != "good":
                spoil(folder / f"step-{step:08d}", kind, strangers)
        good = sorted(step for step, kind in held.items() if kind in ("good", "linked"))
        if held and not good:
            with pytest.raises(CheckpointError, match="no other checkpoint can be used"):
                place.run(*rules).manager.resume()
            assert len(checkpoint_names(place.location)) == len(held)
            return
        check(place, rules, saves, kill, good)
        for step in (step for step, kind in held.items() if kind == "foreign"):  # nobody's business
            kept = [folder / f"{before}step-{step:08d}" for before in ("", "foreign-")]
            theirs = [
                path for path in kept if run_of_checkpoint(open_storage(str(path))) == other.manager.checkpointer.run
            ]
            assert [verify(path) for path in theirs] == [[]]

    examples()


def test_an_object_store(pair: list[dist.ProcessGroup], tmp_path: Path) -> None:
    number, memory = count(), fsspec.filesystem("memory")
    kinds = st.sampled_from(["good", "good", "flipped", "without manifest"])

    @MANY
    @given(st.dictionaries(st.integers(1, 30), kinds, max_size=4), RULES, SAVES, KILLS)
    def examples(held: dict[int, str], rules: tuple[int, int], saves: list[int], kill: int | None) -> None:
        place = Place(tmp_path / f"{next(number)}", pair, f"memory://properties/{next(number)}")
        first = place.run()
        for step in sorted(held):
            first.save(step, final=True)
        for step, kind in held.items():
            path = f"{place.location.removeprefix('memory:/')}/step-{step:08d}"
            if kind == "flipped":
                content = bytearray(memory.cat_file(f"{path}/__0_0.distcp"))
                content[len(content) // 2] ^= 4
                memory.pipe_file(f"{path}/__0_0.distcp", bytes(content))
            elif kind == "without manifest":
                memory.rm_file(f"{path}/manifest.json")
        good = sorted(step for step, kind in held.items() if kind == "good")
        if not good and "flipped" in held.values():
            with pytest.raises(CheckpointError, match="no other checkpoint can be used"):
                place.run(*rules).manager.resume()
            return
        check(place, rules, saves, kill, good)  # without a manifest, it is an upload that did not end

    examples()
