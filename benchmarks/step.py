"""Time, memory and MFU of a recipe's whole training step on one device, from full synthetic sequences.

    python benchmarks/step.py --recipe paper-l14 --precision bf16 --steps 20
    python benchmarks/step.py --recipe released-b16-laion --precision bf16 --micro-batch-size 64 --micro-batches 2

Model, losses, gradient buffers and optimizer are those of training (`lcl_mcore.train_step`); only the data engine does
not run. Without `--micro-batch-size` the largest micro-batch that fits in the GPU's memory is used. On a CPU, or with
`--dry`, the model is cut down to two narrow layers: that checks the code, its numbers mean nothing.

Model FLOPs are counted by `lcl_mcore.models.flops`: matmuls that the model needs, without recompute. One device has its
own micro-batches as negatives only, so the contrastive loss costs less than in a large job: `benchmarks/contrastive.py`
measures it at its full size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lcl_mcore import optional_packages as probe
from lcl_mcore.batch import StepBatch
from lcl_mcore.build import build_training
from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.recipes import RECIPES, load_recipe
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.synthetic import synthetic_step
from lcl_mcore.distributed.context import detached
from lcl_mcore.distributed.device import Device, init_process_group, pick_device
from lcl_mcore.distributed.groups import Groups, make_groups
from lcl_mcore.metrics import StepOutput
from lcl_mcore.models.flops import MfuMeter, batch_flops
from lcl_mcore.models.transformer_config import DTYPES

# Micro-batch sizes that are tried on a GPU, by the length of a sequence.
LONG_SEQUENCE, SIZES_LONG = 1024, (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
SIZES_SHORT = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768)
WARM_UP = 3
HEADROOM = 0.92
"""Share of the free memory that a prediction may use: the allocator needs some, and fragments."""


@dataclass(frozen=True)
class StepSettings:
    """What to measure.

    Attributes:
        recipe: name of a recipe.
        precision: arithmetic of the towers.
        micro_batch_size: sequences of a micro-batch; 0: the most that fit (on a CPU: a few).
        steps: steps that are timed.
        micro_batches: micro-batches of one step.
        recompute: of both towers, see `config.run.ParallelConfig`.
        backend: of the layers.
        dry: cut width and depth down, for a check of the code without a GPU.
    """

    recipe: str
    precision: Literal["fp32", "bf16", "fp8"]
    micro_batch_size: int = 0
    steps: int = 10
    micro_batches: int = 1
    recompute: str = "none"
    backend: Literal["auto", "torch", "te"] = "auto"
    dry: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Micro-batch sizes that are tried."""
        long = load_recipe(self.recipe).data.sequence_length >= LONG_SEQUENCE
        return SIZES_LONG if long else SIZES_SHORT

    def config(self, micro_batch_size: int) -> RunConfig:
        """The recipe's configuration with the sizes of this measurement."""
        config = load_recipe(self.recipe)
        config = narrow_towers(config) if self.dry else config
        train = replace(
            config.train,
            micro_batch_size=micro_batch_size,
            global_batch_size=micro_batch_size * self.micro_batches,
            precision=self.precision,
            backend=self.backend,
        )
        parallel = replace(
            config.parallel,
            tensor_parallel_size=1,
            sequence_parallel=False,
            recompute_vision=self.recompute,
            recompute_language=self.recompute,
        )
        return replace(config, train=train, parallel=parallel)


def narrow_towers(config: RunConfig) -> RunConfig:
    """The recipe with towers of two narrow layers; sequences, images and vocabulary keep their sizes."""
    model = config.model
    small: dict[str, Any] = {"width": 64, "layers": 2, "heads": 4, "mlp_width": 128}
    return replace(
        config,
        model=replace(
            model, vision=replace(model.vision, **small), language=replace(model.language, **small), pool_heads=4
        ),
    )


def why_not(settings: StepSettings, device: Device) -> str | None:
    """Why this precision cannot be measured here, or None."""
    if settings.precision != "fp8":
        return None
    if not device.is_cuda:
        return "FP8 needs a GPU of compute capability 8.9 or newer, and this is a CPU"
    if torch.cuda.get_device_capability() < (8, 9):
        return f"FP8 needs compute capability 8.9 or newer; {device.name} has less"
    te = probe.transformer_engine()
    if not te.usable:
        return f"FP8 layers come from Transformer Engine, which cannot be used: {te.reason}"
    return None


class TimedStep:
    """The training step of one configuration, built, with a synthetic batch."""

    def __init__(self, config: RunConfig, device: Device, groups: Groups, batch: StepBatch | None = None) -> None:
        self.config, self.device = config, device
        self.memory_before = torch.cuda.memory_allocated() if device.is_cuda else 0
        self.training = build_training(config, detached(device, groups))
        self.state_bytes = torch.cuda.memory_allocated() - self.memory_before if device.is_cuda else None
        self.batch = batch or synthetic_step(config, groups.dp.size())  # the same on every data-parallel rank
        if device.is_cuda:
            pinned = tuple(micro.pin_memory() for micro in self.batch.micro_batches)
            self.batch = replace(self.batch, micro_batches=pinned)
        self.done = 0
        self.last: StepOutput | None = None

    def run(self) -> None:
        """One optimizer step, queued but not waited for; the learning rate is that of a warm-up."""
        self.last = self.training.step.run(self.done, self.batch, 1e-6)
        self.done += 1

    def times(self, count: int) -> list[float]:
        """Seconds of `count` consecutive steps. On CUDA the host runs ahead, as in training."""
        if not self.device.is_cuda:
            marks = [time.perf_counter()]
            for _ in range(count):
                self.run()
                marks.append(time.perf_counter())
            return [b - a for a, b in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            self.run()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]

    def fp8_is_on(self) -> bool:
        """Whether the towers really multiply in FP8."""
        return bool(getattr(self.training.model.config, "fp8", None))


