"""One shift for all exponentials of a block: when it is safe, and the numbers that say so.

With ``E_ij = exp(S_ij - c)`` and one c for the whole block, a single exponential per logit serves the sums of rows and
columns and, times ``exp(c - row_i) + exp(c - col_j)``, the gradient. No logit exceeds b = |s| max|x| max|y|.
With n terms in a sum, ``c = max(0, b + ln n - headroom)`` keeps every sum finite and most of the dtype's range
below c. (c = b, the obvious choice, loses every logit under b - 87 in fp32.) The sums themselves then show whether
anything was lost below: terms under the smallest normal number are flushed to zero, and n of them are half a unit in
the last place of a sum only if the sum is under ``n tiny 2 / eps``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GUARD = 4.7
"""Nats left to the largest number for rounding and norms slightly above 1."""


def common_shift(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """0-dim shift c of the block ``x [M, D]`` against ``y [K, D]`` in ``scale``'s dtype, on its device; M, K > 0."""
    norms = [torch.linalg.vector_norm(t, dim=1, dtype=scale.dtype).amax() for t in (x, y)]
    headroom = math.log(torch.finfo(scale.dtype).max) - GUARD
    slack = math.log(max(x.shape[0], y.shape[0])) - headroom
    return (scale.abs() * norms[0] * norms[1] + slack).clamp_min(0.0)


def smallest_sum(terms: int, dtype: torch.dtype) -> float:
    """Shifted sums of ``terms`` exponentials that are at least this large have lost nothing to the dtype's range."""
    numbers = torch.finfo(dtype)
    return terms * numbers.tiny * 2.0 / numbers.eps


def factors_out_of_range(row: Tensor, col: Tensor, shift: Tensor, terms: int) -> Tensor:
    """0-dim True if a factor exp(shift - row) could overflow, vanish, or multiply sums that lost terms."""
    low = shift + math.log(smallest_sum(terms, row.dtype))
    high = shift - math.log(torch.finfo(row.dtype).tiny) - 1.3
    both = torch.cat([row, col])
    # +inf marks weight 0: its factor is 0 and meant to be.
    largest = torch.where(torch.isposinf(both), shift, both).max()
    # Written so that NaN counts as out of range.
    return ~((both.min() >= low) & (largest <= high))
