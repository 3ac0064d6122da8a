"""Counter-based randomness: every mask is a function of (seed, step, place, identity), of nothing else.

There is no generator state to save, restore or replay. The masks are the same for every tensor-,
sequence-, data- and pipeline-parallel layout, under activation recompute, and in the second pass of
the exact micro-batch contrastive loss.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1


def key_of(*parts: int | str) -> int:
    """A 63-bit key from integers and strings, stable across processes and platforms."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 (wrapping products, logical shifts)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    value &= _MASK_64
    return value - (1 << 64) if value >= 1 << 63 else value


def uniform(keys: Tensor, seed: int) -> Tensor:
    """One number in [0, 1) per key. keys [n] int64 on any device -> [n] fp32."""
    mixed = _mix(_mix(keys + _signed(seed)) + _signed(0x9E3779B97F4A7C15))
    return ((mixed >> 40) & ((1 << 24) - 1)).float() * 2.0**-24


def row_keep_mask(
    row_keys: tuple[int, ...], seed: int, p: float, row_length: int, width: int, start: int, stop: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Dropout keep mask of positions [start, stop) of rows laid end to end: [stop - start, width] bool.

    Each row draws from a generator of its own key, so a row has the same mask wherever it is computed.
    """
    first, last = start // row_length, (stop - 1) // row_length
    masks = []
    for row in range(first, last + 1):
        generator = torch.Generator(device).manual_seed(key_of(seed, row_keys[row]))
        masks.append(torch.rand(row_length, width, generator=generator, device=device) >= p)
    whole = torch.cat(masks) if len(masks) > 1 else masks[0]
    return whole[start - first * row_length : stop - first * row_length]
