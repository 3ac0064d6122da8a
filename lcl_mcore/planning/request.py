"""The command line of the planner."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from lcl_mcore.config.base import require
from lcl_mcore.config.cli import Flags, resolve
from lcl_mcore.config.run import RunConfig
from lcl_mcore.planning.hardware import Assumptions


@dataclass(frozen=True)
class Request:
    """Predict memory, speed, communication and cost of a job without a GPU."""

    gpus: int
    """Processes of the job, one per GPU."""
    gpu: str = "h100"
    """a100, a800, h100, h800, h20, h200 or b200 (SXM, 8 a node)."""
    recipe: str | None = None
    """Named recipe. Exactly one of --recipe and --config is needed."""
    config: Path | None = None
    """Configuration file, for example of an earlier run."""

    tp: int | None = None
    """Tensor-parallel size; this and the next ones as for training."""
    pp: int | None = None
    """Pipeline stages."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks."""
    vision_parallel: Literal["auto", "tensor", "data"] | None = None
    """The ViT over tensor-parallel ranks."""
    recompute_vision: str | None = None
    """none, selective, full or block:N."""
    recompute_language: str | None = None
    """The same for the LM."""
    micro_batch_size: int | None = None
    """Rows per forward pass."""
    global_batch_size: int | None = None
    """Rows per step."""
    steps: int | None = None
    """Optimizer steps of the whole run."""
    precision: Literal["fp32", "bf16"] | None = None
    """Arithmetic of the towers."""
    set: tuple[str, ...] = ()
    """Any other knob: model.vision.layers=6."""

    node_busbw: float | None = None
    """Bus bandwidth within a node as nccl-tests reports it, GB/s (default: 80 % of the data sheet's)."""
    network_busbw: float | None = None
    """Bus bandwidth between nodes per GPU, GB/s (default: 80 % of the GPU's share of the adapters)."""
    product_efficiency: float = Assumptions.products
    """Share of the matrix rate that matrix products reach."""
    memory_efficiency: float = Assumptions.memory
    """Share of the memory bandwidth that other operators reach."""
    launch_us: float = Assumptions.launch * 1e6
    """Microseconds of host time per operator."""
    storage_gbs: float = 5.0
    """GB/s at which the whole job writes a checkpoint."""
    image_kb: float = 60.0
    """Average size of a stored image, in kB."""
    decodes_per_second: float = 250.0
    """Images that one CPU core reads, decodes and crops in a second (benchmarks/README.md: 249 here)."""
    mtbf_hours: float | None = None
    """Mean time between failures of the whole job (default: Llama 3's rate per GPU)."""
    restart_minutes: float = 5.0
    """From a failure to training again."""
    price_per_gpu_hour: float | None = None
    """In any currency."""
    search: Literal["none", "quick", "wide"] = "quick"
    """Other layouts to compare: a few, or every mesh within a node with all recompute choices."""
    json: bool = False
    """Machine-readable, on the standard output."""
    out: Path | None = None
    """Also write PATH.txt and PATH.json, with command, commit and date."""


def parse(arguments: list[str] | None = None) -> Request:
    """Read the command line; exits with a message on a mistake."""
    return tyro.cli(Request, args=arguments)


def run_config(request: Request) -> RunConfig:
    """The training configuration that the same flags give.

    Raises:
        ConfigError: a value or combination is refused.
    """
    training = {field.name for field in fields(Flags)} & {field.name for field in fields(Request)}
    config = resolve(Flags(**{name: getattr(request, name) for name in training}))
    require(
        config.train.precision != "fp8",
        "train.precision = fp8",
        "Transformer Engine's layers cannot be counted without a GPU",
        "Plan with --precision bf16: memory is about the same, matrix products take longer.",
    )
    return config


def assumptions(request: Request) -> Assumptions:
    """What the request says about efficiencies."""
    return Assumptions(
        products=request.product_efficiency,
        memory=request.memory_efficiency,
        launch=request.launch_us * 1e-6,
    )
