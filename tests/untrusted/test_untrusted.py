"""Files and texts that others wrote: what is refused, in which words, and how soon."""

from __future__ import annotations

import contextlib
import os
import tracemalloc
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_mcore.untrusted import MAX_YAML_BYTES, BadYamlError, open_regular, parse_yaml, read_regular

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {p: 1, q: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 50)}]}}\n" for before, name in zip("abcd", "bcde", strict=True)
)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "pipe", tmp_path / "link")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    (tmp_path / "text").write_bytes(b"abc")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    for name, reason in {
        "pipe": "not a regular file",
        "link": "not a regular file",
        ".": "not a regular file",
        "loop": "Too many levels of symbolic links",
        "nothing": "No such file or directory",
        "a\0b": "embedded null byte",
        "huge": "1099511627776 bytes, at most 3 are read",
    }.items():
        with pytest.raises(OSError, match=r".") as caught:
            read_regular(tmp_path / name, 3)
        assert caught.value.strerror == reason, name
    assert read_regular(tmp_path / "text", 3) == b"abc"
    with pytest.raises(OSError, match="3 bytes, at most 2 are read"):
        read_regular(tmp_path / "text", 2)
    with open_regular(tmp_path / "new", os.O_RDWR | os.O_CREAT) as file:
        file.write(b"x")
    assert (tmp_path / "new").read_bytes() == b"x"


def test_a_file_that_grows_without_a_size_is_bounded_too() -> None:
    """Files of /proc say 0 bytes and hold some."""
    with pytest.raises(OSError, match="at most 4 are read"):
        read_regular("/proc/self/status", 4)
    assert read_regular("/proc/self/comm", 100)


REFUSED: dict[str | bytes, tuple[int | None, str]] = {
    "a: 1\nb: {c: 1,\n  c: 2}": (3, "has the key 'c' twice in one mapping"),
    BOMB: (5, "has more than 100000 values with its aliases written out"),
    MERGED: (4, "has more than 100000 values with its aliases written out"),
    "a: &a\n  - *a": (1, "has an alias that contains itself"),
    "[" * 100 + "]" * 100: (1, "is nested more than 32 deep"),
    "{a: " * 60_000: (None, "is nested too deeply"),
    "a:\n  ? [1, 2]\n  : 3": (2, "has a key that is not a plain value"),
    "a: !!bool x": (None, "is not YAML ('x')"),
    "a: 4999-99-99": (None, "is not YAML (month must be in 1..12)"),
    "a: !!python/object/apply:os.system [ls]": (1, "is not YAML"),
    "a: [": (1, "is not YAML"),
    "a: 1\n---\nb: 1": (2, "is not YAML"),
    "a: 1:" + "59:" * 20_000 + "1": (1, "has a number of 60003 characters"),
    b"\xff": (None, "is not YAML ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
    "a" * (MAX_YAML_BYTES + 1): (None, "has 262145 bytes, at most 262144 are read"),
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: ascii(text[:20]))
def test_yaml_refusals_in_bounded_memory(text: str | bytes) -> None:
    tracemalloc.start()
    with pytest.raises(BadYamlError) as caught:
        parse_yaml(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (caught.value.line, str(caught.value)) == REFUSED[text]
    assert peak < 64 << 20


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
TREES = st.recursive(
    PLAIN, lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=5), below, max_size=2)
)


@settings(max_examples=20, deadline=None)
@given(TREES)
def test_yaml_that_is_written_is_read(tree: object) -> None:
    assert parse_yaml(yaml.safe_dump(tree)) == tree


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="a1:-?[]{}&*!|>'\"# \n\t,.<=%@", max_size=60) | st.binary(max_size=60))
def test_any_text_is_a_value_or_refused(text: str | bytes) -> None:
    with contextlib.suppress(BadYamlError):
        parse_yaml(text)
