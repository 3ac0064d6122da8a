"""Files beside the checkpoints: whatever lies in them is read, and whatever happens to them, training goes on."""

from __future__ import annotations

import json
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_mcore.fault_tolerance.events import EVENTS, is_restart, read_events
from lcl_mcore.fault_tolerance.goodput import past_attempts
from lcl_mcore.json_lines import MAX_LINE, LineWriter, number, read_records
from lcl_mcore.metrics import StepLines, TensorBoard, read_steps

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["start", "tick", "end", "skip", "leave-out", "rollback", "job"])
FIELDS = st.sampled_from(
    ["event", "time", "step", "step_seconds", "data_seconds", "batches", "loss", "wall", "productive"]
)
NEARLY = st.dictionaries(FIELDS, JSON | NAMES | st.integers(0, 9), max_size=6)
LINES = st.one_of(
    st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")),
    (JSON | NEARLY).map(lambda value: json.dumps(value).encode()),
    st.builds(lambda step: json.dumps({"step": step, "step_seconds": 1.0, "loss": 2.0}).encode(), st.integers(0, 20)),
    st.sampled_from([b"[" * 100_000, b'{"step": 1e999}', b"\xff\xfe{}", b"3", b"null", b"{}", b'{"step": NaN}']),
)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes, as on a full disk: what fits is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@given(st.lists(LINES, max_size=12), st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_lies_in_a_file_is_read(lines: list[bytes], torn: bool) -> None:
    """Sound lines are kept, others counted; rewinding drops later steps and leaves every damaged line as it is."""
    with folder() as at:
        content = b"\n".join(lines) + (b"" if torn else b"\n")
        (at / EVENTS).write_bytes(content)
        past_attempts(read_events(at), now=10.0)
        assert not is_restart(at)
        path = at / "metrics.jsonl"
        path.write_bytes(content)
        found = read_records(path, lambda record: number(record, "step"))
        assert len(found.records) + found.damaged == sum(bool(line.strip()) for line in lines)
        steps = [record["step"] for record in read_steps(path)]
        assert steps == sorted(set(steps))

        writer = StepLines(path, lambda line: None)
        gone = writer.rewind(5)
        assert all(record["step"] > 5 for record in gone)
        after = read_records(path, lambda record: number(record, "step"))
        assert [r["step"] for r in after.records] == [r["step"] for r in found.records if r["step"] <= 5]
        assert after.damaged == found.damaged
        writer.write({"step": 6})
        writer.close()
        assert read_steps(path)[-1]["step"] == 6


def test_a_line_too_long_is_one_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n"' + b"x" * 3 * MAX_LINE + b'"\n{"step": 2}')
    found = read_records(path, lambda record: True)
    assert ([r["step"] for r in found.records], found.damaged) == ([1, 2], 1)
    before = path.read_bytes()
    assert [r["step"] for r in StepLines(path, lambda line: None).rewind(1)] == [2]
    assert path.read_bytes() == before.removesuffix(b'{"step": 2}')  # not a byte of the damaged line is lost


def test_a_later_attempt_replaces_steps_that_could_not_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = [(1, 0.1), (2, 0.2), (3, 0.3), (2, 0.4), (3, 0.5)]
    path.write_text("".join(json.dumps({"step": s, "loss": loss}) + "\n" for s, loss in steps))
    assert [(r["step"], r["loss"]) for r in read_steps(path, ["loss"])] == [(1, 0.1), (2, 0.4), (3, 0.5)]
    assert read_steps(path, ["generation"]) == []


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 400)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_disk_that_fills_loses_and_repeats_no_line(steps: list[tuple[int, int]]) -> None:
    """The disk is full at any byte, again and again: at the end every line is there, once and in order."""
    with folder() as at, pytest.MonkeyPatch.context() as patch:
        patch.setattr("lcl_mcore.json_lines.RETRY_SECONDS", 0.0)
        said: list[str] = []
        path = at / "metrics.jsonl"
        path.write_bytes(b'{"step": ')  # cut by a crash
        writer = LineWriter(path, said.append)
        for i, (size, room) in enumerate(steps):
            with largest_file(room):
                writer.write({"step": i, "text": "x" * size})
        writer.write({"step": len(steps)})
        writer.close()
        found = read_records(path, lambda record: True)
        assert ([r["step"] for r in found.records], found.damaged) == (list(range(len(steps) + 1)), 1)
        assert sum("cannot be written" in line for line in said) == sum("can be written again" in line for line in said)


def make_directory(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_dangling_link(path: Path) -> None:
    path.symlink_to("/proc/nowhere/file")


@pytest.mark.parametrize("odd", [make_directory, make_pipe, make_dangling_link])
def test_odd_things_in_a_files_place(odd: Any, tmp_path: Path) -> None:
    """Said once; the lines wait, up to a limit, and are written when the place is free."""
    path, said = tmp_path / "metrics.jsonl", list[str]()
    odd(path)
    assert read_records(path, lambda record: True) == ([], 0)
    writer = LineWriter(path, said.append)
    for step in range(3):
        writer.write({"step": step}, durable=True)
    assert len(said) == 1
    assert said[0].startswith(f"WARNING {path} cannot be written (")
    assert said[0].endswith("): training goes on, its lines wait in memory")
    writer.close()
    assert said[1:] == [f"WARNING {path}: its last 3 lines could not be written"]
    path.rmdir() if path.is_dir() else path.unlink()
    writer.close()
    assert said[2:] == [f"{path} can be written again"]
    assert [r["step"] for r in read_records(path, lambda record: True).records] == [0, 1, 2]


def test_what_waits_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcl_mcore.json_lines.MAX_WAITING", 100)
    path, said = tmp_path / "metrics.jsonl", list[str]()
    path.mkdir()
    writer = LineWriter(path, said.append)
    for step in range(20):
        writer.write({"step": step})
    path.rmdir()
    writer.close()
    assert [r["step"] for r in read_records(path, lambda record: True).records] == list(range(8))
    assert said[-1] == f"{path} can be written again; 12 lines were lost"


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcl_mcore.metrics.RETRY_SECONDS", 0.0)
    place, said = tmp_path / "tensorboard", list[str]()
    place.write_text("")
    board = TensorBoard(place, 1, said.append)
    for step in (1, 2):
        board.write({"step": step, "loss": 1.0})
    assert said == [
        f"WARNING {place} cannot be written ([Errno 17] File exists: '{place}'): training goes on without TensorBoard"
    ]
    place.unlink()
    board.write({"step": 3, "loss": 1.0})
    board.close()
    assert said[1:] == [f"{place} can be written again"]
    assert len(list(place.iterdir())) == 1
