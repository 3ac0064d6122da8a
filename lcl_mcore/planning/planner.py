"""From a request to a plan, as plain JSON types: the job in its own layout, and other layouts estimated and ranked."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lcl_mcore.batch import StepBatch
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.hardware import find_gpu
from lcl_mcore.planning.cluster import Cluster, make_cluster
from lcl_mcore.planning.lint import RankOrder, lint
from lcl_mcore.planning.micro_batch import LARGEST, largest_micro_batch, with_size
from lcl_mcore.planning.predict import Prediction, predict, purpose, reliability
from lcl_mcore.planning.request import LAUNCH_SOURCE, Assumptions, PlanRequest
from lcl_mcore.planning.simulate import RankCount, Simulator, count_stages, representatives, with_micro_batches

PREDICTED = "predicted, not measured"
MOST_MICRO_BATCHES = 3
"""More than these are counted in proportion (a pipeline needs more to fill): images of sequences repeat after three."""
FEW_MESHES = ((1, 1), (2, 1), (1, 2))
"""Tensor-parallel and pipeline-parallel sizes that are compared; with `wide`, these and the following ones."""
MORE_MESHES = ((4, 1), (8, 1), (2, 2), (1, 4), (4, 2))
NONE, FULL = ("none", "none"), ("full", "full")
RECOMPUTES = (NONE, ("selective", "selective"), ("full", "none"), FULL)
"""Of the ViT and of the LM."""


@dataclass(frozen=True)
class LayoutEstimate:
    """A layout and what is expected of it.

    Attributes:
        config: the job in this layout.
        prediction: its step.
        model_state: bytes of weights, gradients and optimizer on the fullest rank.
        all_counted: all its micro-batches and ranks were counted.
    """

    config: RunConfig
    prediction: Prediction
    model_state: int
    all_counted: bool = False

    @property
    def flags(self) -> str:
        """The layout as flags of the command line."""
        parallel, size = self.config.parallel, self.config.train.micro_batch_size
        text = f"--tp {parallel.tensor_parallel_size} --pp {parallel.pipeline_parallel_size} --micro-batch-size {size}"
        if parallel.sequence_parallel:
            text += " --sequence-parallel"
        if parallel.tensor_parallel_size > 1:
            text += f" --vision-parallel {self.config.resolved_vision_parallel}"
        for tower in ("vision", "language"):
            choice = getattr(parallel, f"recompute_{tower}")
            if choice != "none":
                text += f" --recompute-{tower} {choice}"
        return text


def make_plan(
    request: PlanRequest, log: Callable[[str], None], show: Callable[[dict[str, Any]], None] = lambda plan: None
) -> dict[str, Any]:
    """Count the requested layout on every tensor and pipeline index, predict, lint, compare with other layouts.

    Args:
        request: the job and the machine.
        log: called with a line about each thing that is done.
        show: called with the plan of the requested layout before others are looked at.

    Raises:
        ConfigError: the request is not a job that can start.
    """
    config, simulator = request.run, Simulator()
    cluster = make_cluster(find_gpu(request.gpu), request.assumptions, request.node_busbw, request.network_busbw)
    dp = config.check_processes(request.gpus)
    if config.train.micro_batch_size == "auto":
        log("train.micro_batch_size = auto: looking for the largest that fits")
        config = with_size(config, largest_micro_batch(config, request.gpus, cluster.room, "cuda").size)
    parallel, train = config.parallel, config.train
    micro_batches = train.global_batch_size // dp // train.resolved_micro_batch_size
    counted = min(micro_batches, max(MOST_MICRO_BATCHES, 2 * parallel.pipeline_parallel_size))
    part = with_micro_batches(config, counted, dp)
    batch = synthetic_step(part, dp)
    counts = []
    for rank in representatives(config, request.gpus):
        log(f"counting a step of rank {rank} of {request.gpus}")
        counts.append(simulator.count(part, request.gpus, rank, batch))
    repeat = micro_batches / counted
    prediction = predict(config, request.gpus, counts, batch, cluster, repeat)
    order = RankOrder(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, dp)
    chosen = LayoutEstimate(config, prediction, _fullest(counts), all_counted=True)
    plan = {
        "kind": PREDICTED,
        "recipe": config.recipe,
        "gpus": request.gpus,
        "gpu": cluster.gpu.name,
        "layout": {
            "flags": chosen.flags,
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            "data_parallel_size": dp,
            "micro_batches": micro_batches,
            "micro_batches_counted": counted,
            "sequences_per_step": train.global_batch_size,
            "precision": train.precision,
        },
        "memory": _memory(counts, prediction, cluster),
        "flops": _flops(counts, prediction, repeat),
        "communication": _communication(counts, cluster),
        "step": _step(prediction),
        **_run(request, batch, prediction, repeat),
        "lint": {
            "ranks": [c.rank for c in counts],
            "calls": [len(c.collectives) for c in counts],
            "problems": lint({c.rank: c.collectives for c in counts}, order),
        },
        "layouts": [_layout(chosen)],
        "assumptions": _assumptions(request, cluster),
    }
    show(plan)
    layouts = [chosen]
    if request.search != "none":
        for found in _variants(simulator, config, request.gpus, cluster, request.search == "wide"):
            expected = found.prediction
            fits = "" if expected.fits else ", does not fit"
            log(f"{expected.seconds * 1e3:.1f} ms, MFU {expected.mfu:.1%}{fits}: {found.flags}")
            layouts.append(found)
    return plan | {"layouts": [_layout(item) for item in _ranked(layouts)]}


def _fullest(counts: list[RankCount]) -> int:
    return max(sum(count.model_state.values()) for count in counts)


# --- other layouts ---


def _estimate(simulator: Simulator, config: RunConfig, world: int, cluster: Cluster) -> LayoutEstimate:
    """A layout of which one rank of each pipeline stage is counted."""
    counts, batch, repeat = count_stages(simulator, config, world)
    prediction = predict(config, world, counts, batch, cluster, repeat)
    return LayoutEstimate(config, prediction, _fullest(counts))


def _variants(
    simulator: Simulator, config: RunConfig, world: int, cluster: Cluster, wide: bool
) -> Iterator[LayoutEstimate]:
    """Estimates of other meshes and recompute choices, each with the largest micro-batch that fits.

    Without `wide`, the three smallest meshes; larger ones with full recompute only if none of those fits.
    """

    def largest(tensor: int, pipeline: int, recompute: tuple[str, str]) -> LayoutEstimate | None:
        changes: dict[str, Any] = {
            "tensor_parallel_size": tensor,
            "pipeline_parallel_size": pipeline,
            "sequence_parallel": tensor > 1,
            "stage_layers": None,
            "vision_parallel": "auto",
            "recompute_vision": recompute[0],
            "recompute_language": recompute[1],
        }
        return _largest(simulator, config, changes, world, cluster)

    fits = False
    for tensor, pipeline in (*FEW_MESHES, *MORE_MESHES) if wide else FEW_MESHES:
        for recompute in RECOMPUTES if wide else (NONE,):
            found = largest(tensor, pipeline, recompute)
            if found is not None:
                fits = fits or found.prediction.fits
                yield found
    for tensor in () if wide else (1, 2, 4, 8):
        found = None if fits else largest(tensor, 1, FULL)
        if found is not None:
            fits = found.prediction.fits
            yield found


def _largest(
    simulator: Simulator, config: RunConfig, changes: dict[str, Any], world: int, cluster: Cluster
) -> LayoutEstimate | None:
    """The layout with the largest micro-batch that is expected to fit; None if the job cannot be split so."""
    sequences = (
        config.train.global_batch_size * changes["tensor_parallel_size"] * changes["pipeline_parallel_size"] // world
    )
    sizes = [size for size in range(1, min(sequences, LARGEST) + 1) if _accepted(config, changes, size, world)]
    if not sizes:
        return None
    small = sizes[min(1, len(sizes) - 1)]
    probe = _estimate(simulator, _changed(config, changes, small), world, cluster)
    # More than it is: some of it does not grow with the micro-batch.
    per_sequence = (probe.prediction.memory - probe.model_state) / small
    fitting = [size for size in sizes if probe.model_state + per_sequence * size <= cluster.room]
    best = fitting[-1] if fitting else small
    return probe if best == small else _estimate(simulator, _changed(config, changes, best), world, cluster)


def _changed(config: RunConfig, changes: dict[str, Any], micro_batch_size: int) -> RunConfig:
    parallel = replace(config.parallel, **changes)
    return replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=micro_batch_size))


def _accepted(config: RunConfig, changes: dict[str, Any], micro_batch_size: int, world: int) -> bool:
    try:
        dp = _changed(config, changes, micro_batch_size).check_processes(world)
    except ValueError:  # a refused configuration
        return False
    # A pipeline with few micro-batches is mostly fill and drain.
    stages, micro_batches = (
        changes["pipeline_parallel_size"],
        config.train.global_batch_size // dp // micro_batch_size,
    )
    return stages == 1 or micro_batches >= 2 * stages


def _ranked(estimates: list[LayoutEstimate]) -> list[LayoutEstimate]:
    """Those that fit, fastest first, then the others by memory; equal layouts once, wholly counted ones preferred."""
    unique: dict[str, LayoutEstimate] = {}
    for item in estimates:
        if item.flags not in unique or item.all_counted:
            unique[item.flags] = item

    def key(item: LayoutEstimate) -> tuple[bool, float]:
        expected = item.prediction
        return not expected.fits, expected.seconds if expected.fits else expected.memory

    return sorted(unique.values(), key=key)


# --- sections of the plan ---


def _memory(counts: list[RankCount], prediction: Prediction, cluster: Cluster) -> dict[str, Any]:
    return {
        "gpu_bytes": cluster.gpu.memory,
        "usable_bytes": cluster.room,
        "peak_bytes": prediction.memory,
        "fits": prediction.fits,
        "ranks": [
            {
                "rank": c.rank,
                "tensor_pipeline_data": list(c.place),
                "parameters": c.parameters,
                "model_state_bytes": c.model_state,
                "peak_bytes": c.peak,
                "peak_by_part": c.peak_parts,
                "peak_by_phase": c.phase_peaks,
            }
            for c in counts
        ],
    }


def _flops(counts: list[RankCount], prediction: Prediction, repeat: float) -> dict[str, Any]:
    return {
        "model_flops_per_step": prediction.model_flops,
        "executed_per_counted_step": [
            {"rank": c.rank}
            | {phase: c.flops(phase) for phase in sorted({o.phase for o in c.operators}) if c.flops(phase)}
            for c in counts
        ],
        "micro_batches_per_counted": repeat,
    }


def _communication(counts: list[RankCount], cluster: Cluster) -> list[dict[str, Any]]:
    """Volume and time alone on the links, by rank, purpose, operator and group; of the counted micro-batches."""
    lines = []
    for count in counts:
        calls: Counter[Any] = Counter()
        volume: Counter[Any] = Counter()
        seconds: dict[Any, float] = defaultdict(float)
        for call in count.collectives:
            if len(call.ranks) > 1:
                key = (purpose(call), call.op, call.group, len(call.ranks))
                calls[key] += 1
                volume[key] += call.bytes
                seconds[key] += cluster.transfer(call)
        lines += [
            {
                "rank": count.rank,
                "purpose": key[0],
                "op": key[1],
                "group": key[2],
                "members": key[3],
                "calls": calls[key],
                "bytes": volume[key],
                "seconds_alone": seconds[key],
            }
            for key in sorted(calls, key=lambda k: -seconds[k])
        ]
    return lines


def _step(prediction: Prediction) -> dict[str, Any]:
    stage = prediction.slowest
    shares = prediction.shares
    return {
        "seconds": prediction.seconds,
        "mfu": prediction.mfu,
        "bottleneck": next(iter(shares)),
        "seconds_by_cause": shares,
        "slowest_rank": stage.rank,
        "device_seconds": stage.device,
        "device_seconds_by_phase": stage.phases,
        "host_seconds": stage.host,
        "exposed_communication_seconds": stage.exposed,
        "hidden_communication_seconds": stage.hidden,
        "pipeline_bubble_seconds": prediction.bubble,
    }


def _run(request: PlanRequest, batch: StepBatch, prediction: Prediction, repeat: float) -> dict[str, Any]:
    """Input, length, cost, checkpoints and failures of the run."""
    config = request.run
    images = sum(batch.counts.images) * repeat
    rate = images / prediction.seconds
    expected = reliability(
        config,
        request.gpus,
        prediction.seconds,
        storage=request.storage_gbs * 1e9,
        restart=request.restart_minutes * 60,
        mtbf=None if request.mtbf_hours is None else request.mtbf_hours * 3600,
    )
    training = config.train.steps * prediction.seconds
    wall = training / expected.ettr if expected.ettr > 0 else float("inf")
    hours = wall / 3600 * request.gpus
    price = request.price_per_gpu_hour
    return {
        "input": {
            "images_per_step": images,
            "images_per_second": rate,
            "storage_bytes_per_second": rate * request.image_kb * 1e3,
            "decode_cores": rate / request.decodes_per_second,
            "decode_cores_per_gpu": rate / request.decodes_per_second / request.gpus,
        },
        "run": {
            "steps": config.train.steps,
            "training_days": training / 86400,
            "days": wall / 86400,
            "gpu_hours": hours,
            "cost": None if price is None else hours * price,
        },
        "reliability": dataclasses.asdict(expected) | {"checkpoint_every_steps": config.checkpoint.every},
    }


def _layout(item: LayoutEstimate) -> dict[str, Any]:
    return {
        "flags": item.flags,
        "seconds": item.prediction.seconds,
        "mfu": item.prediction.mfu,
        "peak_bytes": item.prediction.memory,
        "fits": item.prediction.fits,
        "all_counted": item.all_counted,
        "bottleneck": next(iter(item.prediction.shares)),
    }


def _assumptions(request: PlanRequest, cluster: Cluster) -> list[str]:
    a, gpu = cluster.assumed, cluster.gpu
    failures = "as given"
    if not request.mtbf_hours:
        failures = "419 in 54 days of 16,384 H100 (Llama 3, arXiv:2407.21783), in proportion to the number of GPUs"
    return [
        f"{gpu.name}: {gpu.memory / 2**30:.0f} GiB, {gpu.bandwidth / 1e12:.2f} TB/s, matmul rate of "
        f"lcl_mcore.hardware (data sheets); tensors may fill {a.headroom:.0%}, the rest is for kernels' "
        "workspaces, NCCL and fragmentation",
        f"matmuls reach {a.matmul:.0%} of the dense rate, attention {a.attention:.0%}, all other operators "
        f"{a.memory:.0%} of the memory bandwidth",
        f"the host needs {a.launch * 1e6:.1f} us per operator"
        + (f" ({LAUNCH_SOURCE})" if a.launch == Assumptions.launch else ""),
        f"bus bandwidth {cluster.node / 1e9:.0f} GB/s within a node of {a.gpus_per_node}, "
        f"{cluster.network / 1e9:.0f} GB/s per GPU between nodes; {a.node_latency * 1e6:.0f} and "
        f"{a.network_latency * 1e6:.0f} us per doubling",
        "gradient reduction hides behind the last micro-batch's backward but for its last bucket, parameter gathers "
        "behind the first one's forward but for the first bucket; nothing else is hidden",
        "layers of megatron-core with torch's variable-length attention, our fused operators (each one pass over what "
        "it takes, makes and changes) and torch's contrastive loss; Transformer Engine and flash-attn are not assumed",
        "sequences are full, as in benchmarks/step.py, and every data-parallel rank has the same images and targets",
        f"checkpoints are written at {request.storage_gbs:g} GB/s by all ranks together while training waits; "
        f"images take {request.image_kb:g} kB and a core prepares {request.decodes_per_second:g} a second",
        f"failures: {failures}; {request.restart_minutes:g} minutes to restart",
        "counted from the real training step by lcl_mcore.planning; no GPU was used",
    ]
