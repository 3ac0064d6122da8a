"""Loaders on real gloo processes: same sequences for every layout, after SIGKILL, and errors on all ranks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from corpora import SIDE, make_dataset
from launch import Job

WORKER = "tests/data/loader_worker.py"
STEPS = 12
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(290)]


def start(out: Path, world: int, options: dict[str, Any]) -> list[Job]:
    """One process per rank, none of which is ended because another one failed."""
    out.mkdir(exist_ok=True)
    attempt = len(list(out.glob("rendezvous-*")))
    meeting = out / f"rendezvous-{attempt}"
    meeting.touch()
    environment = {"MEETING": str(meeting), "ATTEMPT": str(attempt), "WORLD_SIZE": str(world)}
    return [
        Job(None, WORKER, str(out), json.dumps(options), RANK=str(rank), GLOO_SOCKET_IFNAME="lo", **environment)
        for rank in range(world)
    ]


def finish(ranks: list[Job], limit: float = 200) -> list[int]:
    """Wait for all; kill what hangs."""
    deadline = time.monotonic() + limit
    with contextlib.ExitStack() as stack:
        for rank in ranks:
            stack.enter_context(rank)
        return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in ranks]


def steps_of(out: Path, model: int = 0) -> dict[int, tuple[str, list[str], list[str]]]:
    """Per step: the order hash, the sequences of the whole global batch and its documents.

    Of a step that was read again after a kill, the last attempt counts: ranks may have been ahead of the
    saved position, and another number of ranks divides the batch differently.
    """
    seen: dict[tuple[int, int], Any] = {}
    last: dict[int, int] = {}
    for path in sorted(out.glob("rank*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            step = entry["step"]
            if entry["model"] != model or entry["attempt"] < last.get(step, 0):
                continue
            if entry["attempt"] > last.get(step, 0):
                seen = {key: other for key, other in seen.items() if key[0] != step}
            last[step] = entry["attempt"]
            seen[step, entry["dp"]] = entry
    result: dict[int, tuple[str, list[str], list[str]]] = {}
    for (step, _), entry in sorted(seen.items()):
        text, sequences, documents = result.get(step, (entry["hash"], [], []))
        assert text == entry["hash"]
        result[step] = (text, sequences + entry["sequences"], documents + entry["documents"])
    return result


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("sets")
    kinds = ["pair", "matched", "sequence"]  # the last one in windows, the others whole: two packings in each stream
    folders = [make_dataset(base / kind, kind, 50, seed=i) for i, kind in enumerate(kinds)]
    config = {"packing": "by_kind"}
    return {"folders": [str(folder) for folder in folders], "steps": STEPS, "model": 1, "config": config}


@pytest.fixture(scope="module")
def reference(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    out = tmp_path_factory.mktemp("reference")
    assert finish(start(out, 1, options)) == [0]
    result = steps_of(out)
    assert sorted(result) == list(range(STEPS))
    assert len(set(result[3][1])) == 8
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("world", "model"), [(4, 1), (2, 2), (4, 2)])
def test_same_batches_for_every_layout(
    options: dict[str, Any], reference: dict[int, Any], tmp_path: Path, world: int, model: int
) -> None:
    more = {**options, "model": model, "micro_batch_size": 1}
    assert finish(start(tmp_path / "run", world, more)) == [0] * world
    for model_rank in range(model):
        assert steps_of(tmp_path / "run", model_rank) == reference


@pytest.mark.slow
def test_killed_at_random_points_and_resumed_at_other_sizes(
    options: dict[str, Any], reference: dict[int, Any], tmp_path: Path
) -> None:
    """SIGKILL, then resume on 4, 1, then 2 ranks from whatever position was saved last."""
    out = tmp_path / "run"
    rng = random.Random(os.environ.get("LCL_TEST_SEED", "7"))
    kills = 0
    for world in (2, 4, 1):
        processes = start(out, world, {**options, "pause": 0.25})
        saved = out / "position.json"
        target = (json.loads(saved.read_text())["step"] if saved.exists() else 0) + rng.randint(1, 3)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and all(p.poll() is None for p in processes):
            if saved.exists() and json.loads(saved.read_text())["step"] >= target:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        for process in processes:
            kills += process.poll() is None
            with process:
                process.end(signal.SIGKILL, 10.0)
    assert kills >= 5
    assert finish(start(out, 2, options)) == [0, 0]
    assert steps_of(out) == reference


@pytest.mark.slow
def test_an_error_on_one_rank_stops_all_with_its_reason(options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "set", "pair", 40, per_shard=10)
    shard = folder / "shard-002.tar"
    content = bytearray(shard.read_bytes())
    content[512:600] = b"x" * 88  # the first document's JSON
    shard.write_bytes(content)
    out = tmp_path / "run"
    assert finish(start(out, 4, {**options, "folders": [str(folder)], "model": 2})) == [3] * 4
    messages = [(out / f"error{rank}.txt").read_text() for rank in range(4)]
    assert any("shard-002.tar, document doc-000020: is damaged" in message for message in messages)
    assert all("shard-002.tar, document doc-000020: is damaged" in message for message in messages)


def test_any_exception_on_one_rank_stops_the_others_with_its_cause(options: dict[str, Any], tmp_path: Path) -> None:
    """Not only errors that the reader plans for: nobody waits for a rank that has broken down."""
    out = tmp_path / "run"
    assert finish(start(out, 2, {**options, "break_rank": 1})) == [3, 4]
    assert (out / "error0.txt").read_text() == ("reading stopped. data-parallel rank 1: TypeError: no such thing")
    assert (out / "error1.txt").read_text() == "no such thing"


def test_later_pipeline_stages_get_no_pixels(options: dict[str, Any], tmp_path: Path) -> None:
    """Rank 1 of the model group gets no images; everything else is the same."""
    out = tmp_path / "run"
    more = {**options, "model": 2, "pixel_ranks": [0], "steps": 3}
    assert finish(start(out, 2, more)) == [0, 0]
    first, last = (
        [json.loads(line) for line in (out / f"rank{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    )
    assert [(e["step"], e["hash"], e["documents"]) for e in first] == [
        (e["step"], e["hash"], e["documents"]) for e in last
    ]
    assert all(shape[0] > 0 for e in first for shape in e["images"])
    assert all(shape == [0, 3, SIDE, SIDE] for e in last for shape in e["images"])
