"""What a training step costs may not grow unnoticed: FLOPs, communication and operators against committed numbers.

`counters.json` holds them; `python tests/planning/counters_worker.py --write` sets them, on purpose.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from launch import run_script

HERE = Path(__file__).resolve().parent
SLACK = 1.02
"""Operators may grow by so much: some bookkeeping of a torch release, not another pass over a tensor."""
EXACT = ("FLOPs", "collectives", "bytes communicated")
Counts = dict[str, Any]


def changes(committed: Counts, found: Counts) -> list[str]:
    """A line for every number that is not the committed one; operators only where they grew, and for known versions."""
    lines = []
    for place in sorted(committed["counts"].keys() | found["counts"].keys()):
        for kind in EXACT:
            old, new = (side["counts"].get(place, {}).get(kind, {}) for side in (committed, found))
            lines += [
                f"{place}: {kind}, {name}: {new.get(name, 0):,}, committed {old.get(name, 0):,}"
                for name in sorted(old.keys() | new.keys())
                if new.get(name, 0) != old.get(name, 0)
            ]
    for versions, places in found["operators"].items():
        for place, old in committed["operators"].get(versions, {}).items():
            new = places.get(place, {})
            if sum(new.values()) > SLACK * sum(old.values()):
                grown = {
                    phase: f"{new[phase]}, committed {old.get(phase, 0)}"
                    for phase in new
                    if new[phase] > old.get(phase, 0)
                }
                lines.append(f"{place}: operators with {versions}: {grown}")
    return lines


@pytest.fixture(scope="module")
def committed() -> Counts:
    return dict(json.loads((HERE / "counters.json").read_text(encoding="utf-8")))


@pytest.mark.timeout(420)
def test_a_step_costs_what_was_committed(committed: Counts) -> None:
    done = run_script("tests/planning/counters_worker.py", timeout=400)
    assert done.returncode == 0, done.stderr
    found: Counts = json.loads(done.stdout.splitlines()[-1])
    assert len(found["counts"]) == 4
    for counts in found["counts"].values():
        assert sum(counts["FLOPs"].values()) > 10**9
        assert sum(counts["bytes communicated"].values()) > 10**6
    problems = changes(committed, found)
    assert not problems, (
        "a training step costs something else than before (docs/contributing.md, Counters):\n" + "\n".join(problems)
    )


def test_what_recompute_and_splitting_cost(committed: Counts) -> None:
    """The committed numbers themselves: their relations are those of the layouts."""
    plain, again, first, last = (
        committed["counts"][place]
        for place in ("dp 2; rank 0", "dp 2, recompute; rank 0", "tp 2, pp 2, dp 2; rank 0", "tp 2, pp 2, dp 2; rank 4")
    )
    assert again["FLOPs"]["backward: matmul"] > 1.2 * plain["FLOPs"]["backward: matmul"]
    for name in ("feature pass: matmul", "forward: matmul", "loss: matmul"):
        assert again["FLOPs"][name] == plain["FLOPs"][name]
    assert again["bytes communicated"] == plain["bytes communicated"]
    # Attention splits over tensor-parallel ranks and stages; backward takes five matmuls to forward's two.
    both = first["FLOPs"]["forward: attention"] + last["FLOPs"]["forward: attention"]
    assert 2 * both == pytest.approx(plain["FLOPs"]["forward: attention"], rel=0.01)
    for counts in (plain, first, last):
        assert 2 * counts["FLOPs"]["backward: attention"] == 5 * counts["FLOPs"]["forward: attention"]
    sent, received = (f"pipeline: {op}" for op in ("send", "recv_"))
    assert first["bytes communicated"][sent] == last["bytes communicated"][received]
    assert last["bytes communicated"][sent] == first["bytes communicated"][received]


def test_growth_is_named(committed: Counts) -> None:
    place = "tp 2, pp 2, dp 2; rank 0"
    (versions,) = committed["operators"]
    found = copy.deepcopy(committed)
    assert changes(committed, found) == []
    found["counts"][place]["FLOPs"]["forward: matmul"] += 2
    found["counts"][place]["collectives"]["tensor: allreduce_"] += 1
    found["counts"][place]["bytes communicated"]["WORLD: allreduce_"] = 8
    before = found["operators"][versions][place]["forward"]
    found["operators"][versions][place]["forward"] += sum(found["operators"][versions][place].values()) // 40
    lines = changes(committed, found)
    assert [line.removeprefix(f"{place}: ").split(":")[0] for line in lines] == [
        "FLOPs, forward",
        "collectives, tensor",
        "bytes communicated, WORLD",
        f"operators with {versions}",
    ]
    assert lines[2].endswith("8, committed 0")
    assert f"committed {before}" in lines[3]
    # Within the slack, or with versions that have no numbers, operators are not compared.
    found = copy.deepcopy(committed)
    found["operators"][versions][place]["forward"] = before + 1
    assert changes(committed, found) == []
    found["operators"] = {"torch 9, megatron-core 9": {place: {"forward": 10**6}}}
    assert changes(committed, found) == []
