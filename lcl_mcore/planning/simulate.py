"""Counts the real training step of one rank, really run or simulated: without its data, GPU or peers.

A simulated rank has torch's "fake" process groups of the wanted size, which do nothing, and tensors on the "meta"
device, which have shapes and no values. What the host computes with (segment lengths, packing, counts) is real.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from lcl_kernels.triton_fused import FusedImpl
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lcl_mcore.batch import StepBatch
from lcl_mcore.build import Training, build_training
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.distributed import cpu
from lcl_mcore.distributed.context import Context, detached
from lcl_mcore.distributed.device import Device
from lcl_mcore.distributed.groups import make_groups
from lcl_mcore.models.backends import Backends, Choice
from lcl_mcore.models.layers import torch_backend
from lcl_mcore.planning.counter import CollectiveCall, KnownCalls, OperatorCall, StepCounter

MODEL_STATE = ("weights", "gradients", "optimizer")
PARTS = (*MODEL_STATE, "input", "activations", "loss", "communication")
ROUNDING = {"cuda": 512, "cpu": 1}
"""The device's allocator hands out multiples of this many bytes."""
ELEMENTWISE: dict[str, FusedImpl] = {"cuda": "triton", "cpu": "plain"}
"""What serves the work between matrix products on each kind of device."""


@dataclass(frozen=True)
class RankCount:
    """What one rank does in one step.

    Attributes:
        rank: its number.
        place: its tensor-parallel, pipeline and data-parallel indices.
        parameters: elements on this rank, without the padding of buffers.
        model_state: bytes of weights, gradients and optimizer.
        peak: most bytes of live tensors during the step.
        peak_parts: what they were, by `PARTS`.
        phase_peaks: most bytes of live tensors in each phase.
        operators: operator calls.
        collectives: collectives and transfers, in order.
        buckets: bytes of each gradient bucket, in the order backward fills them.
    """

    rank: int
    place: tuple[int, int, int]
    parameters: int
    model_state: dict[str, int]
    peak: int
    peak_parts: dict[str, int]
    phase_peaks: dict[str, int]
    operators: Counter[OperatorCall]
    collectives: tuple[CollectiveCall, ...]
    buckets: tuple[int, ...]

    def flops(self, phase: str) -> int:
        """FLOPs executed in this phase."""
        return sum(call.flops * times for call, times in self.operators.items() if call.phase == phase)


class Simulator:
    """Counts steps of single ranks of jobs that are not there.

    It remembers what torch says about the shapes of operators' results: ranks and layouts counted later are faster.
    """

    def __init__(self, kind: str = "cuda") -> None:
        """Simulate GPUs ("cuda"), or CPUs ("cpu")."""
        self.kind = kind
        self.known_calls: KnownCalls = {}

    def count(self, config: RunConfig, world_size: int, rank: int, batch: StepBatch) -> RankCount:
        """One step of one rank of a job.

        Args:
            config: of the job; the precision is not FP8, whose layers need a GPU.
            batch: that rank's part of the step, see `data.synthetic.synthetic_step`.
        """
        parallel = config.parallel
        with _simulated_job(self.kind, world_size, rank) as device:
            groups = make_groups(
                parallel.tensor_parallel_size,
                parallel.pipeline_parallel_size,
                600,
                config.train.seed,
                host_backend="fake",
            )
            attention: Any = "sdpa" if config.train.precision == "fp32" else "torch-varlen"
            asked = config.train.elementwise_backend
            layers = replace(torch_backend(attention), elementwise=ELEMENTWISE[self.kind] if asked == "auto" else asked)
            choice = Choice("layers", "megatron-core", "simulated")
            return count_step(
                config,
                detached(device, groups),
                batch,
                backends=Backends(layers, False, (choice,)),
                rounding=ROUNDING[self.kind],
                known_calls=self.known_calls,
            )


