"""Meshes {1, dp4, tp2 x dp2, tp4} over gloo: parameter gradients under DDP against one fp64 process."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from lcl_kernels import DistributedInfoNCE, infonce_reference
from lcl_kernels.schedule import CommunicationRates, PairShards, choose_schedule, pair_weights

from launch import Job

WORLD = 4
WORKER = "tests/kernels/mesh_worker.py"


def contrastive(dp: int, tp: int, counts: list[int], schedule: str, **options: Any) -> dict[str, Any]:
    case = {
        "kind": "contrastive",
        "dp": dp,
        "tp": tp,
        "counts": counts,
        "schedule": schedule,
        "weighting": "image",
        "groups": False,
        "scale": 14.3,
    }
    return case | options


def cross_entropy(dp: int, tp: int, **options: Any) -> dict[str, Any]:
    return {"kind": "cross_entropy", "dp": dp, "tp": tp} | options


CASES = [
    case
    for schedule in ("reduce_scatter", "gather_both")
    for case in (
        contrastive(4, 1, [5, 5, 5, 5], schedule),
        contrastive(4, 1, [5, 9, 0, 3], schedule),
        contrastive(4, 1, [5, 9, 0, 3], schedule, weighting="rank", groups=True),
        contrastive(4, 1, [1, 0, 0, 0], schedule),
        contrastive(4, 1, [0, 0, 0, 0], schedule, groups=True),
        contrastive(4, 1, [7, 2, 1, 8], schedule, scale=100.0, groups=True),
        contrastive(2, 2, [7, 10], schedule, scale=100.0, groups=True),
        contrastive(2, 2, [1, 13], schedule, weighting="rank"),
        contrastive(2, 2, [0, 6], schedule, weighting="rank", groups=True),
        contrastive(2, 2, [6, 5], schedule, precision="fp16"),
        contrastive(1, 4, [13], schedule, groups=True),
        contrastive(1, 4, [2], schedule),
        contrastive(1, 4, [0], schedule),
    )
] + [
    contrastive(4, 1, [5, 9, 0, 3], "auto"),
    # 37 words in shards of 12: the last shard is padding but for one word; of 20: the last is padding only.
    cross_entropy(1, 4, rows=23, shard=12, vocab=37, chunk=8),
    cross_entropy(1, 4, rows=23, shard=20, vocab=37, chunk=64),
    cross_entropy(2, 2, rows=30, shard=25, vocab=50, chunk=7),
]


def label(case: dict[str, Any]) -> str:
    return "-".join(str(v) for k, v in case.items() if k != "kind").replace(" ", "")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Results per case per rank, from one launch of four processes."""
    folder = tmp_path_factory.mktemp("mesh")
    (folder / "cases.json").write_text(json.dumps(CASES))
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(Job(None, WORKER, str(rank), str(WORLD), str(folder), GLOO_SOCKET_IFNAME="lo"))
            for rank in range(WORLD)
        ]
        for rank, job in enumerate(ranks):
            assert job.wait(150) == 0, f"rank {rank} failed:\n{job.stdout}{job.stderr[-4000:]}"
    per_rank = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(WORLD)]
    return [list(results) for results in zip(*per_rank, strict=True)]


@pytest.mark.distributed
@pytest.mark.timeout(200)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[label(c) for c in CASES])
def test_mesh_matches_one_process(measured: list[list[dict[str, Any]]], index: int) -> None:
    case, ranks = CASES[index], measured[index]
    half = case.get("precision") == "fp16"
    for rank, result in enumerate(ranks):
        assert result["loss"] == pytest.approx(result["truth"], rel=1e-3 if half else 2e-6, abs=1e-6)
        assert result["loss"] == ranks[0]["loss"], "every rank must return the same number"
        for name, error in result["errors"].items():
            assert error < (5e-3 if half else 1e-5), f"rank {rank}: {name}"
        if case["kind"] == "contrastive":
            rows = case["counts"][rank // case["tp"]]
            assert result["finite"]
            assert result["repeat"]
            assert result["row_gradients"] == [[rows, 24], [rows, 24]]
        else:
            assert result["padding"] == 0.0


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_mesh_cases_cover_a_nonzero_loss(measured: list[list[dict[str, Any]]]) -> None:
    """The comparison above means something only where there is something to compare."""
    losses = [r[0]["truth"] for r in measured]
    assert sum(loss > 0.01 for loss in losses) >= len(losses) - 6


def test_one_process_needs_no_group() -> None:
    torch.manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(9, 8), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(20.0, requires_grad=True)
    for schedule in ("reduce_scatter", "gather_both"):
        loss = DistributedInfoNCE(None, schedule=schedule, reduce_size=3.0)(x, y, scale, [9])
        gradients = torch.autograd.grad(loss, (x, y, scale))
        truth = infonce_reference(x.double(), y.double(), scale.double())
        expected = torch.autograd.grad(3.0 * truth, (x, y, scale))
        assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
        for ours, theirs in zip(gradients, expected, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 3e-6


@pytest.mark.parametrize("tp", [1, 2, 3, 8])
def test_layout_covers_every_pair_once(tp: int) -> None:
    counts, like = (5, 0, 1, 12), torch.zeros(0)
    seen = []
    for t in range(tp):
        layout = PairShards(counts, rank=3, tp_size=tp, tp_rank=t)
        ids = layout.column_ids(like)
        assert ids.shape == (layout.columns,)
        assert ids[layout.own_columns].tolist() == layout.row_ids(like)[layout.own_rows].tolist()
        index = layout.padded_index(like)
        padded = torch.full((len(counts) * layout.capacity,), -1)
        padded[index if index is not None else slice(None)] = ids.long()
        for r, length in enumerate(layout.lengths):
            assert (padded[r * layout.capacity + length : (r + 1) * layout.capacity] == -1).all()
        seen += ids.tolist()
    assert sorted(seen) == list(range(sum(counts)))


def test_cost_rule_prefers_what_the_arithmetic_says() -> None:
    # 8 ranks on NVLink with 8192 pairs each are bound by compute; 512 ranks with 128 pairs by the scatter.
    nvlink = CommunicationRates(bandwidth=3e11)
    assert choose_schedule([8192] * 8, 768, rates=nvlink) == "reduce_scatter"
    assert choose_schedule([128] * 512, 768) == "gather_both"
    assert choose_schedule([64], 768) == "reduce_scatter"
    assert choose_schedule([0, 0], 768) in ("reduce_scatter", "gather_both")


def test_pair_weights() -> None:
    assert pair_weights([2, 6], "image") == [0.125, 0.125]
    assert pair_weights([2, 0, 6], "rank") == [0.25, 0.0, 1 / 12]
    assert pair_weights([0, 0], "rank") == [0.0, 0.0]


def test_wrong_use_is_refused() -> None:
    loss = DistributedInfoNCE(None)
    with pytest.raises(ValueError, match="one per data-parallel rank"):
        loss.begin([3, 4], 8)
    with pytest.raises(ValueError, match="counts and dim"):
        loss.begin([3], 8).start_text(torch.zeros(4, 8))
    with pytest.raises(RuntimeError, match="start_image"):
        loss.begin([3], 8).finish(1.0)
    with pytest.raises(ValueError, match="schedule='ring'"):
        DistributedInfoNCE(None, schedule="ring")
    with pytest.raises(ValueError, match="must not be negative"):
        loss.begin([-1], 8)
