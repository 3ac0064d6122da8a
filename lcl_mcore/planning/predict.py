"""Seconds per step, what limits them, and whether the tensors fit, from counted steps and a described machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lcl_mcore.batch import StepBatch
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.models.flops import step_flops
from lcl_mcore.planning.counter import Event
from lcl_mcore.planning.counting import RankCount
from lcl_mcore.planning.hardware import Machine

REPEATED = ("first pass", "forward", "backward")
"""Phases whose work grows with the number of micro-batches."""


@dataclass(frozen=True)
class StageTime:
    """Seconds of one rank in one step.

    device, by_kind   arithmetic and memory traffic;  host  launching the operators;  phases  device by phase
    exposed           communication that nothing hides, by what it is for;  hidden  the rest
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
    """The step of the whole job: that of its slowest stage, and the pipeline's fill and drain."""

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
            "matrix products": stage.by_kind.get("product", 0.0),
            "attention": stage.by_kind.get("attention", 0.0),
            "memory traffic of all other operators": stage.by_kind.get("other", 0.0),
            "host launching operators": max(stage.host - stage.device, 0.0),
            "pipeline fill and drain": self.bubble,
            **{f"exposed communication: {name}": value for name, value in stage.exposed.items()},
        }
        return dict(sorted(((k, v) for k, v in parts.items() if v > 0), key=lambda item: -item[1]))


def purpose(event: Event) -> str:
    """What a collective is for."""
    if event.group == "contrastive-loss" or event.group == "pipeline-ends":
        return "contrastive loss"
    if event.op.startswith(("send", "recv")):
        return "pipeline"
    if event.phase == "optimizer":
        return "copies of the ViT" if "TENSOR" in event.group else "gradient norm"
    if "DATA_PARALLEL" in event.group:
        return "parameters" if "gather" in event.op else "gradients"
    if "EMBEDDING" in event.group:
        return "tied embedding"
    return "tensor parallel"


def stage_time(count: RankCount, machine: Machine, micro_batches: int, repeat: float) -> StageTime:
    """Seconds of one rank.

    Args:
        micro_batches: of the whole step;  repeat: how many times as many they are as were counted.
    """
    kinds: dict[str, float] = defaultdict(float)
    phases: dict[str, float] = defaultdict(float)
    calls = 0.0
    for work, number in count.work.items():
        # The loss compares all pairs of the global batch.
        times = number * (repeat if work.phase in REPEATED else repeat**2 if work.phase == "loss" else 1.0)
        calls += times
        kinds[work.kind] += machine.seconds(work) * times
        phases[work.phase] += machine.seconds(work) * times
    exposed: dict[str, float] = defaultdict(float)
    hidden: dict[str, float] = defaultdict(float)
    early: dict[str, list[float]] = {"gradients": [], "parameters": []}
    for event in count.events:
        name, seconds = purpose(event), machine.transfer(event)
        if name in early and event.phase in REPEATED:
            early[name].append(seconds)
        else:
            often = repeat if event.phase in REPEATED or name in ("pipeline", "tensor parallel") else 1.0
            exposed[name] += seconds * often
    windows = {"gradients": ("backward",), "parameters": ("first pass", "forward")}
    for name, transfers in early.items():
        if not transfers:
            continue
        # One micro-batch hides all but the bucket that has nothing left to hide behind.
        window = sum(phases[phase] for phase in windows[name]) / micro_batches
        if name == "parameters" and phases["first pass"]:
            window = phases["first pass"] / micro_batches
        alone = transfers[-1] if name == "gradients" else transfers[0]
        left = max(0.0, sum(transfers) - alone - window)
        exposed[name] += alone + left
        hidden[name] += sum(transfers) - alone - left
    return StageTime(
        rank=count.rank,
        device=sum(kinds.values()),
        host=calls * machine.assumed.launch,
        by_kind=dict(kinds),
        phases=dict(phases),
        exposed={k: v for k, v in exposed.items() if v > 0},
        hidden=dict(hidden),
    )


def predict(
    config: RunConfig,
    world: int,
    counts: Sequence[RankCount],
    batch: StepBatch,
    machine: Machine,
    repeat: float = 1.0,
) -> Prediction:
    """The step of a job from one count for each tensor and pipeline index (or for some of them).

    Args:
        batch: what was counted, one data-parallel rank's step with `repeat` times fewer micro-batches.
    """
    micro = round(len(batch.micro_batches) * repeat)
    stages = tuple(stage_time(count, machine, micro, repeat) for count in counts)
    slowest = max(stages, key=lambda s: s.busy + sum(s.exposed.values()))
    own = slowest.busy / slowest.device if slowest.device else 1.0
    repeated = sum(slowest.phases.get(phase, 0.0) for phase in REPEATED)
    bubble = (config.parallel.pipeline_parallel_size - 1) * own * repeated / micro
    seconds = slowest.busy + sum(slowest.exposed.values()) + bubble
    flops = global_flops(config, batch, repeat)
    rate = machine.gpu.matmul(config.train.precision)
    assert rate is not None
    memory = max(count.peak + round(count.peak_parts["input"] * (repeat - 1)) for count in counts)
    return Prediction(
        seconds=seconds,
        bubble=bubble,
        slowest=slowest,
        stages=stages,
        memory=memory,
        fits=memory <= machine.gpu.memory * machine.assumed.headroom,
        model_flops=flops,
        mfu=flops / (seconds * world * rate),
    )


def global_flops(config: RunConfig, batch: StepBatch, repeat: float = 1.0) -> int:
    """Model FLOPs of the whole global batch (`models.count`)."""

    def total(values: tuple[int, ...]) -> int:
        return round(sum(values) * repeat)

    counts = batch.counts
    contexts = total(counts.contexts)
    logits = contexts * contexts
    if config.loss.negatives == "micro_batch":
        logits = round(sum(sum(ranks) ** 2 for ranks in counts.micro_contexts) * repeat)
    return step_flops(
        config.model,
        images=total(counts.images),
        tokens=total(counts.tokens),
        pairs=total(counts.pairs),
        contexts=contexts,
        targets=total(counts.targets),
        logits=logits,
        passages=round(len(batch.micro_batches) * repeat) * len(counts.images),
    )
