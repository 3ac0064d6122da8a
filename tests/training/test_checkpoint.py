"""Checkpoints: damage is seen, the previous one is used, and nothing in one can run code."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import torchrun
from lcl_mcore.checkpoint.consolidate import consolidate, consolidated_weights
from lcl_mcore.checkpoint.dcp import METADATA
from lcl_mcore.checkpoint.hashing import hash_of
from lcl_mcore.checkpoint.store import MANIFEST, complete_checkpoints, manifest_bytes, parse_manifest, verify
from lcl_mcore.checkpoint.weights_file import (
    consolidated_state,
    load_consolidated,
    read_consolidated,
    without_vocabulary_padding,
    write_consolidated,
)
from lcl_mcore.config.run_folder import read_config
from lcl_mcore.errors import CheckpointError
from lcl_mcore.interop.init_from import start_from
from training_runs import assert_same_run, records

pytestmark = pytest.mark.slow
Arguments = Callable[..., list[str]]
Tool = Callable[..., Any]
LAYER_SCALE = "model.vision.layer_scale=0.5"


@pytest.fixture(scope="module")
def finished(arguments: Arguments, run_tool: Tool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with checkpoints at steps 6 and 8."""
    out = tmp_path_factory.mktemp("checkpoints") / "run"
    done = run_tool(*arguments(out, LAYER_SCALE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in complete_checkpoints(out / "checkpoints")] == ["step-00000006", "step-00000008"]
    return out


def test_every_damaged_file_is_noticed(finished: Path, tmp_path: Path) -> None:
    """One flipped bit in each file, each file cut short, each file gone."""
    original = complete_checkpoints(finished / "checkpoints")[-1]
    assert verify(original) == []
    files = [p.relative_to(original) for p in original.rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert len(files) >= 3
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    for name in files:
        content = (original / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damaged, word in ((bytes(flipped), "changed"), (content[: len(content) // 3], "bytes"), (None, "missing")):
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
    done = run_tool(*arguments(out, "--resume", LAYER_SCALE))
    assert done.returncode == 0, done.stderr
    assert f"{newest}: damaged, skipped: {shard.name}: content changed" in done.stdout
    assert "6 steps done" in done.stdout
    assert verify(newest) == []  # written again
    assert_same_run(finished, out)


def give_old_names(checkpoint: Path) -> list[str]:
    """Rewrite a checkpoint under the names of before the layer scale was called gamma; returns these names."""
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())

    def old(name: str) -> str:
        return name.replace("_bda.gamma", "_bda.gain")

    tensors, places = metadata.state_dict_metadata, metadata.storage_data
    metadata.state_dict_metadata = {old(name): tensor for name, tensor in tensors.items()}
    metadata.storage_data = {replace(index, fqn=old(index.fqn)): place for index, place in places.items()}
    vouch_for(checkpoint, METADATA, pickle.dumps(metadata))
    return sorted(set(metadata.state_dict_metadata) - set(tensors))


def vouch_for(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, and its entry in the manifest."""
    (checkpoint / name).write_bytes(content)
    manifest = parse_manifest((checkpoint / MANIFEST).read_bytes())
    manifest.files[name] = {"bytes": len(content), "hash": hash_of([content])}
    (checkpoint / MANIFEST).write_bytes(manifest_bytes(manifest))


def test_a_checkpoint_with_old_parameter_names_continues_bitwise(
    finished: Path, arguments: Arguments, run_tool: Tool, tmp_path: Path
) -> None:
    """Weights and both moments of the layer scale are found under their old names; new checkpoints have the new."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    oldest, newest = complete_checkpoints(out / "checkpoints")
    shutil.rmtree(newest)
    assert give_old_names(oldest) == [
        f"{kind}/vision.blocks.layers.{layer}.{branch}_bda.gain"
        for kind in ("exp_avg", "exp_avg_sq", "weights")
        for layer in (0, 1)
        for branch in ("mlp", "self_attn")
    ]
    done = run_tool(*arguments(out, "--resume", LAYER_SCALE))
    assert done.returncode == 0, done.stderr
    assert f"resume: {oldest}, 6 steps done" in done.stdout
    assert_same_run(finished, out)
    written = (newest / METADATA).read_bytes()
    assert b"_bda.gamma" in written
    assert b"_bda.gain" not in written


def test_weights_with_old_parameter_names_are_found(finished: Path, build: Callable[..., Any], tmp_path: Path) -> None:
    """For evaluation, for consolidation, and in a weights file that was consolidated before the change."""
    original = complete_checkpoints(finished / "checkpoints")[-1]
    copy = tmp_path / original.name
    shutil.copytree(original, copy)
    assert len(give_old_names(copy)) == 12
    wanted = consolidated_weights(original)
    found = read_consolidated(consolidate(str(copy), tmp_path / "weights"))
    vocabulary = read_config(original / "config.yaml").model.language.vocab_size
    assert_equal(found, without_vocabulary_padding(wanted, vocabulary))

    shape = read_config(original / "config.yaml").model
    model, other = build(shape, seed=1), build(shape, seed=2)
    load_consolidated(model, without_vocabulary_padding(consolidated_weights(copy), vocabulary), 0, 1)
    assert_equal(consolidated_state(model), found)
    old = {name.replace("_bda.gamma", "_bda.gain"): tensor for name, tensor in found.items()}
    assert old.keys() != found.keys()
    start_from(other, write_consolidated(old, shape, tmp_path / "old"), 0, 1)
    assert_equal(consolidated_state(other), found)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_tensor_under_both_names_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(complete_checkpoints(finished / "checkpoints")[-1], copy)
    tensors = pickle.loads((copy / METADATA).read_bytes())
    name = "weights/vision.blocks.layers.0.mlp_bda.gamma"
    tensors.state_dict_metadata[name.replace("gamma", "gain")] = tensors.state_dict_metadata[name]
    vouch_for(copy, METADATA, pickle.dumps(tensors))
    with pytest.raises(CheckpointError, match="it holds a tensor under an old and under its present name"):
        consolidated_weights(copy)


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
    oldest, newest = complete_checkpoints(out / "checkpoints")
    shutil.rmtree(oldest)  # else the run would continue from it
    forged = pickle.dumps(_Payload(str(proof)))
    vouch_for(newest, METADATA, forged)
    done = run_tool(*arguments(out, "--resume", LAYER_SCALE))
    assert not proof.exists()
    assert done.returncode == 2
    assert f"error: {newest}: cannot be loaded, and no other checkpoint can be used: " in done.stderr
    assert "refers to posix.mkdir" in done.stderr


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_a_full_disk_keeps_earlier_checkpoints(undisturbed: Path, arguments: Arguments, tmp_path: Path) -> None:
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