def measure(settings: StepSettings) -> dict[str, Any]:
    """Carry the measurement out in this process.

    Returns:
        Plain JSON, whose `status` is "ok", "not run" (with `reason`) or "failed" (with `reason`).
    """
    device = pick_device()
    result: dict[str, Any] = {**dataclasses.asdict(settings), "device": device.name, "status": "not run"}
    reason = why_not(settings, device)
    if reason:
        return result | {"reason": reason}
    if not torch.distributed.is_initialized():
        init_process_group(device, 120)
    groups = make_groups(1, 1, 120, 0)
    tries: list[dict[str, Any]] = []
    result["tries"] = tries
    size = settings.micro_batch_size or (1 if settings.sizes is SIZES_LONG else 4)
    if not settings.micro_batch_size and device.is_cuda:
        size = largest_fit(settings, device, groups, tries)
    if size == 0:
        return result | {"status": "failed", "reason": "not even the smallest micro-batch fits in memory"}
    while True:
        try:
            return result | measure_size(settings, size, device, groups)
        except torch.OutOfMemoryError as error:
            tries.append({"micro_batch_size": size, "fits": False, "reason": str(error).splitlines()[0]})
        smaller = [s for s in settings.sizes if s < size]
        if settings.micro_batch_size or not smaller:
            return result | {"status": "failed", "reason": f"{size} sequences do not fit in memory"}
        size = smaller[-1]


def measure_size(settings: StepSettings, size: int, device: Device, groups: Groups) -> dict[str, Any]:
    """Build the step with micro-batches of `size` sequences, warm up, time."""
    with freed(device):
        timed = TimedStep(settings.config(size), device, groups)
        if settings.precision == "fp8" and not timed.fp8_is_on():
            return {"status": "not run", "reason": "precision fp8 left FP8 off in the model's configuration"}
        timed.times(1 if settings.dry else WARM_UP)
        if device.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = timed.times(settings.steps)
        numbers = figures(timed, statistics.median(seconds))
        numbers |= {"micro_batch_size": size, "step_seconds_all": seconds, "state_bytes": timed.state_bytes}
        if device.is_cuda:
            numbers["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            numbers["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        else:
            numbers["peak_resident_bytes"] = device.peak_memory()
        return numbers


def figures(timed: TimedStep, seconds: float) -> dict[str, Any]:
    """What a step of this length says about speed, and the last step's losses."""
    config, counts = timed.config, timed.batch.counts
    assert timed.last is not None
    stats = timed.last.read(timed.done - 1)
    meter = MfuMeter(config, timed.device, DTYPES[config.train.precision], 1)
    flops = batch_flops(config, timed.batch)
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
        "parameters": sum(p.numel() for p in timed.training.model.parameters()),
        "backends": {choice.part: f"{choice.backend} ({choice.reason})" for choice in timed.training.choices},
        "step_seconds": seconds,
        "images_per_second": counts.images[0] / seconds,
        "tokens_per_second": counts.tokens[0] / seconds,
        "model_flops": flops,
        "model_flops_per_second": flops / seconds,
        "mfu": flops / (seconds * meter.peak.flops),
        "mfu_relative_to": f"{meter.peak.flops / 1e12:.4g} TFLOP/s ({meter.peak.source})",
        "last_step": {
            "grad_norm": stats.grad_norm,
            "contrastive": stats.contrastive,
            "generation": stats.generation,
            "scale": stats.scale,
        },
    }


def largest_fit(settings: StepSettings, device: Device, groups: Groups, tries: list[dict[str, Any]]) -> int:
    """The largest size whose memory, extrapolated from two small ones, leaves some headroom; 0 if none fits."""
    peaks: dict[int, int] = {}
    for size in settings.sizes[:2]:
        try:
            peaks[size] = peak_of(settings, size, device, groups)
        except torch.OutOfMemoryError:
            tries.append({"micro_batch_size": size, "fits": False})
            return max(peaks, default=0)
        tries.append({"micro_batch_size": size, "fits": True, "peak_allocated_bytes": peaks[size]})
    small, large = settings.sizes[:2]
    slope = (peaks[large] - peaks[small]) / (large - small)
    free, _ = torch.cuda.mem_get_info()
    room = HEADROOM * (free + torch.cuda.memory_reserved())
    return max((s for s in settings.sizes if peaks[small] + slope * (s - small) <= room), default=large)


def peak_of(settings: StepSettings, size: int, device: Device, groups: Groups) -> int:
    """Peak bytes of the allocator over two steps."""
    with freed(device):
        torch.cuda.reset_peak_memory_stats()
        TimedStep(settings.config(size), device, groups).times(2)
        return torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def freed(device: Device) -> Iterator[None]:
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


def main() -> int:
    """Parse the command line, measure, print one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=tuple(RECIPES), required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8"), default="bf16")
    parser.add_argument("--micro-batch-size", "--rows", type=int, default=0, help="sequences; 0: the most that fit")
    parser.add_argument("--micro-batches", type=int, default=1, help="of one step; more than 1: a feature pass as well")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--backend", choices=("auto", "torch", "te"), default="auto", help="layers")
    parser.add_argument("--dry", action="store_true", help="cut the model down (always on a CPU)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    values = {name: value for name, value in vars(args).items() if name != "out"}
    values["dry"] |= not torch.cuda.is_available()
    result = measure(StepSettings(**values))
    text = json.dumps(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if result["status"] == "failed" else 0


if __name__ == "__main__":
    run_main(main)
