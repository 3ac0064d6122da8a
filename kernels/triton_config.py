"""Launch shapes of the Triton kernels by GPU generation: a table instead of autotuning.

Autotuning would run kernels for minutes at the first step of every new shape and pick by noise, so that
two runs could differ in their last bits. Each entry below compiles without register spills and within
shared memory; the test suite compiles all of them and asserts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lcl_kernels._pair_terms import Precision

Kernel = Literal["sums", "fallback", "gradient", "matmul"]

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
"""Bytes of shared memory a block may have, by the smallest GPU of the generation."""


@dataclass(frozen=True)
class Config:
    """Tile of BM rows x BN columns, BD of the reduced dimension at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = False
    """Tiles move by tensor descriptors (sm_90 and newer), and loops over tiles are flattened."""


_FP16 = {
    80: {
        "sums": Config(128, 128, 64, 8, 3),
        "fallback": Config(128, 128, 64, 8, 3),
        "gradient": Config(128, 128, 64, 8, 3),
    },
    90: {
        # Wider where registers allow: one block per multiprocessor, and a quarter less to read per product.
        "sums": Config(128, 256, 64, 8, 4, tma=True),
        "fallback": Config(128, 128, 64, 8, 3, tma=True),
        "gradient": Config(128, 256, 64, 8, 3, tma=True),
    },
    # Accumulators leave the registers for tensor memory, yet the wide tile spills in the epilogue.
    100: dict.fromkeys(("sums", "fallback", "gradient"), Config(128, 128, 64, 8, 4, tma=True)),
}
# Three tensor-core products per tile and operands twice as wide: smaller tiles for the same registers.
_TF32X3 = {
    80: dict.fromkeys(("sums", "fallback", "gradient", "matmul"), Config(64, 64, 32, 4, 3)),
    90: dict.fromkeys(("sums", "fallback", "gradient"), Config(128, 128, 32, 8, 3))
    | {"matmul": Config(128, 64, 32, 8, 3)},
}
# Plain fp32 multiplies on the CUDA cores.
_FP32 = {80: dict.fromkeys(("sums", "fallback", "gradient", "matmul"), Config(64, 64, 16, 8, 2))}


def config(kernel: Kernel, precision: Precision, capability: int) -> Config:
    """Launch shape for a GPU of compute capability ``capability`` (80, 86, 90, 100, ...).

    Newer generations use the newest entry not above theirs, older ones the oldest.
    """
    table = {"fp16": _FP16, "bf16": _FP16, "tf32x3": _TF32X3, "fp32": _FP32}[precision]
    known = [c for c in table if c <= capability]
    return table[max(known) if known else min(table)][kernel]


INTERPRETER = Config(32, 32, 32, 4, 1, tma=True)
"""Small tiles for the interpreter, so that small tests have many tiles and ragged edges."""
