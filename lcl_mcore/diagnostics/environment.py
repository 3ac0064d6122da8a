"""What a measurement was taken with: hardware, driver, versions, and the rates that the hardware reaches.

python -m lcl_mcore.diagnostics.environment            # one JSON object
python -m lcl_mcore.diagnostics.environment --rates    # matrix products and memory, measured
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from lcl_mcore import optional_packages as probe
from lcl_mcore.distributed.device import cpu_name
from lcl_mcore.hardware import measured_peak, peak_flops


def describe() -> dict[str, Any]:
    """Device, driver and versions as plain JSON; what is missing carries its reason."""
    probes = {
        p.name: {"usable": p.usable, "version": p.version, "reason": p.reason} for p in probe.all_probes()
    }
    return {
        "gpu": _gpu() if torch.cuda.is_available() else None,
        "host": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average": os.getloadavg()[0],
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
            "megatron-core": probe.megatron_version(),
        },
        "optional": probes,
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        **_from_driver(),
    }


def _from_driver() -> dict[str, Any]:
    """What only `nvidia-smi` knows."""
    fields = ("driver_version", "power.limit", "clocks.max.sm")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"driver": None, "driver_reason": f"nvidia-smi: {error}"}
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return dict(zip(("driver", "power_limit", "max_clock"), values, strict=False))


def rates() -> dict[str, Any]:
    """FLOP/s of large matrix products in each precision, and bytes/s of a copy; missing ones say why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 512
    result: dict[str, Any] = {"status": "ok", "dry": device == "cpu", "size": size}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        result[name] = {"flops_per_second": measured_peak(device, dtype, size, repeats=10).flops}
    result["fp8"] = _fp8_rate(size) if device == "cuda" else {"reason": "FP8 needs a GPU"}
    source = torch.empty(size * size * 4, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device)
    result["copy"] = {"bytes_per_second": 2 * source.numel() / seconds}
    sheet = peak_flops(torch.cuda.get_device_name(), "bf16") if device == "cuda" else None
    result["data_sheet_bf16"] = sheet.flops if sheet else None
    return result


def _fp8_rate(size: int) -> dict[str, Any]:
    """torch's own scaled product, without Transformer Engine."""
    if torch.cuda.get_device_capability() < (8, 9):
        return {"reason": "needs compute capability 8.9 or newer"}
    try:
        a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device="cuda")
        product: Any = torch._scaled_mm
        seconds = _best(lambda: product(a, b.T, one, one, out_dtype=torch.bfloat16), "cuda")
    except (RuntimeError, TypeError, AttributeError) as error:
        return {"reason": f"torch._scaled_mm: {str(error).splitlines()[0]}"}
    return {"flops_per_second": 2 * size**3 / seconds, "by": "torch._scaled_mm, one scale per tensor"}


def _best(function: Callable[[], object], device: str, repeats: int = 10) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    print(json.dumps(rates() if "--rates" in sys.argv else describe()))
