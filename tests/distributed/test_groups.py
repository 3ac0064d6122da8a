"""Process groups of large jobs: few, the right members, and made by all ranks alike."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launch import run_script, run_worker

Layouts = dict[str, dict[str, dict[str, Any]]]
MOST_CREATIONS = 11


@pytest.fixture(scope="module")
def layouts() -> Layouts:
    done = run_script("tests/distributed/groups_worker.py", timeout=100)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.timeout(120)
def test_each_rank_creates_few_groups_and_all_ranks_the_same_ones(layouts: Layouts) -> None:
    """Every rank takes part in every creation: else a split of NCCL's communicator would wait for ever."""
    for layout, ranks in layouts.items():
        names = {rank: [made["name"] for made in found["created"]] for rank, found in ranks.items()}
        first = names["0"]
        assert all(other == first for other in names.values()), layout
        assert len(first) <= MOST_CREATIONS, (layout, first)
        assert len(set(first)) == len(first), (layout, first)
    assert [made["name"] for made in layouts["1 1 1"]["0"]["created"]] == ["host-alone"]
    assert [made["name"] for made in layouts["1 1 512"]["0"]["created"]] == [
        "alone",
        "host-alone",
        "contrastive-loss",
        "host-counts",
        "host-control",
        "host-checkpoint",
    ]


@pytest.mark.timeout(120)
def test_groups_of_one_creation_divide_all_ranks(layouts: Layouts) -> None:
    """Disjoint, together complete, and told apart by the colour that torch gives them in a split."""
    for layout in ("4 4 16", "2 4 16"):
        for number, made in enumerate(layouts[layout]["0"]["created"]):
            lists = [tuple(found["created"][number]["ranks"]) for found in layouts[layout].values()]
            assert all(int(rank) in own for rank, own in zip(layouts[layout], lists, strict=True)), made
            assert sorted(rank for own in set(lists) for rank in own) == list(range(16)), (layout, made)
    for layout, ranks in layouts.items():
        for number in range(len(ranks["0"]["created"])):
            one = {
                tuple(made["ranks"]): made["color"] for made in (found["created"][number] for found in ranks.values())
            }
            assert len(set(one.values())) == len(one), layout


@pytest.mark.timeout(120)
def test_members_are_those_of_the_layout(layouts: Layouts) -> None:
    """Tensor-parallel ranks are neighbours, then data-parallel, then pipeline stages."""
    members = layouts["2 4 16"]["7"]["members"]  # 2 x 2 x 4; the second stage's last rank
    everyone = list(range(16))
    expected = {
        "tp": [6, 7],
        "dp": [5, 7],
        "pp": [3, 7, 11, 15],
        "loss": [5, 7],
        "host_counts": [5, 7],
        "host_model": [2, 3, 6, 7, 10, 11, 14, 15],
        "host_control": everyone,
        "host_checkpoint": everyone,
        "vision.tp": [7],
        "megatron.tp": [6, 7],
        "megatron.dp_cp": [5, 7],
        "megatron.mp": [2, 3, 6, 7, 10, 11, 14, 15],
        "megatron.intra_dist_opt": everyone,
        "megatron.cp": [7],
    }
    assert {role: members[role] for role in expected} == expected
    assert "pipeline_ends" not in members
    assert layouts["2 4 16"]["3"]["members"]["pipeline_ends"] == [3, 15]
    assert layouts["2 4 16"]["15"]["members"]["megatron.embd"] == [3, 15]
    alone = layouts["1 1 1"]["0"]["members"]
    assert set(map(tuple, alone.values())) == {(0,)}


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_groups_on_the_host_connect_only_the_ranks_that_talk() -> None:
    """gloo would connect every pair of ranks in every group when it is made: 1,500 sockets a process at 512 ranks."""
    [before, made, used] = run_worker("sockets_worker", 8, timeout=110)
    mesh = 7
    assert made - before < mesh, "groups that nobody has used yet"
    assert used - before < 3 * mesh, "three groups of eight ranks after a collective each"
