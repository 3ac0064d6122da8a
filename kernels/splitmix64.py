"""splitmix64 (Steele, Lea and Flood, OOPSLA 2014) on tensors: integers that depend on a key and a counter alone."""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Shifts and factors of the finaliser."""


def signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def mix(x: Tensor) -> Tensor:
    """The finaliser on int64: wrapping products, logical shifts."""
    for shift, factor in MIXERS:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))
