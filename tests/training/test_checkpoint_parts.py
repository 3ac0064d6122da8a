"""The parts of checkpointing that need no process: boxes, names, retention, manifest, the safe reader."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from lcl_mcore.checkpoint.dcp import METADATA, SafeReader
from lcl_mcore.checkpoint.shards import Shard, Snapshot, boxes
from lcl_mcore.checkpoint.store import (
    Manifest,
    TrainState,
    checkpoint_name,
    manifest_bytes,
    outdated,
    parse_manifest,
    read_state,
    step_of,
    verify,
)
from lcl_mcore.errors import CheckpointError
from lcl_mcore.storage import atomic_file, atomic_write


def test_boxes_are_the_range_in_order_and_few() -> None:
    draw = random.Random(3)
    for _ in range(400):
        shape = tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 4)))
        size = math.prod(shape)
        start = draw.randint(0, size)
        stop = draw.randint(start, size)
        whole = torch.arange(size).view(shape)
        found = list(boxes(shape, start, stop))
        parts = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))] for box in found]
        flat = torch.cat([part.flatten() for part in parts]) if parts else torch.empty(0, dtype=torch.long)
        assert flat.tolist() == list(range(start, stop)), (shape, start, stop)
        assert len(found) <= 2 * len(shape) - 1


def test_a_snapshot_is_a_copy_of_what_this_rank_writes() -> None:
    block = torch.arange(12.0).view(3, 4)  # columns 4 to 7 of a 3 x 8 matrix, elements 2 to 8 of the block
    shard = Shard("weights/x", (3, 8), (3, 4), (0, 4), 2, block.view(-1)[2:9].clone(), True)
    foreign = Shard("weights/y", (2,), (2,), (0,), 0, torch.ones(2), False)
    snapshot = Snapshot([shard, foreign])
    snapshot.take()
    shard.flat.zero_()
    whole = torch.full((3, 8), -1.0)
    for box in snapshot.boxes():
        assert box.key == "weights/x"
        place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.tensor.shape, strict=True))
        whole[place] = box.tensor
    expected = torch.full((3, 8), -1.0)
    expected[0, 6:8], expected[1, 4:8], expected[2, 4] = block[0, 2:], block[1], block[2, 0]
    assert torch.equal(whole, expected)
    assert snapshot.nbytes == 7 * 4


def test_retention_keeps_the_newest_good_ones_and_every_kth() -> None:
    names = [f"step-{step:08d}" for step in (100, 150, 200, 250, 300)]
    everything = set(names)
    assert outdated(names, everything, 2, 0) == names[:3]
    assert outdated(names, everything, 2, 100) == ["step-00000150"]
    assert outdated(names, everything, 9, 0) == []
    assert outdated(names, {names[1]}, 2, 0) == []  # what was not verified does not count
    assert outdated(names, {names[1], names[2]}, 2, 0) == names[:1]  # and is not removed while it is newer
    assert outdated(names, set(), 1, 0) == []


def test_names_of_checkpoints() -> None:
    names = ("step-00000150", "step-100000000", "step-150", "step-000000150", "step-0000015²", "x")
    assert [step_of(name) for name in names] == [150, 100_000_000, None, None, None, None]
    assert [step_of(f"{before}step-00000150{after}") for before, after in (("damaged-", ""), ("", ".partial"))] == [
        None,
        None,
    ]
    assert all(step_of(checkpoint_name(step)) == step for step in (0, 99_999_999, 100_000_000))


def test_every_bit_of_a_manifest_counts() -> None:
    entries = {"__0_0.distcp": {"bytes": 17, "hash": "ab" * 32}, ".metadata": {"bytes": 3, "hash": "0" * 64}}
    manifest = Manifest("0123456789abcdef", 60, "digest", entries)
    data = manifest_bytes(manifest)
    assert parse_manifest(data) == manifest
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(ValueError, match=r"unreadable|changed|version|outside"):
                parse_manifest(bytes(changed))
    with pytest.raises(ValueError, match="outside"):
        parse_manifest(manifest_bytes(replace(manifest, files={"../x": {"bytes": 1, "hash": "0" * 64}})))


def state_file(folder: Path, **changes: Any) -> Path:
    """`state.json` of step 60 in a folder of that name."""
    folder.mkdir(exist_ok=True)
    fields = {"step": 60, "position": {"step": 60, "mean": 0.1}, "order_hash": "h", "config_digest": "d"}
    (folder / "state.json").write_text(json.dumps(fields | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"step": -5}, "unreadable (step = -5: Input should be greater than or equal to 0)"),
        ({"step": math.nan}, "unreadable (step = nan: Input should be a valid integer)"),
        ({"step": "60"}, "unreadable (step = '60': Input should be a valid integer)"),
        ({"step": 10**30}, f"unreadable (step = {10**30}: Input should be less than 1000000000000)"),
        ({"step": 60.0}, "unreadable (step = 60.0: Input should be a valid integer)"),
        ({"position": [1]}, "unreadable (position = [1]: Input should be an object)"),
        ({"hook": 1}, "unreadable (hook = 1: Unexpected keyword argument)"),
        ({"step": 50}, "belongs to step 50, the folder's name to step 60"),
    ],
)
def test_a_state_is_exactly_what_a_run_writes(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    folder = state_file(tmp_path / "step-00000060", **changes)
    with pytest.raises(CheckpointError) as refused:
        read_state(folder)
    path = folder / "state.json"
    assert str(refused.value) == f"{path}: cannot be used: {problem}. Use another checkpoint."


def test_states_and_manifests_have_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = state_file(tmp_path / "step-00000060")
    assert read_state(good) == TrainState(60, {"step": 60, "mean": 0.1}, "h", "d")
    for content in ("[" * 100_000, '{"step": ' + "9" * 5000 + "}"):
        (good / "state.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"state\.json: cannot be used: unreadable \(content = "):
            read_state(good)
    monkeypatch.setattr("lcl_mcore.checkpoint.store.MAX_JSON_BYTES", 100)
    folder = state_file(tmp_path / "step-00000070", step=70, order_hash="h" * 100)
    (folder / "manifest.json").write_bytes(manifest_bytes(Manifest("0" * 16, 70, "", {})))
    with pytest.raises(CheckpointError, match="larger than 100 bytes"):
        read_state(folder)
    assert verify(folder) == ["manifest.json: larger than 100 bytes"]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"bytes": -1, "hash": "0" * 64}, "files.a.bytes = -1: Input should be greater than or equal to 0"),
        ({"bytes": "1", "hash": "0" * 64}, "files.a.bytes = '1': Input should be a valid integer"),
        ({"bytes": 1, "hash": "x"}, "files.a.hash = 'x': String should match pattern '^[0-9a-f]{64}$'"),
        ({"bytes": 1}, "files.a.hash = {'bytes': 1}: Field required"),
    ],
)
def test_a_manifest_is_exactly_what_a_run_writes(entry: Any, problem: str) -> None:
    with pytest.raises(ValueError, match="unreadable") as refused:
        parse_manifest(manifest_bytes(Manifest("0" * 16, 60, "", {"a": entry})))
    assert str(refused.value) == f"unreadable ({problem})"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    atomic_write(path, "old\n")
    with pytest.raises(UnicodeEncodeError), atomic_file(path) as partial:
        partial.write_text("new" * 9000 + "\udc00", encoding="utf-8")
    assert path.read_bytes() == b"old\n"
    atomic_write(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


class _Payload:
    """Unpickling this would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def test_forged_metadata_is_refused(tmp_path: Path) -> None:
    """Code in place of metadata, code inside metadata, byte objects (which torch unpickles), foreign paths."""
    proof = tmp_path / "proof"
    inside = Metadata({}, storage_data={})
    inside.planner_data = _Payload(proof)
    byte_object = Metadata({"optimizer": BytesStorageMetadata()}, storage_data={})
    place = {MetadataIndex("weights/a"): _StorageInfo("../../elsewhere", 0, 1)}
    for forged, word in (
        (_Payload(proof), "posix.mkdir"),
        (inside, "posix.mkdir"),
        (byte_object, "BytesStorageMetadata"),
        (Metadata({}, storage_data=place), "outside the checkpoint"),
        ({}, "does not describe a checkpoint"),
    ):
        (tmp_path / METADATA).write_bytes(pickle.dumps(forged))
        with pytest.raises(CheckpointError, match=word):
            SafeReader(tmp_path).read_metadata()
        assert not proof.exists()
    (tmp_path / METADATA).write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="cannot be used"):
        SafeReader(tmp_path).read_metadata()
