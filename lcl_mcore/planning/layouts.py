"""Other layouts of the same job, estimated and ranked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.planning.hardware import Machine
from lcl_mcore.planning.predict import Prediction, predict
from lcl_mcore.planning.simulate import places, simulate_rank

MOST_ROWS = 64
"""Larger micro-batches are not tried."""


@dataclass(frozen=True)
class Estimate:
    """A layout and what is expected of it.

    lasting  bytes of weights, gradients and optimizer on its fullest rank
    exact    all its micro-batches and ranks were counted
    """

    config: RunConfig
    prediction: Prediction
    lasting: int
    exact: bool = False

    @property
    def name(self) -> str:
        """The layout as flags."""
        parallel, rows = self.config.parallel, self.config.train.micro_batch_size
        text = f"--tp {parallel.tensor_parallel_size} --pp {parallel.pipeline_parallel_size} --micro-batch-size {rows}"
        if parallel.sequence_parallel:
            text += " --sequence-parallel"
        if parallel.tensor_parallel_size > 1:
            text += f" --vision-parallel {self.config.resolved_vision_parallel}"
        for tower in ("vision", "language"):
            choice = getattr(parallel, f"recompute_{tower}")
            if choice != "none":
                text += f" --recompute-{tower} {choice}"
        return text


def estimate(config: RunConfig, world: int, machine: Machine) -> Estimate:
    """One rank of each pipeline stage, as many micro-batches as fill the pipeline; the rest is proportional."""
    dp = config.check_processes(world)
    micros = config.train.global_batch_size // dp // config.train.micro_batch_size
    counted = min(micros, config.parallel.pipeline_parallel_size + 1)
    rows = counted * config.train.micro_batch_size * dp
    fewer = replace(config, train=replace(config.train, global_batch_size=rows))
    batch = synthetic_step(fewer, dp)
    first_of_stage = places(config, world)[:: config.parallel.tensor_parallel_size]
    counts = [simulate_rank(fewer, world, rank, batch) for rank in first_of_stage]
    lasting = max(sum(count.state.values()) for count in counts)
    return Estimate(config, predict(config, world, counts, batch, machine, micros / counted), lasting)


NONE, FULL = ("none", "none"), ("full", "full")


def variants(config: RunConfig, world: int, machine: Machine, wide: bool) -> Iterator[Estimate]:
    """Estimates of other meshes and recompute choices, each with the largest micro-batch that fits.

    Without `wide`, the three smallest meshes; larger ones with full recompute only if none of those fits.
    """
    fits = False
    few = [(1, 1), (2, 1), (1, 2)]
    recomputes = [NONE, ("selective", "selective"), ("full", "none"), FULL] if wide else [NONE]
    meshes = [*few, (4, 1), (8, 1), (2, 2), (1, 4), (4, 2)] if wide else few
    for tensor, pipeline in meshes:
        for recompute in recomputes:
            for found in _largest(config, _changed(config, tensor, pipeline, recompute), world, machine):
                fits = fits or found.prediction.fits
                yield found
    for tensor in () if wide else (1, 2, 4, 8):
        if not fits:
            for found in _largest(config, _changed(config, tensor, 1, FULL), world, machine):
                fits = fits or found.prediction.fits
                yield found


def _changed(config: RunConfig, tensor: int, pipeline: int, recompute: tuple[str, str]) -> dict[str, Any]:
    return {
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "sequence_parallel": tensor > 1,
        "stage_layers": None,
        "vision_parallel": "auto",
        "recompute_vision": recompute[0],
        "recompute_language": recompute[1],
    }


def _largest(config: RunConfig, changes: dict[str, Any], world: int, machine: Machine) -> Iterator[Estimate]:
    """The layout with the largest micro-batch that is expected to fit; nothing if the job cannot be split so."""
    rows = (
        config.train.global_batch_size
        * changes["tensor_parallel_size"]
        * changes["pipeline_parallel_size"]
        // world
    )
    sizes = [size for size in range(1, min(rows, MOST_ROWS) + 1) if _accepted(config, changes, size, world)]
    if not sizes:
        return
    small = sizes[min(1, len(sizes) - 1)]
    probe = estimate(_with(config, changes, small), world, machine)
    room = machine.gpu.memory * machine.assumed.headroom
    per_row = (probe.prediction.memory - probe.lasting) / small  # more than it is: some of it does not grow
    fitting = [size for size in sizes if probe.lasting + per_row * size <= room]
    best = fitting[-1] if fitting else small
    yield probe if best == small else estimate(_with(config, changes, best), world, machine)


def _with(config: RunConfig, changes: dict[str, Any], rows: int) -> RunConfig:
    parallel = replace(config.parallel, **changes)
    return replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=rows))


def _accepted(config: RunConfig, changes: dict[str, Any], rows: int, world: int) -> bool:
    try:
        changed = _with(config, changes, rows)
        changed.check_processes(world)
    except ValueError:  # a refused configuration
        return False
    # A pipeline with few micro-batches is mostly fill and drain.
    dp = world // (changed.parallel.tensor_parallel_size * changed.parallel.pipeline_parallel_size)
    micros = changed.train.global_batch_size // dp // rows
    return (
        changed.parallel.pipeline_parallel_size == 1 or micros >= 2 * changed.parallel.pipeline_parallel_size
    )


def ranked(estimates: list[Estimate]) -> list[Estimate]:
    """Those that fit, fastest first, then the others by memory; equal layouts once, exact ones preferred."""
    unique: dict[str, Estimate] = {}
    for item in estimates:
        if item.name not in unique or item.exact:
            unique[item.name] = item
    return sorted(
        unique.values(),
        key=lambda e: (
            not e.prediction.fits,
            e.prediction.seconds if e.prediction.fits else e.prediction.memory,
        ),
    )
