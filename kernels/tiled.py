"""Blocks of the contrastive loss in plain torch: any device, no N x N memory, no host synchronisation on CUDA.

Two operations on a rectangular block of rows ``x [M, D]`` against columns ``y [K, D]`` carry the whole loss,
on one device or on many: :meth:`TiledBlock.lse` and :meth:`TiledBlock.gradients`. ``lcl_kernels.triton_engine``
offers the same two with the same meaning.

Logits exist for one tile at a time. On a CPU, where the host may look at numbers, all exponentials share one
shift (``lcl_kernels._common_shift``) and as many tiles of them as fit ``keep`` bytes wait for the gradient, which
then needs no second product. Where the shift is not safe, and on CUDA, each tile takes its own row and
column maxima, so no logit can overflow or vanish whatever the scale.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator

import torch
from lcl_kernels._common_shift import common_shift, factors_out_of_range, smallest_sum
from lcl_kernels._pair_terms import FP16_GAIN, KEPT_BYTES, Precision
from lcl_kernels.products import bf16_units
from torch import Tensor

STRIP = 1 << 17
"""Numbers of a tile that element-wise passes take at a time on a CPU: 512 KB of fp32 stay in a core's cache."""
HUGE_PAGE = 1 << 21


def tile_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a logit tile: 16 MB of logits on a CPU, 128 MB elsewhere."""
    return (2048, 2048) if device.type == "cpu" else (4096, 8192)


class TiledBlock:
    """One block of one step: its sums, then its gradients.

    Args:
        x, y: ``[M, D]`` and ``[K, D]`` operands of one dtype (bf16, fp16, fp32 or fp64).
        x_keys, y_keys: ``[M]``, ``[K]`` integers; equal keys are not negatives of each other.
        scale: 0-dim logit scale in the result dtype.
        tile: rows and columns per tile; default :func:`tile_shape`.
        precision: "bf16" lets a CPU multiply in bf16; otherwise the operands' dtype says all.
        keep: bytes of exponentials that may wait for the gradients, on a CPU; 0 where none will be asked for.
    """

    name = "tiled"

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        x_keys: Tensor,
        y_keys: Tensor,
        scale: Tensor,
        *,
        tile: tuple[int, int] | None = None,
        precision: Precision = "fp32",
        keep: int = KEPT_BYTES,
    ) -> None:
        self.dtype, self.rounding = scale.dtype, x.dtype
        on_cpu = x.device.type == "cpu"
        self.brief = on_cpu and precision == "bf16" and self.dtype == torch.float32
        if on_cpu:  # whose half-precision products would round their results
            x, y = x.to(self.dtype), y.to(self.dtype)
        self.x, self.y, self.x_keys, self.y_keys, self.scale = x, y, x_keys, y_keys, scale
        rows, cols = tile or tile_shape(x.device)
        self.tiles = [(r, c) for r in _spans(len(x), rows) for c in _spans(len(y), cols)]
        self.terms = max(len(x), len(y))
        self.size = min(rows, len(x)) * min(cols, len(y))
        self.strip = min(self.size, max(STRIP, cols)) if on_cpu else self.size
        self.shift = common_shift(x, y, scale) if on_cpu and self.tiles else None
        """None: no common shift, every exponential has its own."""
        self.keep = keep
        self.kept: list[Tensor] = []
        """Exponentials of the first tiles, from the sums to the gradients."""

    def lse(self, *, columns: bool = True) -> tuple[Tensor, Tensor | None]:
        """Log-sum-exp over the negatives of every row and, in the same pass, of every column.

        Args:
            columns: False leaves the column sums out.

        Returns:
            ``[M]`` and ``[K]`` (or None) in ``scale``'s dtype; -inf where a row or column has no negative.
        """
        with bf16_units(self.brief):
            if self.shift is not None:
                sums = self._shifted_sums(self.shift, columns)
                smallest = min(float(part.min()) for part in sums if part is not None)
                if smallest >= smallest_sum(self.terms, self.dtype):
                    lr, lc = (None if part is None else part.log_().add_(self.shift) for part in sums)
                    assert lr is not None
                    return lr, lc
                self.shift, self.kept = None, []
            return self._lse_by_maxima(columns)

    def gradients(self, row: Tensor, col: Tensor, *, want_y: bool = True) -> tuple[Tensor, Tensor | None]:
        """Products of the negatives' gradient matrix with both operands; once per block.

        ``G_ij = exp(S_ij - row_i) + exp(S_ij - col_j)`` for negatives, 0 elsewhere, in [0, 2] by construction of
        ``row`` and ``col`` (see :class:`lcl_kernels._pair_terms.PairTerms`).

        Args:
            row, col: ``[M]`` and ``[K]`` normalisers in the result dtype.
            want_y: False leaves out the second product.

        Returns:
            ``G @ y`` ``[M, D]`` and ``G.T @ x`` ``[K, D]`` (or None) in ``scale``'s dtype.
            For fp16 operands G is rounded to fp16 * 2^14 as in the Triton kernels.
        """
        if self.shift is not None and bool(factors_out_of_range(row, col, self.shift, self.terms)):
            self.shift, self.kept = None, []
        dx = self.scale.new_zeros(self.x.shape)
        dy = self.scale.new_zeros(self.y.shape) if want_y else None
        with bf16_units(self.brief):
            for (r, c), g in zip(self.tiles, self._gradient_tiles(row, col), strict=True):
                self._accumulate(dx[r], g, self.y[c])
                if dy is not None:
                    self._accumulate(dy[c], g.T, self.x[r])
        self.kept = []
        return dx, dy

    def _shifted_sums(self, shift: Tensor, columns: bool) -> tuple[Tensor, Tensor | None]:
        row_sums = self.scale.new_zeros(len(self.x))
        col_sums = self.scale.new_zeros(len(self.y)) if columns else None
        count = min(self.keep // (self.size * self.dtype.itemsize), len(self.tiles))
        memory = [*self._memory(count, self.size), *self._memory(int(count < len(self.tiles)), self.size)]
        self.kept = memory[:count]
        for number, (r, c) in enumerate(self.tiles):
            e = self._logits(r, c, memory[min(number, count)])
            mixed = self._mixed(r, c)
            for strip, part in self._strips(r, e):
                self._exponentials(part, strip, c, shift, mixed)
                row_sums[strip] += part.sum(1)
                if col_sums is not None:
                    col_sums[c] += part.sum(0)
        return row_sums, col_sums

    def _lse_by_maxima(self, columns: bool) -> tuple[Tensor, Tensor | None]:
        lr = self.scale.new_full((len(self.x),), -math.inf)
        lc = self.scale.new_full((len(self.y),), -math.inf) if columns else None
        flat, scratch = self._memory(2, self.size)
        for r, c in self.tiles:
            logits = self._logits(r, c, flat)
            if self._mixed(r, c):
                self._exclude(logits, r, c, -math.inf)
            lr[r] = torch.logaddexp(lr[r], _logsumexp(logits, 1, scratch))
            if lc is not None:
                lc[c] = torch.logaddexp(lc[c], _logsumexp(logits, 0, scratch))
        return lr, lc

    def _gradient_tiles(self, row: Tensor, col: Tensor) -> Iterator[Tensor]:
        """G of every tile, gone when the next one is asked for."""
        shift, kept = self.shift, self.kept
        if shift is not None:
            row_factors, col_factors = (shift - row).exp(), (shift - col).exp()
        spare = self._memory(int(len(kept) < len(self.tiles)), self.size)
        (scratch,) = self._memory(1, self.strip)
        for number, (r, c) in enumerate(self.tiles):
            held, mixed = number < len(kept), self._mixed(r, c)
            g = _view(kept[number], r, c) if held else self._logits(r, c, spare[0])
            for strip, part in self._strips(r, g):
                other = _view(scratch, strip, c)
                if shift is None:
                    torch.sub(part, col[None, c], out=other).exp_()
                    part.sub_(row[strip, None]).exp_().add_(other)
                    if mixed:
                        self._exclude(part, strip, c, 0.0)
                    continue
                if not held:
                    self._exponentials(part, strip, c, shift, mixed)
                part.mul_(torch.add(row_factors[strip, None], col_factors[None, c], out=other))
            yield g

    def _logits(self, r: slice, c: slice, flat: Tensor) -> Tensor:
        """Tile of logits in ``flat``'s memory."""
        x, y, out = self.x[r], self.y[c], _view(flat, r, c)
        if x.dtype != self.dtype:
            return torch.mm(x, y.T, out_dtype=self.dtype, out=out).mul_(self.scale)
        if self.brief:  # the scaled operand would be rounded once more
            return torch.mm(x, y.T, out=out).mul_(self.scale)
        return torch.mm(x * self.scale, y.T, out=out)

    def _strips(self, r: slice, tile: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the block and the part of ``tile``, whose first row is ``r.start``, that one pass takes."""
        step = max(1, self.strip // tile.shape[1])
        for at in range(0, len(tile), step):
            part = tile[at : at + step]
            yield slice(r.start + at, r.start + at + len(part)), part

    def _exponentials(self, logits: Tensor, r: slice, c: slice, shift: Tensor, mixed: bool) -> None:
        """Replace logits by exp(S - shift), 0 where the pair is no negative."""
        if float(shift) > 0.0:
            logits.sub_(shift)
        logits.exp_()
        if mixed:
            self._exclude(logits, r, c, 0.0)

    def _mixed(self, r: slice, c: slice) -> bool:
        """False where the host can see, without waiting, that all pairs of a tile are negatives."""
        if self.x_keys.device.type != "cpu":
            return True
        (x_low, x_high), (y_low, y_high) = torch.aminmax(self.x_keys[r]), torch.aminmax(self.y_keys[c])
        return bool(x_low <= y_high) and bool(y_low <= x_high)

    def _exclude(self, tile: Tensor, r: slice, c: slice, value: float) -> None:
        """Write ``value`` where a pair is not a negative."""
        tile.masked_fill_(self.x_keys[r, None] == self.y_keys[None, c], value)

    def _accumulate(self, into: Tensor, g: Tensor, other: Tensor) -> None:
        """``into += g @ other``, with g rounded as the operands are."""
        gain = FP16_GAIN if self.rounding == torch.float16 else 1.0
        if other.dtype != into.dtype:
            into.add_(torch.mm((g * gain).to(other.dtype), other, out_dtype=into.dtype), alpha=1 / gain)
        elif self.rounding == torch.float16:
            into.addmm_((g * gain).to(self.rounding).to(into.dtype), other, alpha=1 / gain)
        else:
            into.addmm_(g, other)

    def _memory(self, count: int, size: int) -> list[Tensor]:
        """``count`` flat tensors of ``size`` numbers, reused for tile after tile: new pages cost a CPU time."""
        length = count * size * self.dtype.itemsize
        if self.x.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or length < HUGE_PAGE:
            return list(torch.empty((count, size), dtype=self.dtype, device=self.x.device))
        pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # 2 MB at a time instead of 4 KB: a quarter of the time to the first write.
        pages.madvise(mmap.MADV_HUGEPAGE)
        return list(torch.frombuffer(pages, dtype=self.dtype).view(count, size))


def _spans(total: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def _view(flat: Tensor, r: slice, c: slice) -> Tensor:
    rows, cols = r.stop - r.start, c.stop - c.start
    return flat[: rows * cols].view(rows, cols)


def _logsumexp(logits: Tensor, dim: int, scratch: Tensor) -> Tensor:
    peak = logits.amax(dim, keepdim=True)
    # A row without negatives has peak -inf; subtracting it would give NaN.
    peak = torch.where(torch.isinf(peak), 0.0, peak)
    total = torch.sub(logits, peak, out=scratch[: logits.numel()].view(logits.shape)).exp_().sum(dim)
    return total.log_().add_(peak.squeeze(dim))
