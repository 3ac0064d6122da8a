"""Counter-based randomness: every draw is a function of names and numbers, of nothing else.

There is no generator state to save, restore or replay. Masks, crops and the order of documents are the same for every
tensor-, sequence-, data- and pipeline-parallel layout, under activation recompute, and in the second forward pass of
GradCache.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from lcl_kernels.splitmix64 import GOLDEN, MIXERS, mix, signed
from torch import Tensor

Part = int | str
_MASK_64 = (1 << 64) - 1


def key64(*parts: Part) -> int:
    """64 pseudo-random bits that depend on the given parts, their types and their order."""
    content = bytearray()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else b"%d" % part
        content += b"%c%d:%b" % (b"s" if isinstance(part, str) else b"i", len(encoded), encoded)
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def key63(*parts: Part) -> int:
    """Like `key64`, as a non-negative int64: a seed for `torch.Generator`, or an element of a tensor."""
    return key64(*parts) >> 1


# --- on the host: crops, choices, the order of documents ---


class KeyedRandom:
    """A short stream of uniform numbers that belongs to one key (for a crop, a choice, a side)."""

    def __init__(self, *parts: Part) -> None:
        self._key = key64(*parts).to_bytes(8, "little")
        self._block = b""
        self._count = 0

    def bits(self) -> int:
        """The next 64 bits."""
        if not self._block:
            self._block = blake2b(self._key + self._count.to_bytes(8, "little")).digest()
            self._count += 1
        value, self._block = int.from_bytes(self._block[:8], "little"), self._block[8:]
        return value

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """The next number in [low, high)."""
        return low + (high - low) * (self.bits() >> 11) * 2.0**-53

    def below(self, n: int) -> int:
        """The next integer in 0..n-1 (bias below 2**-40 for every n that occurs here)."""
        return self.bits() * n >> 64

    def sample(self, n: int, k: int) -> list[int]:
        """`k` different integers of 0..n-1, in increasing order."""
        chosen = list(range(n))
        for i in range(k):
            j = i + self.below(n - i)
            chosen[i], chosen[j] = chosen[j], chosen[i]
        return sorted(chosen[:k])


class Permutation:
    """A keyed bijection of 0..n-1 in constant memory: a Feistel network with cycle walking."""

    ROUNDS = 6

    def __init__(self, n: int, *parts: Part) -> None:
        self.n = n
        self._half_bits = max(1, ((max(n - 1, 1)).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        self._keys = [key64(*parts, "feistel", r) for r in range(self.ROUNDS)]

    def __call__(self, i: int) -> int:
        """Where `i` goes. The domain is at most four times n, so few steps of walking are needed."""
        if not 0 <= i < self.n:
            raise IndexError(f"{i} is not in 0..{self.n - 1}")
        value = self._scramble(i)
        while value >= self.n:
            value = self._scramble(value)
        return value

    def _scramble(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for key in self._keys:
            mixed = (right + key) * GOLDEN & _MASK_64
            mixed = (mixed ^ mixed >> 29) * MIXERS[0][1] & _MASK_64
            left, right = right, left ^ ((mixed ^ mixed >> 32) & self._mask)
        return left << self._half_bits | right


# --- on the device: drop-path and dropout ---


def uniform(keys: Tensor, seeds: int | Tensor) -> Tensor:
    """Numbers in [0, 1), one per key and seed: both int64 on any device, broadcast -> fp32."""
    mixed = mix(mix(keys + seeds) + signed(GOLDEN))
    return ((mixed >> 40) & ((1 << 24) - 1)).float() * 2.0**-24


def row_keys(sequence_keys: Tensor, seeds: Tensor, length: int) -> Tensor:
    """A key for each position of sequences end to end, from which `lcl_kernels.drawn_keep` draws a row of dropout.

    Args:
        sequence_keys: [b] int64; a sequence has the same masks wherever it is computed.
        seeds: [p] int64, one per place of the model.
        length: of each sequence.

    Returns:
        [p, b * length] int64.
    """
    positions = torch.arange(1, length + 1, device=seeds.device) * signed(GOLDEN)
    streams = mix(sequence_keys + seeds[:, None])
    return mix(streams[:, :, None] + positions).flatten(1)
