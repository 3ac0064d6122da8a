"""500 inputs of the fuzzer in `campaigns/fuzz.py`, and what it calls a find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "campaigns")]

from fuzz import attempt, finds, read, report, run  # noqa: E402
from fuzz_readers import KINDS, Kind  # noqa: E402

from lcl_mcore.errors import DataError  # noqa: E402

SEED = 2026


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_500_inputs_without_a_find() -> None:
    outcomes = run(510, SEED, workers=2)
    found = [f"{find.number} {find.kind}, {find.change}: {find.result} {find.detail}" for find in finds(outcomes)]
    assert found == []
    kinds = report(outcomes, SEED)["kinds"]
    assert all(kind["inputs"] == 30 and kind["most_mib"] < 100 and kind["most_seconds"] < 10 for kind in kinds.values())


def test_what_is_a_find(tmp_path: Path) -> None:
    def reading(action: object) -> str:
        kind = Kind("made up", "x", ("*",), lambda folder: exec_(action))
        return read(0, kind, "nothing", tmp_path).result

    def exec_(action: object) -> None:
        assert callable(action)
        action()

    def refuse(text: str) -> None:
        raise DataError(text)

    assert reading(lambda: None) == "accepted"
    assert reading(lambda: refuse("x: y. z")) == "refused"
    assert reading(lambda: refuse("x" * 4000)) == "a message without end"
    assert reading(lambda: {}["a"]) == "traceback: KeyError"
    assert reading(lambda: bytes(3 << 30)) == "traceback: MemoryError"
    assert reading(lambda: os.kill(os.getpid(), 11)) == "ended by SIGSEGV"
    assert reading(lambda: subprocess.run(["true"], check=False)) == "code was executed"


def test_an_input_can_be_seen_again(tmp_path: Path) -> None:
    """The number and the seed say everything about it."""
    folder = tmp_path / "examples" / KINDS[2].folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("recipe: demo\ntrain: {seed: 1}\n")
    found = []
    for _ in range(2):
        outcome = attempt(19, SEED, tmp_path / "examples", tmp_path / "work")
        path = tmp_path / "work" / "config.yaml"
        found.append((outcome.change, outcome.result, path.lstat().st_size))
    assert found[0] == found[1]
