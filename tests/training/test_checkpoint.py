"""Checkpoints: damage is seen, the previous one is used, and nothing in one can run code."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import torchrun
from lcl_mcore.checkpoint.dcp import METADATA
from lcl_mcore.checkpoint.store import (
    MANIFEST,
    complete_checkpoints,
    manifest_bytes,
    parse_manifest,
    verify,
)
from runs import assert_same_run, records

pytestmark = pytest.mark.slow
Arguments = Callable[..., list[str]]
Tool = Callable[..., Any]


@pytest.fixture(scope="module")
def finished(arguments: Arguments, run_tool: Tool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with checkpoints at steps 6 and 8."""
    out = tmp_path_factory.mktemp("checkpoints") / "run"
    done = run_tool(*arguments(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in complete_checkpoints(out / "checkpoints")] == ["step-00000006", "step-00000008"]
    return out


def test_every_damaged_file_is_noticed(finished: Path, tmp_path: Path) -> None:
    """One flipped bit in each file, each file cut short, each file gone."""
    original = complete_checkpoints(finished / "checkpoints")[-1]
    assert verify(original) == []
    files = [
        p.relative_to(original) for p in original.rglob("*") if p.is_file() and p.name != "manifest.json"
    ]
    assert len(files) >= 3
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    for name in files:
        content = (original / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damaged, word in (
            (bytes(flipped), "changed"),
            (content[: len(content) // 3], "bytes"),
            (None, "missing"),
        ):
            if damaged is None:
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(damaged)
            problems = verify(copy)
            assert len(problems) == 1, name
            assert word in problems[0], name
            assert str(name) in problems[0]
            (copy / name).write_bytes(content)
    assert verify(copy) == []
    (copy / "manifest.json").write_text("{")
    assert "manifest.json" in verify(copy)[0]


def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(
    finished: Path, arguments: Arguments, run_tool: Tool, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    newest = complete_checkpoints(out / "checkpoints")[-1]
    shard = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    done = run_tool(*arguments(out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"{newest}: damaged, skipped: {shard.name}: content changed" in done.stdout
    assert "6 steps done" in done.stdout
    assert verify(newest) == []  # written again
    assert_same_run(finished, out)


class _Payload:
    """Unpickling this would make a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_malicious_checkpoint_does_not_run(
    finished: Path, arguments: Arguments, run_tool: Tool, tmp_path: Path
) -> None:
    """Metadata that would run code, with a manifest that vouches for it, is refused with a message."""
    out, proof = tmp_path / "run", tmp_path / "proof"
    shutil.copytree(finished, out)
    newest = complete_checkpoints(out / "checkpoints")[-1]
    forged = pickle.dumps(_Payload(str(proof)))
    (newest / METADATA).write_bytes(forged)
    entries = parse_manifest((newest / MANIFEST).read_bytes())
    entries[METADATA] = {"bytes": len(forged), "sha256": hashlib.sha256(forged).hexdigest()}
    (newest / MANIFEST).write_bytes(manifest_bytes(entries))
    done = run_tool(*arguments(out, "--resume"))
    assert not proof.exists()
    assert done.returncode == 2
    assert "refers to posix.mkdir" in done.stderr


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_a_full_disk_keeps_earlier_checkpoints(
    undisturbed: Path, arguments: Arguments, tmp_path: Path
) -> None:
    """The file-size limit makes every write of a shard fail, as a full disk does: twice in a row end the run."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    kept = complete_checkpoints(out / "checkpoints")
    limited = torchrun(
        2, "tests/training/limited_worker.py", *arguments(out, "--steps", "24", "--resume")[1:], check=False
    )
    assert limited.returncode != 0
    text = limited.stdout + limited.stderr
    assert f"resume: {kept[-1]}, 20 steps done" in text
    assert "WARNING checkpoint" in text
    assert "error: checkpoint" in text
    assert "could not be written" in text
    assert "earlier checkpoints are intact" in text
    assert len(records(out)) == 24
    assert complete_checkpoints(out / "checkpoints") == kept
    assert verify(kept[-1]) == []
    assert not list((out / "checkpoints").glob("*.partial"))
