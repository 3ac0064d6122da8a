"""The parts of checkpointing that need no process: boxes, names, retention, manifest, the safe reader."""

from __future__ import annotations

import math
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from lcl_mcore.checkpoint.dcp import METADATA, SafeReader
from lcl_mcore.checkpoint.shards import Shard, Snapshot, boxes
from lcl_mcore.checkpoint.store import manifest_bytes, outdated, parse_manifest, step_of
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


def test_retention_keeps_the_newest_and_every_kth() -> None:
    names = [f"step-{step:08d}" for step in (100, 150, 200, 250, 300)]
    assert outdated(names, 2, 0) == names[:3]
    assert outdated(names, 2, 100) == ["step-00000150"]
    assert outdated(names, 9, 0) == []
    assert (step_of("step-00000150"), step_of("step-00000150.partial"), step_of("x")) == (150, None, None)


def test_every_bit_of_a_manifest_counts() -> None:
    entries = {
        "__0_0.distcp": {"bytes": 17, "sha256": "ab" * 32},
        ".metadata": {"bytes": 3, "sha256": "0" * 64},
    }
    data = manifest_bytes(entries)
    assert parse_manifest(data) == entries
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(ValueError, match=r"unreadable|changed|version|outside"):
                parse_manifest(bytes(changed))
    with pytest.raises(ValueError, match="outside"):
        parse_manifest(manifest_bytes({"../x": {"bytes": 1, "sha256": ""}}))


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
