"""Other layouts of the same job, estimated and ranked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lcl_mcore.config.run import RunConfig
from lcl_mcore.errors import ConfigError
from lcl_mcore.planning.counting import rank_batch
from lcl_mcore.planning.hardware import Machine
from lcl_mcore.planning.predict import Prediction, predict
from lcl_mcore.planning.simulate import places, simulate_rank


@dataclass(frozen=True)
class Estimate:
    """A layout and what is expected of it; `exact` if all its micro-batches and ranks were counted."""

    config: RunConfig
    prediction: Prediction
    exact: bool = False

    @property
    def name(self) -> str:
        """The layout as flags."""
        parallel, rows = self.config.parallel, self.config.train.micro_batch_size
        text = f"--tp {parallel.tensor} --pp {parallel.pipeline} --micro-batch-size {rows}"
        if parallel.sequence:
            text += " --sequence-parallel"
        if parallel.tensor > 1:
            text += f" --vision-parallel {self.config.vision_parallel}"
        for tower in ("vision", "language"):
            choice = getattr(parallel, f"recompute_{tower}")
            if choice != "none":
                text += f" --recompute-{tower} {choice}"
        return text


def estimate(config: RunConfig, world: int, machine: Machine) -> Estimate:
    """One rank of each pipeline stage, as many micro-batches as fill the pipeline; the rest is proportional."""
    dp = config.check_processes(world)
    micros = config.train.global_batch_size // dp // config.train.micro_batch_size
    counted = min(micros, config.parallel.pipeline + 1)
    rows = counted * config.train.micro_batch_size * dp
    fewer = replace(config, train=replace(config.train, global_batch_size=rows))
    batch = rank_batch(fewer, dp)
    first_of_stage = places(config, world)[:: config.parallel.tensor]
    counts = [simulate_rank(fewer, world, rank, batch) for rank in first_of_stage]
    return Estimate(config, predict(config, world, counts, batch, machine, micros / counted))


def variants(config: RunConfig, world: int, machine: Machine, wide: bool) -> Iterator[Estimate]:
    """Estimates of other meshes and recompute choices, each with the largest micro-batch that fits."""
    meshes = [(1, 1), (2, 1), (1, 2)]
    recomputes = [("none", "none")]
    if wide:
        meshes += [(4, 1), (8, 1), (2, 2), (1, 4), (4, 2)]
        recomputes += [("selective", "selective"), ("full", "none"), ("full", "full")]
    for tensor, pipeline in meshes:
        for vision, language in recomputes:
            parallel = dataclasses.replace(
                config.parallel, tensor=tensor, pipeline=pipeline, sequence=tensor > 1, stage_layers=None,
                recompute_vision=vision, recompute_language=language, vision="auto",
            )  # fmt: skip
            yield from _largest(config, parallel, world, machine)


def _largest(config: RunConfig, parallel: object, world: int, machine: Machine) -> Iterator[Estimate]:
    """The layout with the largest micro-batch whose memory, in proportion to rows, is expected to fit."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if _accepted(config, parallel, size, world)]
    if not sizes:
        return
    small = sizes[min(1, len(sizes) - 1)]
    probe = estimate(_with(config, parallel, small), world, machine)
    room = machine.gpu.memory * machine.assumed.headroom
    slowest = probe.prediction
    per_row = slowest.memory / small  # an over-estimate: part of it does not grow
    fitting = [size for size in sizes if per_row * size <= room]
    if not fitting:
        yield probe
        return
    best = fitting[-1]
    yield probe if best == small else estimate(_with(config, parallel, best), world, machine)


def _with(config: RunConfig, parallel: object, rows: int) -> RunConfig:
    return replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=rows))  # type: ignore[arg-type]


def _accepted(config: RunConfig, parallel: object, rows: int, world: int) -> bool:
    try:
        changed = _with(config, parallel, rows)
        changed.check_processes(world)
    except ConfigError:
        return False
    # A pipeline with few micro-batches is mostly fill and drain.
    dp = world // (changed.parallel.tensor * changed.parallel.pipeline)
    micros = changed.train.global_batch_size // dp // rows
    return changed.parallel.pipeline == 1 or micros >= 2 * changed.parallel.pipeline


def ranked(estimates: list[Estimate]) -> list[Estimate]:
    """Those that fit, fastest first, then the others by memory; equal layouts once, exact ones preferred."""
    unique: dict[str, Estimate] = {}
    for item in estimates:
        if item.name not in unique or item.exact:
            unique[item.name] = item
    return sorted(unique.values(), key=lambda e: (not e.prediction.fits, e.prediction.seconds if e.prediction.fits
                                                  else e.prediction.memory))  # fmt: skip
