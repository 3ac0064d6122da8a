"""Builds the emulated GPU, starts programs on it, and reads what its log says.

The real CUDA builds of torch, Triton and Transformer Engine run on a CUDA runtime, driver, cuBLAS, NCCL and NVRTC (the
C++ files beside this one) that take no time and compute nothing. What is real: which kernels are launched, products,
copies, collectives, host waits, the allocator's peak, host time. What is not: values, and how long a GPU takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".cache" / "emulator"
RUNTIME, DRIVER = FOLDER / "libemulator.so", FOLDER / "libcuda.so.1"


def build() -> None:
    """Compile both libraries against the headers of the installed CUDA packages; done again when a source changed."""
    sources = {RUNTIME: ("runtime.cpp", "blas.cpp", "collectives.cpp", "compiler.cpp"), DRIVER: ("driver.cpp",)}
    newest = max(path.stat().st_mtime for path in HERE.iterdir() if path.suffix in (".cpp", ".h"))
    import torch

    packages = Path(torch.__file__).parents[1] / "nvidia"
    include = [packages / "cu13" / "include", packages / "cu13" / "include" / "cccl", packages / "nccl" / "include"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for library, files in sources.items():
        if library.exists() and library.stat().st_mtime > newest:
            continue
        words = ["g++", "-shared", "-fPIC", "-O1", "-std=c++17", "-Wall", "-Wextra", "-Wno-unused-parameter"]
        words += [f"-I{folder}" for folder in include] + [f"-Wl,-soname,{library.name}", "-o", str(library)]
        subprocess.run([*words, *(str(HERE / name) for name in files), "-ldl"], check=True)


def environment(log: Path, devices: int = 1) -> dict[str, str]:
    """In which a program sees so many "NVIDIA H100 80GB HBM3"; rank R's log is `log.R`."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "EMULATOR_LOG": str(log),
        "EMULATOR_DEVICES": str(devices),
        "LD_PRELOAD": str(RUNTIME),
        "LD_LIBRARY_PATH": os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
        "TRITON_LIBCUDA_PATH": str(FOLDER),
        "TRITON_CACHE_DIR": str(FOLDER / "triton"),
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONWARNINGS": "ignore",
    }


def run(log: Path, *words: str, ranks: int = 1, seconds: float = 900, **more: str) -> str:
    """Start a script of Python on the emulated GPU, by torchrun where there are several ranks.

    Returns:
        What it printed.
    """
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*start, *words],
        cwd=ROOT,
        env=environment(log, ranks) | more,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, (
        f"{' '.join(words)}: exit status {done.returncode}\n{(done.stdout + done.stderr)[-6000:]}"
    )
    return done.stdout


@dataclass
class Counts:
    """What one stretch of a log holds.

    Attributes:
        numbers: launches, products, copies, fills, collectives by name, ...: what may not grow.
        waits: what made the host wait for the device.
        communicated: bytes by collective.
    """

    numbers: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    communicated: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, fields: list[str], *, may_wait: bool) -> None:
        """Count one line; `may_wait` threads prepare data or write checkpoints."""
        if kind == "L":
            self.numbers["launches"] += 1
        elif kind == "G":
            self.numbers["graph launches"] += 1
        elif kind == "P":
            self.numbers["products"] += 1
        elif kind == "Z":
            self.numbers["fills"] += 1
        elif (
            kind in "AH" and not may_wait
        ):  # the allocator's cache has no room: cudaMalloc and cudaHostAlloc wait for the device
            self.waits["cudaMalloc" if kind == "A" else "cudaHostAlloc"] += 1
        elif kind == "S" and not may_wait:
            self.waits[fields[0]] += 1
        elif kind == "N":
            self.numbers[f"{fields[0]} of {fields[1]}"] += 1
            self.communicated[f"{fields[0]} of {fields[1]}"] += int(fields[2])
        elif kind == "C":
            how, ways = fields[:2]
            self.numbers[f"copies {ways}"] += 1
            # From and to memory that is not pinned a copy is no faster than the device, whatever the call is named.
            if not may_wait and ways != "device>device" and (how == "sync" or "pageable" in ways):
                self.waits[f"copy {ways}"] += 1


def read(log: Path, rank: int = 0) -> Iterator[tuple[str, Counts]]:
    """The stretches that begin with a mark, by its name; a mark "end" ends one."""
    name, counts = "", Counts()
    for line in log.with_name(f"{log.name}.{rank}").read_text(encoding="utf-8", errors="replace").splitlines():
        kind, *fields = line.split(" ")
        if kind == "M":
            if name:
                yield name, counts
            name, counts = "" if line == "M end" else line[2:], Counts()
        elif name:
            counts.add(kind.removeprefix("~"), fields, may_wait=kind.startswith("~"))
