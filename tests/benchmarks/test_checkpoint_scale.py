"""What grows with the number of ranks in a checkpoint's last act and in its verification: counted, not timed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_scale import KINDS, all_files, metadata_of, model_shapes

from lcl_mcore.checkpoint.dcp import METADATA, SafeReader
from lcl_mcore.checkpoint.store import FileEntry, manifest_bytes, parse_manifest, verify

PARAMETERS = 8_000_000_000


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often files were flushed, opened and looked up from now on."""
    found: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found[name] += 1
            return original(*arguments, **options)

        return call

    for name in ("fsync", "open", "stat"):
        monkeypatch.setattr(os, name, counting(name, getattr(os, name)))
    return found


def test_rank_0_commits_512_ranks_as_it_commits_8(counts: Counter[str], tmp_path: Path) -> None:
    """The ranks flush their own files; the commit flushes the manifest, two folders, and once the run's id."""
    done = {}
    for ranks in (8, 512):
        store, name, manifest, _ = all_files(PARAMETERS, ranks, tmp_path / str(ranks))
        assert len(manifest.files) == ranks + 5
        counts.clear()
        store.commit(name, manifest)
        done[ranks] = dict(counts)
        assert counts["fsync"] == 4
        data = manifest_bytes(manifest)
        assert parse_manifest(data) == manifest
        assert len(data) < 500 + 140 * len(manifest.files)
    assert done[8] == done[512]


def test_each_rank_looks_at_its_share_alone(counts: Counter[str], tmp_path: Path) -> None:
    """Every file has a byte less than the manifest says, so that each share names those it looked at."""
    store, name, manifest, _ = all_files(PARAMETERS, 512, tmp_path)
    longer = {file: FileEntry(bytes=entry["bytes"] + 1, hash=entry["hash"]) for file, entry in manifest.files.items()}
    store.commit(name, replace(manifest, files=longer))
    looked_at: Counter[str] = Counter()
    verify(tmp_path / name)  # whatever is imported at the first use
    for rank in range(0, 512, 8):
        counts.clear()
        problems = verify(tmp_path / name, rank, 512)
        looked_at.update(problem.split(":")[0] for problem in problems)
        share = sorted(longer)[rank::512]
        assert counts == {"open": 1, "stat": 1 + len(share)}  # the manifest, and its share
    assert looked_at == Counter(file for rank in range(0, 512, 8) for file in sorted(longer)[rank::512])


def test_metadata_of_many_ranks_is_small(tmp_path: Path) -> None:
    """A rank's range adds a few boxes to those of whole tensors; all ranks read them all."""
    ranks = 512
    metadata, sizes = metadata_of(PARAMETERS, ranks)
    assert len(sizes) == ranks
    assert len(metadata.storage_data) < len(KINDS) * (len(model_shapes(PARAMETERS)) + 4 * ranks)
    assert abs(sum(sizes.values()) / 12 / 8_063_328_256 - 1) < 1e-3
    store, name, manifest, _ = all_files(PARAMETERS, ranks, tmp_path)
    assert manifest.files[METADATA]["bytes"] < 2_000_000
    found = SafeReader(store.staging(name)).read_metadata()
    assert found.state_dict_metadata == metadata.state_dict_metadata
