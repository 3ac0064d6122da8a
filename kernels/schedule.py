"""Which of the two exact schedules of the distributed loss is cheaper, and the per-rank layout both use.

reduce_scatter
    Text is gathered once; each rank forms the rows of its own images against all texts, so row and column
    sums and
    both gradients come from one block: 8 n N D FLOP. Text gradients of all ranks are then summed and
    returned to
    their owners: a reduce-scatter of N D fp32 numbers, exposed because the result is needed at once.
gather_both
    Images and texts are gathered and each rank forms its image rows and its text rows separately: 12 n N D
    FLOP, but the only further exchange is two numbers per pair.
The gathers themselves hide under the language model's forward pass; the rule below prices what does not hide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["auto", "reduce_scatter", "gather_both"]
Weighting = Literal["image", "rank"]


@dataclass(frozen=True)
class CommunicationRates:
    """What :func:`choose_schedule` assumes about a rank; the defaults describe an H100 on one 400 Gb/s
    link."""

    flops: float = 5.0e14
    """Sustained matrix rate of one device, FLOP/s."""
    bandwidth: float = 5.0e10
    """Bytes/s each rank moves in an all-gather or reduce-scatter of the data-parallel group."""
    latency: float = 2.0e-5
    """Seconds a collective takes per doubling of the group."""
    hidden: float = 1.0
    """Share of the embedding gathers that overlaps with other work, 0 to 1."""


def choose_schedule(
    counts: Sequence[int], dim: int, *, tp_size: int = 1, wire_bytes: int = 2, rates: CommunicationRates | None = None
) -> Literal["reduce_scatter", "gather_both"]:
    """Pick the cheaper schedule from host numbers only, so that all ranks agree without talking.

    With R ranks, n = max(counts), N = sum(counts), P = tp_size, F FLOP/s, B bytes/s, latency per doubling l:

        gather         = (1 - hidden) * (N D wire_bytes / P / B + l log2 R)
        scatter        = 4 N D / P / B + l log2 R
        merge          = 2 * (4 N / P / B + l log2 R)     an all-reduce of column sums; two are needed
        reduce_scatter = 8 n N D / (P F) + gather + scatter + 2 merge
        gather_both    = 12 n N D / (P F) + 2 gather + 2 * 4 N / P / B + l log2 R

    Ties and R = 1 go to "reduce_scatter".

    Args:
        counts: pairs of every data-parallel rank.
        dim: embedding width D.
        tp_size: ranks that share the work of one data-parallel rank.
        wire_bytes: bytes per number in the gathers (2 for fp16, 4 for fp32).
        rates: what a rank reaches; default :class:`CommunicationRates`.
    """
    m = rates or CommunicationRates()
    ranks, largest, total = len(counts), max(counts, default=0), sum(counts)
    if ranks <= 1:
        return "reduce_scatter"
    start = m.latency * math.log2(ranks)
    numbers = total * dim / tp_size
    gather = (1.0 - m.hidden) * (numbers * wire_bytes / m.bandwidth + start)
    unit = largest * numbers / m.flops
    sums = 4.0 * total / tp_size / m.bandwidth
    scatter_cost = 8 * unit + gather + numbers * 4 / m.bandwidth + start + 2 * (2 * sums + 2 * start)
    gather_cost = 12 * unit + 2 * gather + 2 * sums + start
    return "gather_both" if gather_cost < scatter_cost else "reduce_scatter"


def pair_weights(counts: Sequence[int], weighting: Weighting) -> list[float]:
    """Weight of each pair of every rank; weights of all pairs sum to 1 (or there are none).

    "image": 1/N, the loss of one N x N matrix. "rank": the mean over non-empty ranks of their own means,
    which is what averaging per-rank losses gives (the released LCL code, there with NaN for an empty rank).
    """
    total, filled = sum(counts), sum(c > 0 for c in counts)
    if weighting == "image":
        return [1.0 / max(total, 1)] * len(counts)
    return [1.0 / (filled * c) if c else 0.0 for c in counts]


@dataclass(frozen=True)
class PairShards:
    """Who holds which pairs: derived from host counts, so no rank ever asks the device.

    TP rank t of data-parallel rank r gathers and owns, as columns, the pairs ``[n_r t / P, n_r (t+1) /
    P)`` of each rank r ("its slice"); every TP rank holds all n_r pairs as rows. Volume and work per
    device fall with P.
    """

    counts: tuple[int, ...]
    rank: int
    tp_size: int = 1
    tp_rank: int = 0
    starts: tuple[int, ...] = field(init=False)
    """Global number of each rank's first pair."""
    bounds: tuple[tuple[int, int], ...] = field(init=False)
    """Slice of every rank, relative to that rank's first pair."""
    lengths: tuple[int, ...] = field(init=False)
    offsets: tuple[int, ...] = field(init=False)
    """Position of every rank's slice among the packed columns."""

    def __post_init__(self) -> None:
        if any(c < 0 for c in self.counts):
            raise ValueError(f"counts={self.counts}: must not be negative")
        bounds = tuple((c * self.tp_rank // self.tp_size, c * (self.tp_rank + 1) // self.tp_size) for c in self.counts)
        lengths = tuple(hi - lo for lo, hi in bounds)
        object.__setattr__(self, "starts", tuple(sum(self.counts[:r]) for r in range(len(self.counts))))
        object.__setattr__(self, "bounds", bounds)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "offsets", tuple(sum(lengths[:r]) for r in range(len(lengths))))

    @property
    def total(self) -> int:
        """N, pairs of all ranks."""
        return sum(self.counts)

    @property
    def rows(self) -> int:
        """n, pairs of this rank."""
        return self.counts[self.rank]

    @property
    def own_rows(self) -> slice:
        """This TP rank's slice of its own rows."""
        return slice(*self.bounds[self.rank])

    @property
    def columns(self) -> int:
        """Pairs in this TP rank's slices of all ranks."""
        return sum(self.lengths)

    @property
    def own_columns(self) -> slice:
        """Where this rank's slice lies among the packed columns."""
        start = self.offsets[self.rank]
        return slice(start, start + self.lengths[self.rank])

    @property
    def capacity(self) -> int:
        """Rows every rank sends: the longest slice, at least 1 so that no collective is empty."""
        return max(1, *self.lengths)

    def per_column(self, values: Sequence[int | float], like: Tensor, dtype: torch.dtype) -> Tensor:
        """``[columns]`` tensor repeating each rank's number over its slice, built without a host sync."""
        one_each = host_tensor(list(values), like.device, dtype)
        repeats = host_tensor(list(self.lengths), like.device, torch.int64)
        return torch.repeat_interleave(one_each, repeats, output_size=self.columns)

    def row_ids(self, like: Tensor) -> Tensor:
        """``[n]`` int32 global numbers of this rank's pairs."""
        start = self.starts[self.rank]
        return torch.arange(start, start + self.rows, dtype=torch.int32, device=like.device)

    def column_ids(self, like: Tensor) -> Tensor:
        """``[columns]`` int32 global numbers of the gathered pairs."""
        shift = [s + lo - o for s, (lo, _), o in zip(self.starts, self.bounds, self.offsets, strict=True)]
        packed = torch.arange(self.columns, dtype=torch.int32, device=like.device)
        return packed + self.per_column(shift, like, torch.int32)

    def padded_index(self, like: Tensor) -> Tensor | None:
        """``[columns]`` int64 positions of packed columns in the padded ``[R * capacity]``; None if equal."""
        if all(length == self.capacity for length in self.lengths):
            return None
        shift = [r * self.capacity - o for r, o in enumerate(self.offsets)]
        packed = torch.arange(self.columns, dtype=torch.int64, device=like.device)
        return packed + self.per_column(shift, like, torch.int64)


def host_tensor(values: Sequence[int | float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy host numbers to ``device`` without waiting for it (pinned memory on CUDA)."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
