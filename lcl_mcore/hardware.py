"""GPUs as their data sheets give them, and the matmul rate that a device at hand reaches.

The one table that MFU, the planner and the reports read. Importing it needs no torch.
"""

from __future__ import annotations

import difflib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcl_mcore.errors import ConfigError, explain

if TYPE_CHECKING:
    import torch

    from lcl_mcore.distributed.device import Device

TERA, GB, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Gpu:
    """Matmul rates of one GPU, dense (figures "with sparsity" are halved).

    Attributes:
        name: what the name that the driver reports must contain as a word.
        fp32: TFLOP/s without tensor cores.
        bf16: TFLOP/s with tensor cores.
        fp8: TFLOP/s with tensor cores, None if it has no FP8.
    """

    name: str
    fp32: float
    bf16: float
    fp8: float | None

    def matmul(self, precision: str) -> float | None:
        """FLOP/s in "fp32", "bf16" or "fp8"; None if it cannot."""
        rates = {"fp32": self.fp32, "bf16": self.bf16, "fp8": self.fp8}
        rate = rates[precision]
        return None if rate is None else rate * TERA


@dataclass(frozen=True)
class NodeGpu(Gpu):
    """A GPU of a node of eight whose memory and links are known as well: what the planner plans for.

    Attributes:
        memory: usable bytes, as the driver reports them.
        bandwidth: bytes/s of its memory.
        node: bytes/s in one direction to the other GPUs of the node.
        network: bytes/s in one direction to other nodes: this GPU's share of the node's adapters.
    """

    memory: float
    bandwidth: float
    node: float
    network: float


# From NVIDIA's data sheets of each product. Links: SXM forms, network of the DGX generation, 8 x 200 Gb/s (A100) or
# 8 x 400 Gb/s (later). The first name that fits a device counts, so special forms stand before general ones.
TABLE: tuple[Gpu, ...] = (
    Gpu("GB300", 80.0, 2500.0, 5000.0),
    Gpu("B300", 75.0, 2250.0, 4500.0),
    Gpu("GB200", 80.0, 2500.0, 5000.0),
    NodeGpu("B200", 75.0, 2250.0, 4500.0, memory=178 * GIB, bandwidth=8000 * GB, node=900 * GB, network=50 * GB),
    Gpu("H200 NVL", 60.0, 835.5, 1671.0),
    Gpu("GH200", 67.0, 989.4, 1978.9),
    NodeGpu("H200", 67.0, 989.4, 1978.9, memory=139 * GIB, bandwidth=4800 * GB, node=450 * GB, network=50 * GB),
    Gpu("H100 PCIe", 51.0, 756.5, 1513.0),
    Gpu("H100 NVL", 60.0, 835.5, 1671.0),
    NodeGpu("H100", 67.0, 989.4, 1978.9, memory=79 * GIB, bandwidth=3350 * GB, node=450 * GB, network=50 * GB),
    Gpu("H800 PCIe", 51.0, 756.5, 1513.0),
    NodeGpu("H800", 67.0, 989.4, 1978.9, memory=79 * GIB, bandwidth=3350 * GB, node=200 * GB, network=50 * GB),
    NodeGpu("H20", 44.0, 148.0, 296.0, memory=95 * GIB, bandwidth=4000 * GB, node=450 * GB, network=50 * GB),
    NodeGpu("A100", 19.5, 312.0, None, memory=79 * GIB, bandwidth=2039 * GB, node=300 * GB, network=25 * GB),
    NodeGpu("A800", 19.5, 312.0, None, memory=79 * GIB, bandwidth=2039 * GB, node=200 * GB, network=25 * GB),
    Gpu("A40", 37.4, 149.7, None),
    Gpu("A30", 10.3, 165.0, None),
    Gpu("A10", 31.2, 125.0, None),
    Gpu("L40S", 91.6, 362.1, 733.0),
    Gpu("L40", 90.5, 181.1, 362.1),
    Gpu("L4", 30.3, 121.0, 242.5),
    Gpu("RTX 4090", 82.6, 165.2, 330.3),
    Gpu("RTX 3090", 35.6, 71.2, None),
)


def find_gpu(name: str) -> NodeGpu:
    """The GPU to plan for.

    Args:
        name: as in the table, in any case.

    Raises:
        ConfigError: it is not in the table, or only its matmul rates are.
    """
    known = {gpu.name.lower(): gpu for gpu in TABLE if isinstance(gpu, NodeGpu)}
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(
            explain(
                f"--gpu {name}",
                "the table of lcl_mcore.hardware has no memory and links of this GPU",
                f"{hint}Known: {', '.join(sorted(known))}.",
            )
        )
    return known[name.lower()]


@dataclass(frozen=True)
class Peak:
    """The rate that MFU is relative to: FLOP/s of one device, and where the number comes from."""

    flops: float
    source: str


def peak_flops(device_name: str, precision: str) -> Peak | None:
    """Data-sheet rate of a GPU.

    Args:
        device_name: as the driver reports it, for example "NVIDIA H100 80GB HBM3".
        precision: "fp32", "bf16" or "fp8".

    Returns:
        None for an unknown device or a precision that it does not have.
    """
    for gpu in TABLE:
        rate = gpu.matmul(precision)
        if rate is not None and re.search(rf"\b{gpu.name}\b", device_name):
            return Peak(rate, f"data sheet of {gpu.name}, {precision}, dense")
    return None


def measured_peak(device: Device, dtype: torch.dtype, size: int | None = None, repeats: int = 5) -> Peak:
    """The best rate of a few square matmuls, well below a second on a CPU.

    Args:
        size: rows and columns [4096 on CUDA, 1024 on a CPU].
    """
    import torch

    size = size or (4096 if device.is_cuda else 1024)
    a, b = (torch.randn(size, size).to(device.device, dtype) for _ in range(2))
    seconds = best_seconds(lambda: torch.mm(a, b), device, repeats)
    name = str(dtype).removeprefix("torch.")
    return Peak(2.0 * size**3 / seconds, f"measured, {name} matmuls of {size} x {size}")


def best_seconds(function: Callable[[], object], device: Device, repeats: int) -> float:
    """Seconds of the fastest of several calls, after one more to warm up."""
    best = math.inf
    for _ in range(repeats + 1):
        device.synchronize()
        started = time.perf_counter()
        function()
        device.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
