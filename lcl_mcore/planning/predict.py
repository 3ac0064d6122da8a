"""From counted steps: seconds a step, what limits them, whether the tensors fit, and the share of time that trains."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lcl_mcore.batch import StepBatch
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.models.flops import batch_flops, parameter_counts
from lcl_mcore.planning.cluster import Cluster
from lcl_mcore.planning.counter import CollectiveCall
from lcl_mcore.planning.simulate import RankCount

REPEATED = ("feature pass", "forward", "backward")
"""Phases whose work grows with the number of micro-batches."""
# 419 unexpected interruptions of 16,384 H100 in 54 days (Llama 3, arXiv:2407.21783, section 3.3.4 and Table 5).
GPU_HOURS_PER_FAILURE = 16_384 * 54 * 24 / 419


@dataclass(frozen=True)
class StageTime:
    """Seconds of one rank in one step.

    Attributes:
        rank: whose.
        device: arithmetic and memory traffic; by kind of operator in `by_kind`, by phase in `phases`.
        host: launching the operators.
        exposed: communication that nothing hides, by what it is for.
        hidden: the rest of the communication.
    """

    rank: int
    device: float
    host: float
    by_kind: dict[str, float]
    phases: dict[str, float]
    exposed: dict[str, float]
    hidden: dict[str, float]

    @property
    def busy(self) -> float:
        """The host runs ahead of the device, so the slower of the two counts."""
        return max(self.device, self.host)


@dataclass(frozen=True)
class Prediction:
    """The step of the whole job: that of its slowest stage, and the pipeline's fill and drain.

    Attributes:
        seconds: of a step.
        bubble: of them, the pipeline's fill and drain.
        slowest: the rank that decides, one of `stages`.
        memory: most bytes of tensors on any rank.
        fits: whether that leaves the assumed headroom.
        model_flops: of the global batch.
        mfu: model FLOPs utilisation.
    """

    seconds: float
    bubble: float
    slowest: StageTime
    stages: tuple[StageTime, ...]
    memory: int
    fits: bool
    model_flops: int
    mfu: float

    @property
    def shares(self) -> dict[str, float]:
        """Seconds of the step by cause, largest first."""
        stage = self.slowest
        parts = {
            "matmuls": stage.by_kind.get("matmul", 0.0),
            "attention": stage.by_kind.get("attention", 0.0),
            "memory traffic of all other operators": stage.by_kind.get("other", 0.0),
            "host launching operators": max(stage.host - stage.device, 0.0),
            "pipeline fill and drain": self.bubble,
            **{f"exposed communication: {name}": value for name, value in stage.exposed.items()},
        }
        return dict(sorted(((k, v) for k, v in parts.items() if v > 0), key=lambda item: -item[1]))


def purpose(call: CollectiveCall) -> str:
    """What a collective is for."""
    reduces = call.op.startswith("allreduce")
    if call.group == "tensor":
        return "copies of the ViT" if call.phase == "optimizer" else "tensor parallel"
    if call.group == "pipeline":
        return "pipeline"
    if call.group == "pipeline-ends" and reduces:
        return "tied embedding"
    if call.group in ("contrastive-loss", "pipeline-ends"):
        return "contrastive loss"
    if reduces and call.phase == "optimizer":
        return "gradient norm"
    return "parameters" if "gather" in call.op else "gradients"


def stage_time(count: RankCount, cluster: Cluster, micro_batches: int, repeat: float) -> StageTime:
    """Seconds of one rank.

    Args:
        count: what it does in a step of fewer micro-batches.
        cluster: where.
        micro_batches: of the whole step.
        repeat: how many times as many they are as were counted.
    """
    kinds: dict[str, float] = defaultdict(float)
    phases: dict[str, float] = defaultdict(float)
    calls = 0.0
    for call, number in count.operators.items():
        # The loss compares all pairs of the global batch.
        times = number * (repeat if call.phase in REPEATED else repeat**2 if call.phase == "loss" else 1.0)
        calls += times
        kinds[call.kind] += cluster.seconds(call) * times
        phases[call.phase] += cluster.seconds(call) * times
    exposed: dict[str, float] = defaultdict(float)
    hidden: dict[str, float] = defaultdict(float)
    early: dict[str, list[float]] = {"gradients": [], "parameters": []}
    for issued in count.collectives:
        name, seconds = purpose(issued), cluster.transfer(issued)
        if name in early and issued.phase in REPEATED:
            early[name].append(seconds)
        else:
            often = repeat if issued.phase in REPEATED or name in ("pipeline", "tensor parallel") else 1.0
            exposed[name] += seconds * often
    first_forward = "feature pass" if phases["feature pass"] else "forward"
    windows = {"gradients": "backward", "parameters": first_forward}
    for name, transfers in early.items():
        if not transfers:
            continue
        # One micro-batch hides all but the bucket that has nothing left to hide behind.
        window = phases[windows[name]] / micro_batches
        alone = transfers[-1] if name == "gradients" else transfers[0]
        left = max(0.0, sum(transfers) - alone - window)
        exposed[name] += alone + left
        hidden[name] += sum(transfers) - alone - left
    return StageTime(
        rank=count.rank,
        device=sum(kinds.values()),
        host=calls * cluster.assumed.launch,
        by_kind=dict(kinds),
        phases=dict(phases),
        exposed={k: v for k, v in exposed.items() if v > 0},
        hidden=dict(hidden),
    )


def expected_memory(counts: Sequence[RankCount], repeat: float = 1.0) -> int:
    """Bytes of tensors at most on the fullest rank; `repeat` as in `predict`."""
    return max(count.peak + round(count.peak_parts["input"] * (repeat - 1)) for count in counts)


def predict(
    config: RunConfig, world: int, counts: Sequence[RankCount], batch: StepBatch, cluster: Cluster, repeat: float = 1.0
) -> Prediction:
    """The step of a job.

    Args:
        config: of the job.
        world: its processes.
        counts: one for each tensor and pipeline index, or for some of them.
        batch: what was counted, one data-parallel rank's step with `repeat` times fewer micro-batches.
        cluster: where it runs.
        repeat: see `batch`.
    """
    micro = round(len(batch.micro_batches) * repeat)
    stages = tuple(stage_time(count, cluster, micro, repeat) for count in counts)
    slowest = max(stages, key=lambda s: s.busy + sum(s.exposed.values()))
    own = slowest.busy / slowest.device if slowest.device else 1.0
    repeated = sum(slowest.phases.get(phase, 0.0) for phase in REPEATED)
    bubble = (config.parallel.pipeline_parallel_size - 1) * own * repeated / micro
    seconds = slowest.busy + sum(slowest.exposed.values()) + bubble
    flops = batch_flops(config, batch, repeat)
    rate = cluster.gpu.matmul(config.train.precision)
    assert rate is not None
    memory = expected_memory(counts, repeat)
    return Prediction(
        seconds=seconds,
        bubble=bubble,
        slowest=slowest,
        stages=stages,
        memory=memory,
        fits=memory <= cluster.room,
        model_flops=flops,
        mfu=flops / (seconds * world * rate),
    )


@dataclass(frozen=True)
class ReliabilityEstimate:
    """What checkpoints and failures cost; times in seconds.

    Attributes:
        checkpoint_bytes: of the whole job.
        stall: of one save.
        interval: between saves.
        best_interval: the one that wastes least (Young 1974: sqrt(2 * stall * MTBF)).
        mtbf: mean time between failures of the whole job.
        restart: from a failure to training again.
        ettr: effective training time ratio at `interval`, that is, goodput; `best_ettr` at the other.
    """

    checkpoint_bytes: int
    stall: float
    interval: float
    best_interval: float
    mtbf: float
    restart: float
    ettr: float
    best_ettr: float


def checkpoint_bytes(config: RunConfig) -> int:
    """Weights in the run's precision, and master weights with two moments in fp32; each parameter once."""
    weight = 4 if config.train.precision == "fp32" else 2
    return sum(parameter_counts(config.model).values()) * (weight + 12)


def reliability(
    config: RunConfig, world: int, step_seconds: float, *, storage: float, restart: float, mtbf: float | None = None
) -> ReliabilityEstimate:
    """Seconds that saves and failures take, and the share of time that trains.

    Args:
        config: of the job.
        world: its processes.
        step_seconds: of a step.
        storage: bytes/s at which the whole job writes a checkpoint.
        restart: seconds from a failure to training again.
        mtbf: seconds; None: as many failures per GPU hour as Llama 3's pre-training had.
    """
    size = checkpoint_bytes(config)
    stall = size / storage
    between = mtbf if mtbf is not None else GPU_HOURS_PER_FAILURE / world * 3600
    every = config.checkpoint.every or config.train.steps
    interval, best = every * step_seconds, math.sqrt(2 * stall * between)

    def ettr(seconds: float) -> float:
        return max(0.0, 1 - stall / seconds - (seconds / 2 + restart) / between)

    return ReliabilityEstimate(size, stall, interval, best, between, restart, ettr(interval), ettr(best))
