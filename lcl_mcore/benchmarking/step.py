"""Speed and memory of the real training step of a recipe: model, losses, backward, optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lcl_mcore import optional_packages as probe
from lcl_mcore.batch import MicroBatch
from lcl_mcore.build import build_training
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.run import RunConfig
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.distributed.context import detached
from lcl_mcore.distributed.device import Device, init_process_group, pick_device
from lcl_mcore.distributed.groups import Groups, make_groups
from lcl_mcore.metrics import StepOutput
from lcl_mcore.models.flops import FlopCounter
from lcl_mcore.models.transformer_config import DTYPES

# Rows of a micro-batch that are tried on a GPU, by the length of a row.
LONG_ROWS, CANDIDATES_LONG = 1024, (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
CANDIDATES_SHORT = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768)
WARM_UP = 3
HEADROOM = 0.92
"""Share of the free memory that a prediction may use: the allocator needs some, and fragments."""


@dataclass(frozen=True)
class Request:
    """What to measure. `rows` 0: the largest micro-batch that fits (on a CPU: a small one)."""

    recipe: str
    precision: Literal["fp32", "bf16", "fp8"]
    rows: int = 0
    steps: int = 10
    micro_batches: int = 1
    recompute: str = "none"
    """Of both towers, see `config.run.ParallelConfig`."""
    backend: Literal["auto", "torch", "te"] = "auto"
    dry: bool = False
    """Cut width and depth down, for a check of the code without a GPU."""


def dry_shape(config: RunConfig) -> RunConfig:
    """The recipe with towers of two narrow layers; rows, images and vocabulary keep their sizes."""
    model = config.model
    small: dict[str, Any] = {"width": 64, "layers": 2, "heads": 4, "mlp_width": 128}
    return replace(
        config,
        model=replace(
            model,
            vision=replace(model.vision, **small),
            language=replace(model.language, **small),
            pool_heads=4,
        ),
    )


def run_config(request: Request, rows: int) -> RunConfig:
    """The recipe's configuration with the sizes of this measurement."""
    config = load_recipe(request.recipe)
    config = dry_shape(config) if request.dry else config
    train = replace(
        config.train,
        micro_batch_size=rows,
        global_batch_size=rows * request.micro_batches,
        precision=request.precision,
        backend=request.backend,
    )
    parallel = replace(
        config.parallel,
        tensor_parallel_size=1,
        sequence_parallel=False,
        recompute_vision=request.recompute,
        recompute_language=request.recompute,
    )
    return replace(config, train=train, parallel=parallel)


def why_not(request: Request, device: Device) -> str | None:
    """Why this precision cannot be measured here, or None."""
    if request.precision != "fp8":
        return None
    if not device.is_cuda:
        return "FP8 needs a GPU of compute capability 8.9 or newer, and this is a CPU"
    if torch.cuda.get_device_capability() < (8, 9):
        return f"FP8 needs compute capability 8.9 or newer; {device.name} has less"
    te = probe.transformer_engine()
    if not te.usable:
        return f"FP8 layers come from Transformer Engine, which cannot be used: {te.reason}"
    return None


class Bench:
    """One built model with its optimizer and a batch on which steps can be timed."""

    def __init__(self, config: RunConfig, device: Device, groups: Groups) -> None:
        self.config, self.device = config, device
        self.before = torch.cuda.memory_allocated() if device.is_cuda else 0
        self.training = build_training(config, detached(device, groups))
        self.state_bytes = torch.cuda.memory_allocated() - self.before if device.is_cuda else None
        self.batch = synthetic_step(config)
        if device.is_cuda:
            on_host = tuple(pinned(micro) for micro in self.batch.micro_batches)
            self.batch = replace(self.batch, micro_batches=on_host)
        self.done = 0
        self.last: StepOutput | None = None

    def step(self) -> None:
        """One optimizer step, queued but not waited for; the learning rate is that of a warm-up."""
        self.last = self.training.step.run(self.done, self.batch, 1e-6)
        self.done += 1

    def times(self, count: int) -> list[float]:
        """Seconds of `count` consecutive steps. On CUDA the host runs ahead, as in training."""
        if not self.device.is_cuda:
            marks = [time.perf_counter()]
            for _ in range(count):
                self.step()
                marks.append(time.perf_counter())
            return [b - a for a, b in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            self.step()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]

    def fp8_is_on(self) -> bool:
        """Whether the towers really multiply in FP8."""
        return bool(getattr(self.training.model.config, "fp8", None))


