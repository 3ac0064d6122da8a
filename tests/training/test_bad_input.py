"""Mistakes about folders and data get one clear message and a non-zero exit; of settings: tests/config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Arguments = Callable[..., list[str]]
Tool = Callable[..., Any]


def test_a_run_folder_is_not_overwritten(tmp_path: Path, run_tool: Tool, arguments: Arguments) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    done = run_tool(*arguments(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: already holds")
    assert "--resume" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_missing_and_damaged_data(tmp_path: Path, corpus: Path, run_tool: Tool, arguments: Arguments) -> None:
    """Missing data set, missing shard, cut shard, undecodable image: named, no traceback, nothing written."""
    first = sorted((corpus / "pairs").glob("*.tar"))[0]
    content = first.read_bytes()
    damaged = {"gone": None, "cut": content[:2000], "spoiled": content.replace(b"JFIF", b"HTML")}
    expected = {
        "nowhere": (str(tmp_path / "nowhere"),),
        "gone": (f"{first.name}: is missing",),
        "cut": (first.name,),
        "spoiled": ("doc-0000", "image in succession that cannot be used"),
    }
    cases = []
    for name in expected:
        folder = tmp_path / name
        if name != "nowhere":
            shutil.copytree(corpus / "pairs", folder)
            (folder / first.name).unlink()
            if (left := damaged[name]) is not None:
                (folder / first.name).write_bytes(left)
        cases.append(arguments(tmp_path / "out", "--data", str(folder), "data.max_consecutive_failures=1"))
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases))
    done = run_tool("tests/training/tool_worker.py", str(file), timeout=180)
    assert done.returncode == 0, done.stderr
    for result, (name, words) in zip(json.loads(done.stdout.splitlines()[-1]), expected.items(), strict=True):
        assert result["code"] == 2, (name, result)
        for word in words:
            assert word in result["stderr"], (name, result)
        assert "Traceback" not in result["stderr"], name
    assert not (tmp_path / "out" / "checkpoints").exists()
