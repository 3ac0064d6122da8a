"""The environment report: hardware, driver, versions and commit that something was measured or run with.

python -m lcl_mcore.diagnostics.environment            # one JSON object
python -m lcl_mcore.diagnostics.environment --rates    # matmuls and memory, measured

Importing it needs the standard library alone, so that the doctor can still speak when torch is broken.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcl_mcore.distributed.device import Device

DRIVER_MODULE = Path("/proc/driver/nvidia/version")


def describe() -> dict[str, Any]:
    """Device, driver, versions and optional packages as plain JSON; what is missing carries its reason.

    `gpu` describes the first one and counts all, or is None.
    """
    from lcl_mcore.optional_packages import all_probes

    found = gpus()
    return {
        "gpu": {**found[0], "count": len(found), **driver()} if found else None,
        "host": host(),
        "versions": versions(),
        "optional": {p.name: {"usable": p.usable, "version": p.version, "reason": p.reason} for p in all_probes()},
        "source": source_commit(),
    }


def host() -> dict[str, Any]:
    """CPU, memory, load and operating system."""
    from lcl_mcore.distributed.device import cpu_name

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability, memory and multiprocessors of every GPU that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    seen = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
        }
        for gpu in seen
    ]


def driver() -> dict[str, Any]:
    """NVIDIA's driver, and the power limit and clock of the first GPU if `nvidia-smi` tells."""
    fields = ("driver_version", "power.limit", "clocks.max.sm")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        loaded = DRIVER_MODULE.read_text().splitlines()[0] if DRIVER_MODULE.exists() else None
        return {"driver": loaded, "driver_reason": f"nvidia-smi: {error}"}
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return dict(zip(("driver", "power_limit", "max_clock"), values, strict=False))


def versions() -> dict[str, str | int | None]:
    """Versions of Python, torch, what torch was built with, and megatron-core; None for what is not there."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "megatron-core": package_version("megatron-core"),
    }


def package_version(distribution: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_commit() -> dict[str, Any]:
    """The git commit of this checkout, and whether tracked files differ from it: `commit` and `dirty`.

    Both are None outside a checkout, with the `reason`.
    """

    def git(*words: str) -> str | None:
        command, folder = ["git", *words], Path(__file__).resolve().parent
        try:
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return run.stdout.strip()

    head = git("rev-parse", "HEAD") if git("ls-files", Path(__file__).name) else None
    if head is None:
        return {"commit": None, "dirty": None, "reason": "not a git checkout"}
    return {"commit": head, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def rates() -> dict[str, Any]:
    """FLOP/s of large matmuls in each precision, and bytes/s of a copy, measured; missing ones say why."""
    import torch

    from lcl_mcore.distributed.device import pick_device
    from lcl_mcore.hardware import best_seconds, measured_peak, peak_flops

    device, found, repeats = pick_device(), gpus(), 10
    size = 8192 if found else 512
    result: dict[str, Any] = {"status": "ok", "dry": not found, "size": size}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        result[name] = {"flops_per_second": measured_peak(device, dtype, size, repeats).flops}
    if not found:
        result["fp8"] = {"reason": "FP8 needs a GPU"}
    elif tuple(map(int, found[0]["capability"].split("."))) < (8, 9):
        result["fp8"] = {"reason": "needs compute capability 8.9 or newer"}
    else:
        result["fp8"] = _fp8_rate(device, size, repeats)
    source = torch.empty(size * size * 4, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device, repeats)
    result["copy"] = {"bytes_per_second": 2 * source.numel() / seconds}
    sheet = peak_flops(device.name, "bf16")
    result["data_sheet_bf16"] = sheet.flops if sheet else None
    return result


def _fp8_rate(device: Device, size: int, repeats: int) -> dict[str, Any]:
    """torch's own scaled matmul, without Transformer Engine."""
    import torch

    from lcl_mcore.hardware import best_seconds

    matmul: Any = torch._scaled_mm
    try:
        a, b = (torch.randn(size, size, device=device.device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device.device)
        seconds = best_seconds(lambda: matmul(a, b.T, one, one, out_dtype=torch.bfloat16), device, repeats)
    except (RuntimeError, TypeError, AttributeError) as error:
        return {"reason": f"torch._scaled_mm: {str(error).splitlines()[0]}"}
    return {"flops_per_second": 2 * size**3 / seconds, "by": "torch._scaled_mm, one scale per tensor"}


if __name__ == "__main__":
    print(json.dumps(rates() if "--rates" in sys.argv else describe()))
