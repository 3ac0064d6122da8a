"""The planner against real steps: collectives event for event, memory, FLOPs; and its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import run_script, torchrun
from lcl_mcore.planning.counter import CollectiveCall
from lcl_mcore.planning.lint import RankOrder, lint

Seen = dict[str, dict[int, dict[str, Any]]]
ORDERS = {
    "vision data": RankOrder(2, 2, 2),
    "vision tensor": RankOrder(2, 2, 2),
    "data parallel, recompute": RankOrder(1, 1, 8),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """By layout and rank: one real step on 8 gloo ranks, and the same rank simulated."""
    folder = tmp_path_factory.mktemp("plan")
    torchrun(8, "tests/planning/plan_worker.py", str(folder), timeout=560)
    ranks = {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in range(8)}
    return {name: {rank: ranks[rank][name] for rank in ranks} for name in ORDERS}


def collectives(count: dict[str, Any]) -> list[CollectiveCall]:
    return [
        CollectiveCall(phase, op, group, tuple(ranks), size, tuple(where))
        for phase, op, group, ranks, size, where in count["collectives"]
    ]


real_run = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]


class TestAgainstRealRanks:
    pytestmark = real_run

    def test_every_rank_issues_the_predicted_collectives_in_order(self, seen: Seen) -> None:
        used = set()
        for ranks in seen.values():
            for count in ranks.values():
                assert collectives(count["simulated"]) == collectives(count["real"])
                used |= {call.op for call in collectives(count["real"])}
        assert used >= {
            "send",
            "recv_",
            "broadcast_",
            "allreduce_",
            "_allgather_base_",
            "_reduce_scatter_base_",
            "reduce_scatter_tensor_coalesced_",
            "allgather_into_tensor_coalesced_",
        }
        first = collectives(seen["vision tensor"][0]["real"])
        assert len(first) > 200
        assert any(e.phase == "backward" and e.op == "reduce_scatter_tensor_coalesced_" for e in first)

    def test_memory(self, seen: Seen) -> None:
        """Model state to the byte, the peak and its parts within 5 %.

        A part of the real peak may be 5 % of the whole larger: gloo's threads free buffers in flight when they get to.
        """
        for ranks in seen.values():
            for count in ranks.values():
                real, simulated = count["real"], count["simulated"]
                assert simulated["model_state"] == real["model_state"]
                assert min(real["model_state"].values()) > 500_000
                assert simulated["peak"] == pytest.approx(real["peak"], rel=0.05)
                assert real["peak_parts"]["activations"] > 1_000_000
                for part, size in real["peak_parts"].items():
                    late = simulated["peak_parts"][part] - size
                    assert -0.05 * real["peak"] <= late <= max(0.05 * size, 0.02 * real["peak"]), part

    def test_recompute_saves_activations(self, seen: Seen) -> None:
        """Recomputed towers hold less, though their rank encodes twice as many images and has the LM as well."""
        kept = seen["vision data"][0]["simulated"]["peak_parts"]["activations"]
        recomputed = seen["data parallel, recompute"][0]["simulated"]["peak_parts"]["activations"]
        assert recomputed < 0.9 * kept

    def test_arithmetic(self, seen: Seen) -> None:
        for ranks in seen.values():
            for count in ranks.values():
                for kind in ("matmul", "attention"):
                    mine, theirs = (
                        {k: v for k, v in count[side]["operators"].items() if k.endswith(kind)}
                        for side in ("simulated", "real")
                    )
                    # A CPU keeps the contrastive loss's exponentials, which saves a product of each pair of blocks.
                    loss = [side.pop("loss matmul", [0, 0])[0] for side in (mine, theirs)]
                    assert mine == theirs
                    assert loss[0] in (loss[1], 1.5 * loss[1])
                    assert sum(flops for flops, _ in theirs.values()) > 10**7

    def test_lint_passes_the_real_logs_and_catches_a_broken_one(self, seen: Seen) -> None:
        for name, order in ORDERS.items():
            logs = {rank: collectives(count["real"]) for rank, count in seen[name].items()}
            assert lint(logs, order) == []
        logs = {rank: collectives(count["simulated"]) for rank, count in seen["vision tensor"].items()}
        place = next(i for i, e in enumerate(logs[1]) if e.group == "tensor")
        del logs[1][place]
        assert any("group tensor [0, 1]" in problem for problem in lint(logs, ORDERS["vision tensor"]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_command(tmp_path: Path) -> None:
    """A third of the paper's batch, so that two micro-batches are counted instead of six."""
    out = tmp_path / "plan"
    command = [
        "tools/plan.py",
        "--recipe",
        "paper-l14",
        "--gpus",
        "512",
        "--gpu",
        "h100",
        "--search",
        "none",
        "--global-batch-size",
        "4096",
        "--micro-batch-size",
        "4",
        "--price-per-gpu-hour",
        "2",
        "--mtbf-hours",
        "15",
        "--out",
        str(out),
    ]
    done = run_script(*command, timeout=560)
    assert done.returncode == 0, done.stderr
    plan = json.loads(out.with_suffix(".json").read_text())
    assert {"command", "commit", "date"} <= plan.keys()
    assert plan["layout"]["data_parallel_size"] == 512
    (rank,) = plan["memory"]["ranks"]
    assert rank["parameters"] == 432_041_217
    assert rank["model_state_bytes"]["gradients"] == pytest.approx(4 * rank["parameters"], rel=1e-3)
    assert rank["model_state_bytes"]["weights"] == pytest.approx(2 * rank["parameters"], rel=1e-3)
    # fp32 master and two moments of a 512th, and some numbers that take 512 bytes each
    assert 12 * rank["parameters"] / 512 < rank["model_state_bytes"]["optimizer"] < 14 * rank["parameters"] / 512
    assert plan["memory"]["fits"]
    assert plan["memory"]["peak_bytes"] == rank["peak_bytes"] == sum(rank["peak_by_part"].values())
    # The second pass executes what the model needs; attention's backward forms its scores again.
    executed = plan["flops"]["executed_per_counted_step"][0]
    second = executed["forward"] + executed["backward"] + executed["loss"]
    assert 1.0 < 512 * second / plan["flops"]["model_flops_per_step"] < 1.03
    assert executed["feature pass"] > 0.3 * second
    volume = {
        line["purpose"]: line["bytes"] for line in plan["communication"] if line["op"].startswith("reduce_scatter")
    }
    assert volume["gradients"] == rank["model_state_bytes"]["gradients"]
    assert plan["lint"]["problems"] == []
    assert plan["run"]["cost"] == pytest.approx(2 * plan["run"]["gpu_hours"])
    assert plan["reliability"]["mtbf"] == 15 * 3600
    text = out.with_suffix(".txt").read_text()
    assert "fits: " in text
    assert "bottleneck: " in text
    sections = [part.splitlines() for part in text.partition("assumptions")[0].split("\n\n")[2:] if part.strip()]
    assert len(sections) == 7
    assert all(section[0].endswith("[predicted, not measured]") for section in sections)
    assert all(line.startswith("  ") for section in sections for line in section[1:])
    assert max(map(len, text.partition("\n\n")[2].splitlines())) <= 80
