"""The whole prediction for one request, as plain JSON types."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from lcl_mcore.batch import StepBatch
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.hardware import find_gpu
from lcl_mcore.planning.counting import RankCount
from lcl_mcore.planning.hardware import Machine, make_machine
from lcl_mcore.planning.layouts import Estimate, ranked, variants
from lcl_mcore.planning.lint import Mesh, lint
from lcl_mcore.planning.predict import Prediction, predict, purpose
from lcl_mcore.planning.reliability import uptime
from lcl_mcore.planning.request import PlanRequest
from lcl_mcore.planning.simulate import places, simulate_rank

PREDICTED = "predicted, not measured"
MOST_MICRO_BATCHES = 8
"""More than these are counted in proportion (a pipeline needs more to fill)."""


def make_plan(request: PlanRequest, note: Callable[[str], None]) -> dict[str, Any]:
    """Count the requested layout on every tensor and pipeline index, predict, lint, compare with other layouts.

    Raises:
        ConfigError: the request is not a job that can start.
    """
    config = request.run
    machine = make_machine(
        find_gpu(request.gpu), request.assumptions, request.node_busbw, request.network_busbw
    )
    dp = config.check_processes(request.gpus)
    parallel, train = config.parallel, config.train
    micros = train.global_batch_size // dp // train.micro_batch_size
    counted = min(micros, max(MOST_MICRO_BATCHES, 2 * parallel.pipeline_parallel_size))
    part = dataclasses.replace(
        config, train=dataclasses.replace(train, global_batch_size=counted * train.micro_batch_size * dp)
    )
    batch = synthetic_step(part, dp)
    counts = []
    for rank in places(config, request.gpus):
        note(f"counting a step of rank {rank} of {request.gpus}")
        counts.append(simulate_rank(part, request.gpus, rank, batch))
    repeat = micros / counted
    prediction = predict(config, request.gpus, counts, batch, machine, repeat)
    problems = lint(
        {c.rank: c.events for c in counts},
        Mesh(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, dp),
    )
    lasting = max(sum(count.state.values()) for count in counts)
    chosen = Estimate(config, prediction, lasting, exact=True)
    layouts = [chosen]
    if request.search != "none":
        for found in variants(config, request.gpus, machine, request.search == "wide"):
            note(f"compared {found.name}")
            layouts.append(found)
    return {
        "kind": PREDICTED,
        "recipe": config.recipe,
        "gpus": request.gpus,
        "gpu": machine.gpu.name,
        "layout": {
            "flags": chosen.name,
            "tensor": parallel.tensor_parallel_size,
            "pipeline": parallel.pipeline_parallel_size,
            "data": dp,
            "micro_batches": micros,
            "micro_batches_counted": counted,
            "rows_per_step": train.global_batch_size,
            "precision": train.precision,
        },
        "memory": _memory(counts, prediction, machine),
        "flops": _flops(counts, prediction, repeat),
        "communication": _communication(counts, machine, repeat),
        "step": _step(prediction),
        **_run(request, config, batch, prediction, repeat),
        "lint": {
            "ranks": [c.rank for c in counts],
            "events": [len(c.events) for c in counts],
            "problems": problems,
        },
        "layouts": [_layout(item) for item in ranked(layouts)],
        "assumptions": _assumptions(request, machine),
    }


def _memory(counts: list[RankCount], prediction: Prediction, machine: Machine) -> dict[str, Any]:
    return {
        "gpu_bytes": machine.gpu.memory,
        "usable_bytes": machine.gpu.memory * machine.assumed.headroom,
        "peak_bytes": prediction.memory,
        "fits": prediction.fits,
        "ranks": [
            {
                "rank": c.rank,
                "tensor_pipeline_data": list(c.place),
                "parameters": c.parameters,
                "lasting_bytes": c.state,
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
            | {phase: c.flops(phase) for phase in sorted({w.phase for w in c.work}) if c.flops(phase)}
            for c in counts
        ],
        "micro_batches_per_counted": repeat,
    }


def _communication(counts: list[RankCount], machine: Machine, repeat: float) -> list[dict[str, Any]]:
    """Volume and time alone on the links, by rank, purpose, operator and group; of the counted micro-batches."""
    rows = []
    for count in counts:
        calls: Counter[Any] = Counter()
        volume: Counter[Any] = Counter()
        seconds: dict[Any, float] = defaultdict(float)
        for event in count.events:
            if len(event.ranks) > 1:
                key = (purpose(event), event.op, event.group, len(event.ranks))
                calls[key] += 1
                volume[key] += event.bytes
                seconds[key] += machine.transfer(event)
        rows += [
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
    return rows


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


def _run(
    request: PlanRequest, config: RunConfig, batch: StepBatch, prediction: Prediction, repeat: float
) -> dict[str, Any]:
    """Input, length, cost, checkpoints and failures of the run."""
    images = sum(batch.counts.images) * repeat
    rate = images / prediction.seconds
    up = uptime(
        config,
        request.gpus,
        prediction.seconds,
        storage=request.storage_gbs * 1e9,
        restart=request.restart_minutes * 60,
        mtbf=None if request.mtbf_hours is None else request.mtbf_hours * 3600,
    )
    training = config.train.steps * prediction.seconds
    wall = training / up.ettr if up.ettr > 0 else float("inf")
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
        "reliability": dataclasses.asdict(up) | {"checkpoint_every_steps": config.checkpoint.every},
    }


def _layout(item: Estimate) -> dict[str, Any]:
    return {
        "flags": item.name,
        "seconds": item.prediction.seconds,
        "mfu": item.prediction.mfu,
        "peak_bytes": item.prediction.memory,
        "fits": item.prediction.fits,
        "all_counted": item.exact,
        "bottleneck": next(iter(item.prediction.shares)),
    }


def _assumptions(request: PlanRequest, machine: Machine) -> list[str]:
    a, gpu = machine.assumed, machine.gpu
    return [
        f"{gpu.name}: {gpu.memory / 2**30:.0f} GiB, {gpu.bandwidth / 1e12:.2f} TB/s, matrix rate of "
        f"lcl_mcore.models.flops (data sheets); tensors may fill {a.headroom:.0%}, the rest is for kernels' "
        "workspaces, NCCL and fragments",
        f"matrix products reach {a.products:.0%} of the dense rate, attention {a.attention:.0%}, all other operators "
        f"{a.memory:.0%} of the memory bandwidth; the host needs {a.launch * 1e6:.1f} us per operator",
        f"bus bandwidth {machine.node / 1e9:.0f} GB/s within a node of {a.gpus_per_node}, {machine.network / 1e9:.0f} "
        f"GB/s per GPU between nodes; {a.node_latency * 1e6:.0f} and {a.network_latency * 1e6:.0f} us per doubling",
        "gradient reduction hides behind the last micro-batch's backward pass but for its last bucket, parameter "
        "gathers behind the first one's forward pass but for the first bucket; nothing else is hidden",
        "layers of megatron-core with torch's variable-length attention and torch's contrastive loss; Transformer "
        "Engine, flash-attn and our Triton kernels are not assumed",
        "rows are full, as in benchmarks/step.py, and every data-parallel rank has the same images and targets",
        f"checkpoints are written at {request.storage_gbs:g} GB/s by all ranks together while training waits; "
        f"images take {request.image_kb:g} kB and a core prepares {request.decodes_per_second:g} a second",
        "failures: "
        + (
            "as given"
            if request.mtbf_hours
            else "419 in 54 days of 16,384 H100 (Llama 3, arXiv:2407.21783), in proportion to the GPUs"
        )
        + f"; {request.restart_minutes:g} minutes to restart",
        f"counted by {os.path.basename(__file__)} from the real training step; no GPU was used",
    ]