def representatives(config: RunConfig, world_size: int) -> list[int]:
    """Ranks of data-parallel index 0, one for each tensor and pipeline index: all others do what one of them does."""
    tp, pp = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size
    return [p * (world_size // pp) + t for p in range(pp) for t in range(tp)]


def with_micro_batches(config: RunConfig, micro_batches: int, dp: int) -> RunConfig:
    """The same job with so many micro-batches a step."""
    size = micro_batches * config.train.resolved_micro_batch_size * dp
    return replace(config, train=replace(config.train, global_batch_size=size))


def count_stages(simulator: Simulator, config: RunConfig, world: int) -> tuple[list[RankCount], StepBatch, float]:
    """One rank of each pipeline stage, as many micro-batches as fill the pipeline; the rest is proportional.

    Returns:
        The counts, what was counted, and how many times as many micro-batches a step has.
    """
    dp = config.check_processes(world)
    micro_batches = config.train.global_batch_size // dp // config.train.resolved_micro_batch_size
    counted = min(micro_batches, config.parallel.pipeline_parallel_size + 1)
    fewer = with_micro_batches(config, counted, dp)
    batch = synthetic_step(fewer, dp)
    first_of_stage = representatives(config, world)[:: config.parallel.tensor_parallel_size]
    counts = [simulator.count(fewer, world, rank, batch) for rank in first_of_stage]
    return counts, batch, micro_batches / counted


def count_step(
    config: RunConfig,
    context: Context,
    batch: StepBatch,
    *,
    backends: Backends | None = None,
    rounding: int = 1,
    known_calls: KnownCalls | None = None,
) -> RankCount:
    """Build this rank's share of the job, run a small step, and then one under the counter.

    Args:
        context: real devices and groups, or simulated ones.
        batch: what this rank trains on.
        backends: which implementation serves each part; None: the fastest that is here.
        rounding: tensors take a multiple of this many bytes.
        known_calls: see `StepCounter`.
    """
    device, groups = context.device.device, context.groups
    counter = StepCounter(device, rounding=rounding, known_calls=known_calls)
    training = build_training(config, context, backends=backends, observer=counter)
    _own_model_state(counter, training)
    model_state = {part: counter.parts[part] for part in MODEL_STATE}
    for micro in batch.micro_batches:  # which is on the device already if that is a CPU
        counter.own("input", *(v for v in micro.__dict__.values() if isinstance(v, Tensor)))
    # megatron learns in the first step which gradients to wait for, and overlaps from the second one on.
    with StepCounter(device, known_calls=known_calls):
        training.step.run(0, _first_micro_batch(batch), config.optim.lr)
    gc.collect()
    gc.disable()  # as in training, where it is collected between steps
    try:
        with counter:
            training.step.run(1, batch, config.optim.lr)
    finally:
        gc.enable()
    return RankCount(
        rank=context.rank,
        place=(groups.tp.rank(), groups.pp.rank(), groups.dp.rank()),
        parameters=sum(p.numel() for p in training.model.parameters()),
        model_state=model_state,
        peak=counter.peak,
        peak_parts={part: counter.peak_parts.get(part, 0) for part in PARTS},
        phase_peaks=dict(counter.phase_peaks),
        operators=counter.operators,
        collectives=tuple(counter.collectives),
        buckets=tuple(
            bucket.grad_data.numel() * bucket.grad_data.element_size()
            for buffer in training.ddp.buffers
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
        batch, micro_batches=(micro,), counts=replace(counts, **small, micro_contexts=counts.micro_contexts[:1])
    )


def _own_model_state(counter: StepCounter, training: Training) -> None:
    model, adam = training.model, training.optimizer.adam
    for buffer in training.ddp.buffers:
        if buffer.param_data is not None:
            counter.own("weights", buffer.param_data)
        counter.own("gradients", buffer.grad_data)
    counter.own("weights", *(p.data for p in model.parameters()), *model.buffers())
    for group in adam.param_groups:
        counter.own("optimizer", *group["params"])
    for moments in adam.state.values():
        counter.own("optimizer", *(v for v in moments.values() if isinstance(v, Tensor)))


@contextmanager
def _simulated_job(kind: str, world_size: int, rank: int) -> Iterator[Device]:
    """A default process group of that size, and none when it ends; CUDA is answered by the "meta" device."""
    meta = torch.device("meta")
    cpu.install()
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with warnings.catch_warnings(), cpu.answering(meta), _attention_of(kind):
            warnings.simplefilter("ignore")
            yield Device(kind, meta, "fake", f"simulated {kind}")
    finally:
        dist.destroy_process_group()


@contextmanager
def _attention_of(kind: str) -> Iterator[None]:
    """Torch's attention on "meta" runs that device's kernel; without values it would pick the one that keeps scores.

    An implementation for this device alone, by torch's own extension interface, so that recompute finds it as well.
    """
    aten: Any = torch.ops.aten

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if kind == "cpu":
            out = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, scale=scale)
        elif q.dtype == torch.float32:
            out = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout, causal, scale=scale)
        else:
            out = aten._scaled_dot_product_flash_attention(q, k, v, dropout, causal, scale=scale)
        attended: Tensor = out[0]
        return attended

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", attend, "AutogradMeta")
        yield
