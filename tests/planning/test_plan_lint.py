"""The deadlock check finds what would hang, and nothing else; links and goodput by their formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest

from lcl_mcore.commands.plan import parse_options
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.errors import ConfigError
from lcl_mcore.hardware import find_gpu
from lcl_mcore.models.flops import parameter_counts
from lcl_mcore.planning.cluster import make_cluster
from lcl_mcore.planning.counter import CollectiveCall
from lcl_mcore.planning.lint import RankOrder, lint
from lcl_mcore.planning.predict import checkpoint_bytes, reliability
from lcl_mcore.planning.request import Assumptions

ORDER = RankOrder(tp=2, pp=2, dp=2)  # ranks: stage 0 is 0..3, stage 1 is 4..7; tensor-parallel neighbours
TENSOR = {0: (0, 1), 1: (0, 1), 4: (4, 5), 5: (4, 5)}
PIPE = {0: (0, 4), 1: (1, 5), 4: (0, 4), 5: (1, 5)}
DATA = {0: (0, 2), 1: (1, 3), 4: (4, 6), 5: (5, 7)}


def call(op: str, group: str, ranks: tuple[int, ...], size: int = 8, *where: int) -> CollectiveCall:
    return CollectiveCall("forward", op, group, ranks, size, where)


def log(rank: int) -> list[CollectiveCall]:
    """One micro-batch forward and back, and the gradients' reduction."""
    reduce = call("allreduce_", "TP", TENSOR[rank])
    there, back = ("send", "recv_") if rank < 4 else ("recv_", "send")
    peer = 1 if rank < 4 else 0
    sent, got = (call(op, "PP", PIPE[rank], 64, peer, 0) for op in (there, back))
    body = [reduce, sent, got, reduce] if rank < 4 else [sent, reduce, reduce, got]
    return [*body, call("_reduce_scatter_base_", "DP", DATA[rank], 128)]


def logs() -> dict[int, list[CollectiveCall]]:
    return {rank: log(rank) for rank in (0, 1, 4, 5)}


def test_a_sound_layout_has_no_problem() -> None:
    assert lint(logs(), ORDER) == []


def test_a_missing_collective_is_named_with_its_group_and_ranks() -> None:
    broken = logs()
    del broken[1][3]
    (problem,) = lint(broken, ORDER)
    assert "group TP [0, 1]: call 1 is allreduce_ of 8 bytes" in problem
    assert problem.endswith("missing on 1")


def test_a_different_size_is_found() -> None:
    broken = logs()
    broken[5][1] = broken[5][1]._replace(bytes=16)
    (problem,) = lint(broken, ORDER)
    assert "[4, 5]: call 0 is allreduce_ of 8 bytes" in problem
    assert "allreduce_ of 16 bytes" in problem


def test_a_circle_of_waiting_ranks_is_found() -> None:
    """Every group's own sequence is right; the stages receive before either sends."""
    broken = logs()
    for rank in (0, 1):
        broken[rank][1], broken[rank][2] = broken[rank][2], broken[rank][1]
    problems = lint(broken, ORDER)
    assert len(problems) == 4
    assert "rank 0 waits for ever in call 1 of 5: recv_ of 64 bytes" in problems[0]


def test_crossed_collectives_of_two_groups_are_found() -> None:
    """0 waits for 1, 1 for 5, 5 for 4, 4 for 0; turning one of them round resolves it."""
    tensor = {rank: call("allreduce_", "TP", TENSOR[rank]) for rank in TENSOR}
    ends = {rank: call("allreduce_", "PP", PIPE[rank]) for rank in PIPE}
    crossed = {0: [tensor[0], ends[0]], 1: [ends[1], tensor[1]], 4: [ends[4], tensor[4]], 5: [tensor[5], ends[5]]}
    problems = lint(crossed, ORDER)
    assert [p.split(" for ever")[0] for p in problems] == [f"rank {rank} waits" for rank in (0, 1, 4, 5)]
    assert lint(crossed | {4: [tensor[4], ends[4]]}, ORDER) == []


def test_messages_that_nobody_receives_and_wrong_sizes_are_found() -> None:
    broken = logs()
    broken[0].append(call("send", "PP", (0, 4), 64, 1, 0))
    assert lint(broken, ORDER) == ["1 messages of rank 0 to 4 are never received"]
    broken = logs()
    broken[4][0] = broken[4][0]._replace(bytes=32)
    assert lint(broken, ORDER) == ["rank 4 waits for 32 bytes and is sent 64, call 0"]


def test_every_place_needs_a_log() -> None:
    broken = logs()
    del broken[5]
    assert lint(broken, ORDER) == ["rank 5 has no log: every tensor and pipeline index needs one"]


def test_links() -> None:
    cluster = make_cluster(find_gpu("h100"), Assumptions(), node_gbs=400, network_gbs=50)
    inside, across = tuple(range(8)), tuple(range(0, 64, 8))
    assert cluster.bus(inside) == (4e11, 5e-6)
    assert cluster.bus(across) == (5e10, 15e-6)
    assert cluster.bus(tuple(range(64))) == (4e11, 15e-6)  # eight adapters a node
    gather = cluster.transfer(call("_allgather_base_", "DP", across, 10**9))
    assert gather == pytest.approx(7 / 8 * 1e9 / 5e10 + 3 * 15e-6)
    assert cluster.transfer(call("allreduce_", "DP", across, 10**9)) == pytest.approx(2 * gather)
    assert cluster.transfer(call("allreduce_", "DP", (3,), 10**9)) == 0


def test_an_unknown_gpu_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Did you mean h100"):
        find_gpu("h10")


def test_fp8_is_refused() -> None:
    with pytest.raises(ConfigError, match="Plan with --precision bf16"):
        parse_options(["--gpus", "8", "--recipe", "paper-l14", "--set", "train.precision=fp8"])


def test_reliability() -> None:
    """10 minutes between saves of 2 s, 5 minutes to restart, a failure in 15 hours: 98.6 %."""
    config = load_recipe("paper-l14")
    assert checkpoint_bytes(config) == sum(parameter_counts(config.model).values()) * 14
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=100))
    rate = checkpoint_bytes(config) / 2
    expected = reliability(config, 512, 6.0, storage=rate, restart=300, mtbf=54_000)
    assert expected.ettr == pytest.approx(1 - 2 / 600 - 600 / 54_000)
    assert expected.ettr == pytest.approx(0.9856, abs=1e-4)
    assert expected.best_interval == pytest.approx(math.sqrt(2 * 2 * 54_000))
    assert expected.best_ettr > expected.ettr
    default = reliability(config, 512, 6.0, storage=rate, restart=300)
    assert default.mtbf / 3600 == pytest.approx(99.0, abs=0.1)
