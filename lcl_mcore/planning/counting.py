"""One counted training step of one rank: the real model, losses, gradient buffers and optimizer."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lcl_mcore.batch import StepBatch
from lcl_mcore.build import build_training
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.distributed.context import detached
from lcl_mcore.distributed.device import Device
from lcl_mcore.distributed.groups import Groups
from lcl_mcore.models.backends import Backends
from lcl_mcore.optimizer import Optimizer
from lcl_mcore.planning.counter import Event, StepCounter, Work

STATE = ("weights", "gradients", "optimizer")
PARTS = (*STATE, "input", "activations", "loss", "communication")


@dataclass(frozen=True)
class RankCount:
    """What one rank does in one step.

    rank, place      its number; its tensor-parallel, pipeline and data-parallel indices
    parameters       elements on this rank, padding of buffers left out
    state            lasting bytes: weights, gradients, optimizer
    peak             most bytes of live tensors during the step, and `peak_parts` what they were
    work             operator calls;  events  collectives, in order
    buckets          bytes of each gradient bucket, in the order backward fills them
    """

    rank: int
    place: tuple[int, int, int]
    parameters: int
    state: dict[str, int]
    peak: int
    peak_parts: dict[str, int]
    phase_peaks: dict[str, int]
    work: Counter[Work]
    events: tuple[Event, ...]
    buckets: tuple[int, ...]

    def flops(self, *phases: str) -> int:
        """FLOPs of these phases, of all without an argument."""
        return sum(w.flops * n for w, n in self.work.items() if not phases or w.phase in phases)


def count_step(
    config: RunConfig,
    device: Device,
    groups: Groups,
    batch: StepBatch,
    *,
    simulated: bool = False,
    rounding: int = 1,
    backends: Backends | None = None,
) -> RankCount:
    """Build this rank's share of the job, run a small step, and then one under the counter.

    Args:
        device: with `simulated`, one whose torch device is "meta".
        rounding: tensors take a multiple of this many bytes.
    """
    counter = StepCounter(device.device, simulated=simulated, rounding=rounding)
    training = build_training(config, detached(device, groups), backends=backends, observer=counter)
    model, ddp, optimizer, train = training.model, training.ddp, training.optimizer, training.step
    _own_state(counter, model, ddp, optimizer)
    if device.kind == "cpu" and not simulated:  # nothing is copied to the device: it is there already
        for micro in batch.micro_batches:
            counter.own("input", *(v for v in micro.__dict__.values() if isinstance(v, Tensor)))
    state = {part: counter.parts[part] for part in STATE}
    # megatron learns in the first step which gradients to wait for, and overlaps from the second one on.
    warm_up = _first_micro_batch(batch)
    if simulated:
        with StepCounter(device.device, simulated=True):
            train.run(0, warm_up, config.optim.lr)
    else:
        train.run(0, warm_up, config.optim.lr)
    gc.collect()
    with counter:
        train.run(1, batch, config.optim.lr)
    rank = torch.distributed.get_rank()
    return RankCount(
        rank=rank,
        place=(groups.tp.rank(), groups.pp.rank(), groups.dp.rank()),
        parameters=sum(p.numel() for p in model.parameters()),
        state=state,
        peak=counter.peak,
        peak_parts={part: counter.peak_parts.get(part, 0) for part in PARTS},
        phase_peaks=dict(counter.phase_peaks),
        work=counter.work,
        events=tuple(counter.events),
        buckets=tuple(
            bucket.grad_data.numel() * bucket.grad_data.element_size()
            for buffer in ddp.buffers
            for bucket in buffer.buckets
        ),
    )


def _first_micro_batch(batch: StepBatch) -> StepBatch:
    """A step of the first micro-batch alone."""
    counts, micro = batch.counts, batch.micro_batches[0]
    ranks = len(counts.images)
    small: dict[str, Any] = {
        "images": (len(micro.images),) * ranks,
        "contexts": counts.micro_contexts[0],
        "targets": (len(micro.target_positions),) * ranks,
    }
    return replace(
        batch,
        micro_batches=(micro,),
        counts=replace(counts, **small, micro_contexts=counts.micro_contexts[:1]),
    )


def _own_state(counter: StepCounter, model: Any, ddp: Any, optimizer: Optimizer) -> None:
    for buffer in ddp.buffers:
        if buffer.param_data is not None:
            counter.own("weights", buffer.param_data)
        counter.own("gradients", buffer.grad_data)
    counter.own("weights", *(p.data for p in model.parameters()), *model.buffers())
    for group in optimizer.adam.param_groups:
        counter.own("optimizer", *group["params"])
    for moments in optimizer.adam.state.values():
        counter.own("optimizer", *(v for v in moments.values() if isinstance(v, Tensor)))
