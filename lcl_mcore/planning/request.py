"""What a plan is made for, and what it assumes. Imports nothing heavy: the command line is read from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from lcl_mcore.config.base import config_dataclass, require
from lcl_mcore.config.schema import RunConfig

Efficiency = Annotated[float, Field(gt=0, le=1)]


LAUNCH_SOURCE = (
    "counted on an H100 that computes nothing: 39,507 operators of a paper-l14 step in 862 ms of one core of a Xeon; "
    "other hosts differ"
)
"""Where the default of `Assumptions.launch` comes from."""


@dataclass(frozen=True)
class Assumptions:
    """What data sheets do not say. None of it was measured on the GPU in question unless you did.

    Attributes:
        matmul, attention: share of the dense matmul rate that matmuls and attention kernels reach.
        memory: share of the memory's bandwidth that all other operators reach.
        links: share of the links' bandwidth that large collectives reach.
        launch: seconds of host time per operator, see `LAUNCH_SOURCE`.
        node_latency, network_latency: seconds per doubling of a group.
        headroom: share of the memory that tensors may fill; the rest is for kernels' workspaces, NCCL's buffers and
            fragmentation.
        gpus_per_node: 8 in every machine of the table.
    """

    matmul: float = 0.6
    attention: float = 0.4
    memory: float = 0.75
    links: float = 0.8
    launch: float = 22e-6
    node_latency: float = 5e-6
    network_latency: float = 15e-6
    headroom: float = 0.92
    gpus_per_node: int = 8


@config_dataclass
class PlanRequest:
    """A job and the machine that it would run on."""

    gpus: PositiveInt
    """Processes of the job, one per GPU."""
    gpu: str = "h100"
    """a100, a800, h100, h800, h20, h200 or b200 (SXM, 8 a node)."""
    search: Literal["none", "quick", "wide"] = "quick"
    """Other layouts to compare: a few, or every mesh within a node with all recompute choices."""
    node_busbw: PositiveFloat | None = None
    """Bus bandwidth within a node as nccl-tests reports it, GB/s; by default 80 % of the data sheet's."""
    network_busbw: PositiveFloat | None = None
    """Bus bandwidth between nodes per GPU, GB/s; by default 80 % of the GPU's share of the adapters."""
    matmul_efficiency: Annotated[Efficiency, tyro.conf.arg(aliases=("--product-efficiency",))] = Assumptions.matmul
    """Share of the matrix rate that matmuls reach."""
    memory_efficiency: Efficiency = Assumptions.memory
    """Share of the memory bandwidth that other operators reach."""
    launch_us: NonNegativeFloat = Assumptions.launch * 1e6
    """Microseconds of host time per operator."""
    storage_gbs: PositiveFloat = 5.0
    """GB/s at which the whole job writes a checkpoint."""
    image_kb: PositiveFloat = 60.0
    """Average size of a stored image, in kB."""
    decodes_per_second: PositiveFloat = 250.0
    """Images that one CPU core reads, decodes and crops in a second (benchmarks/README.md: 249 here)."""
    mtbf_hours: PositiveFloat | None = None
    """Mean time between failures of the whole job; by default Llama 3's rate per GPU."""
    restart_minutes: NonNegativeFloat = 5.0
    """From a failure to training again."""
    price_per_gpu_hour: NonNegativeFloat | None = None
    """In any currency; without it no cost is given."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()

    def __post_init__(self) -> None:
        require(
            self.run.train.precision != "fp8",
            "train.precision = fp8",
            "Transformer Engine's layers cannot be counted without a GPU",
            "Plan with --precision bf16: memory is about the same, matmuls take longer.",
        )

    @property
    def assumptions(self) -> Assumptions:
        """What the request says about efficiencies."""
        return Assumptions(matmul=self.matmul_efficiency, memory=self.memory_efficiency, launch=self.launch_us * 1e-6)