def measure(request: Request) -> dict[str, Any]:
    """Run the request in this process; the result is plain JSON.

    `status` is "ok", "not run" (with `reason`) or "failed" (with `reason`).
    """
    device = pick_device()
    result: dict[str, Any] = {**dataclasses.asdict(request), "device": device.name, "status": "not run"}
    reason = why_not(request, device)
    if reason:
        return result | {"reason": reason}
    if not torch.distributed.is_initialized():
        init_process_group(device, 120)
    groups = make_groups(1, 1, 120, 0)
    tries: list[dict[str, Any]] = []
    result["tries"] = tries
    rows = request.rows or (1 if _long(request) else 4)
    if not request.rows and device.is_cuda:
        rows = largest_fit(request, device, groups, tries)
    if rows == 0:
        return result | {"status": "failed", "reason": "not even the smallest micro-batch fits in memory"}
    while True:
        try:
            return result | _measure_rows(request, rows, device, groups)
        except torch.OutOfMemoryError as error:
            tries.append({"rows": rows, "fits": False, "reason": str(error).splitlines()[0]})
        smaller = [r for r in _candidates(request) if r < rows]
        if request.rows or not smaller:
            return result | {"status": "failed", "reason": f"{rows} rows do not fit in memory"}
        rows = smaller[-1]


def _measure_rows(request: Request, rows: int, device: Device, groups: Groups) -> dict[str, Any]:
    with _freed(device):
        config = run_config(request, rows)
        bench = Bench(config, device, groups)
        if request.precision == "fp8" and not bench.fp8_is_on():
            return {"status": "not run", "reason": "precision fp8 left FP8 off in the model's configuration"}
        bench.times(1 if request.dry else WARM_UP)
        if device.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = bench.times(request.steps)
        numbers = _numbers(bench, statistics.median(seconds))
        numbers |= {"rows": rows, "step_seconds_all": seconds, "state_bytes": bench.state_bytes}
        if device.is_cuda:
            numbers["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            numbers["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        else:
            numbers["peak_resident_bytes"] = device.peak_memory()
        return numbers


def _numbers(bench: Bench, seconds: float) -> dict[str, Any]:
    config, counts = bench.config, bench.batch.counts
    assert bench.last is not None
    stats = bench.last.read(0)
    counter = FlopCounter(config, bench.device.name, DTYPES[config.train.precision], 1)
    flops = counter.flops(bench.batch)
    positions = config.train.global_batch_size * config.data.sequence_length
    return {
        "status": "failed" if stats.skipped else "ok",
        **({"reason": "loss or gradient is not finite"} if stats.skipped else {}),
        "sequence_length": config.data.sequence_length,
        "images": counts.images[0],
        "contexts": counts.contexts[0],
        "targets": counts.targets[0],
        "tokens": counts.tokens[0],
        "padding": 1 - counts.tokens[0] / positions,
        "parameters": sum(p.numel() for p in bench.training.model.parameters()),
        "backends": {choice.part: f"{choice.backend} ({choice.reason})" for choice in bench.training.choices},
        "step_seconds": seconds,
        "images_per_second": counts.images[0] / seconds,
        "tokens_per_second": counts.tokens[0] / seconds,
        "model_flops": flops,
        "model_flops_per_second": flops / seconds,
        "mfu": flops / (seconds * counter.peak.flops),
        "mfu_relative_to": f"{counter.peak.flops / 1e12:.4g} TFLOP/s ({counter.peak.source})",
        "last_step": {
            "grad_norm": stats.grad_norm,
            "contrastive": stats.contrastive,
            "generation": stats.generation,
            "scale": stats.scale,
        },
    }


def largest_fit(request: Request, device: Device, groups: Groups, tries: list[dict[str, Any]]) -> int:
    """The largest candidate whose memory, extrapolated from two small ones, leaves some headroom."""
    candidates = _candidates(request)
    peaks: dict[int, int] = {}
    for rows in candidates[:2]:
        try:
            peaks[rows] = _peak(request, rows, device, groups)
        except torch.OutOfMemoryError:
            tries.append({"rows": rows, "fits": False})
            return max(peaks, default=0)
        tries.append({"rows": rows, "fits": True, "peak_allocated_bytes": peaks[rows]})
    small, large = candidates[:2]
    slope = (peaks[large] - peaks[small]) / (large - small)
    free, _ = torch.cuda.mem_get_info()
    room = HEADROOM * (free + torch.cuda.memory_reserved())
    return max((r for r in candidates if peaks[small] + slope * (r - small) <= room), default=large)


def _peak(request: Request, rows: int, device: Device, groups: Groups) -> int:
    with _freed(device):
        torch.cuda.reset_peak_memory_stats()
        Bench(run_config(request, rows), device, groups).times(2)
        return torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def _freed(device: Device) -> Iterator[None]:
    """Give back what an earlier body built. A failed one is held by its traceback until it has been handled."""

    def collect() -> None:
        gc.collect()
        if device.is_cuda:
            torch.cuda.empty_cache()

    collect()
    try:
        yield
    finally:
        collect()


def _candidates(request: Request) -> tuple[int, ...]:
    return CANDIDATES_LONG if _long(request) else CANDIDATES_SHORT


def _long(request: Request) -> bool:
    return load_recipe(request.recipe).data.sequence_length >= LONG_ROWS


def pinned(micro: MicroBatch) -> MicroBatch:
    """The micro-batch in page-locked memory."""
    values: dict[str, Any] = {
        name: value.pin_memory() if isinstance(value, Tensor) else value
        for name, value in micro.__dict__.items()
    }
    return MicroBatch(**values)
