"""Blocks of the contrastive loss in plain torch: any device, no N x N memory, no host synchronisation.

Two operations on a rectangular block of rows ``x [M, D]`` against columns ``y [K, D]`` carry the whole loss,
on one device or on many: :func:`block_lse` and :func:`block_gradients`. ``lcl_kernels.triton_engine``
offers the same two with the same meaning.

Both walk over tiles that are recomputed, never kept: logits exist for one tile at a time. Each tile takes
its own row and column maxima, so no logit can overflow or vanish whatever the scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from lcl_kernels._pair_terms import FP16_GAIN, Precision
from torch import Tensor


def tile_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a logit tile: 16 MB of logits on a CPU, 128 MB elsewhere."""
    return (2048, 2048) if device.type == "cpu" else (4096, 8192)


def block_lse(
    x: Tensor,
    y: Tensor,
    x_keys: Tensor,
    y_keys: Tensor,
    scale: Tensor,
    *,
    columns: bool = True,
    tile: tuple[int, int] | None = None,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp over the negatives of every row and, in the same pass, of every column.

    Args:
        x, y: ``[M, D]`` and ``[K, D]`` operands of one dtype (fp16, fp32 or fp64).
        x_keys, y_keys: ``[M]``, ``[K]`` integers; equal keys are not negatives of each other.
        scale: 0-dim logit scale in the result dtype.
        columns: False leaves the column sums out.
        tile: rows and columns per tile; default :func:`tile_shape`.
        precision: not used here, where the operands' dtype says all.

    Returns:
        ``[M]`` and ``[K]`` (or None) in ``scale``'s dtype; -inf where a row or column has no negative.
    """
    rows, cols = tile or tile_shape(x.device)
    lr = torch.full((x.shape[0],), -math.inf, dtype=scale.dtype, device=x.device)
    lc = torch.full((y.shape[0],), -math.inf, dtype=scale.dtype, device=x.device) if columns else None
    product, scratch = _buffers(2, x, y, rows, cols, scale.dtype)
    for r in _spans(x.shape[0], rows):
        factor = _Factor(x[r], scale)
        for c in _spans(y.shape[0], cols):
            logits = factor.logits(y[c], product)
            excluded = _excluded(x_keys[r], y_keys[c])
            row_part, col_part = _tile_lse(logits, excluded, _view(scratch, logits.shape), columns)
            lr[r] = torch.logaddexp(lr[r], row_part)
            if lc is not None and col_part is not None:
                lc[c] = torch.logaddexp(lc[c], col_part)
    return lr, lc


def block_gradients(
    x: Tensor,
    y: Tensor,
    x_keys: Tensor,
    y_keys: Tensor,
    scale: Tensor,
    row: Tensor,
    col: Tensor,
    *,
    want_y: bool = True,
    tile: tuple[int, int] | None = None,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor | None]:
    """Products of the negatives' gradient matrix with both operands.

    ``G_ij = exp(S_ij - row_i) + exp(S_ij - col_j)`` for negatives, 0 elsewhere, in [0, 2] by construction of
    ``row`` and ``col`` (see :class:`lcl_kernels._pair_terms.PairTerms`).

    Args:
        x, y, x_keys, y_keys, scale, tile, precision: as in :func:`block_lse`.
        row, col: ``[M]`` and ``[K]`` normalisers in the result dtype.
        want_y: False leaves out the second product.

    Returns:
        ``G @ y`` ``[M, D]`` and ``G.T @ x`` ``[K, D]`` (or None) in ``scale``'s dtype.
        For fp16 operands G is rounded to fp16 * 2^14 as in the Triton kernels.
    """
    rows, cols = tile or tile_shape(x.device)
    dx = torch.zeros(x.shape, dtype=scale.dtype, device=x.device)
    dy = torch.zeros(y.shape, dtype=scale.dtype, device=x.device) if want_y else None
    product, scratch = _buffers(2, x, y, rows, cols, scale.dtype)
    for r in _spans(x.shape[0], rows):
        factor = _Factor(x[r], scale)
        for c in _spans(y.shape[0], cols):
            logits = factor.logits(y[c], product)
            excluded = _excluded(x_keys[r], y_keys[c])
            g = torch.sub(logits, row[r, None], out=_view(scratch, logits.shape)).exp_()
            g.add_(logits.sub_(col[None, c]).exp_())
            if excluded is not None:
                g.masked_fill_(excluded, 0.0)
            _accumulate(dx[r], g, y[c])
            if dy is not None:
                _accumulate(dy[c], g.T, x[r])
    return dx, dy


def _spans(total: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, total)) for i in range(0, total, step))


def _buffers(count: int, x: Tensor, y: Tensor, rows: int, cols: int, dtype: torch.dtype) -> list[Tensor]:
    size = min(rows, x.shape[0]) * min(cols, y.shape[0])
    # Reused for every tile: allocating megabytes per tile costs page faults on a CPU.
    return [torch.empty(size, dtype=dtype, device=x.device) for _ in range(count)]


def _view(flat: Tensor, shape: torch.Size) -> Tensor:
    return flat[: shape[0] * shape[1]].view(shape)


class _Factor:
    """Rows of a tile with the scale multiplied in, where that costs no rounding to fp16."""

    def __init__(self, x: Tensor, scale: Tensor) -> None:
        self.exact = x.dtype == scale.dtype
        self.x = x * scale if self.exact else x
        self.scale = scale

    def logits(self, y: Tensor, flat: Tensor) -> Tensor:
        """Tile of logits in ``flat``'s memory."""
        out = _view(flat, torch.Size((self.x.shape[0], y.shape[0])))
        if self.exact:
            return torch.mm(self.x, y.T, out=out)
        if y.device.type == "cpu":  # whose kernels would round the result to half precision
            torch.mm(self.x.to(out.dtype), y.to(out.dtype).T, out=out)
        else:
            torch.mm(self.x, y.T, out_dtype=out.dtype, out=out)
        return out.mul_(self.scale)


def _excluded(x_keys: Tensor, y_keys: Tensor) -> Tensor | None:
    """Pairs of a tile that are not negatives; None if the host can see, without waiting, that there are none."""
    if x_keys.device.type == "cpu":
        (x_low, x_high), (y_low, y_high) = (torch.aminmax(k) for k in (x_keys, y_keys))
        if bool(x_high < y_low) or bool(y_high < x_low):
            return None
    return x_keys[:, None] == y_keys[None, :]


def _tile_lse(logits: Tensor, excluded: Tensor | None, scratch: Tensor, columns: bool) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp over the rows and columns of one tile."""
    if logits.device.type == "cpu":
        low, high = torch.aminmax(logits)
        if float(high - low) < 80.0:
            # No exponential below exp(-80): one shift and one exponential serve both directions exactly.
            e = torch.sub(logits, high, out=scratch).exp_()
            if excluded is not None:
                e.masked_fill_(excluded, 0.0)
            return e.sum(1).log_().add_(high), e.sum(0).log_().add_(high) if columns else None
    if excluded is not None:
        logits.masked_fill_(excluded, -math.inf)
    return _logsumexp(logits, 1, scratch), _logsumexp(logits, 0, scratch) if columns else None


def _accumulate(into: Tensor, g: Tensor, other: Tensor) -> None:
    if other.dtype == into.dtype:
        into.addmm_(g, other)
        return
    rounded = (g * FP16_GAIN).to(other.dtype)
    if other.device.type == "cpu":
        into.addmm_(rounded.to(into.dtype), other.to(into.dtype), alpha=1 / FP16_GAIN)
    else:
        into.add_(torch.mm(rounded, other, out_dtype=into.dtype), alpha=1 / FP16_GAIN)


def _logsumexp(logits: Tensor, dim: int, scratch: Tensor) -> Tensor:
    peak = logits.amax(dim, keepdim=True)
    # A row without negatives has peak -inf; subtracting it would give NaN.
    peak = torch.where(torch.isinf(peak), 0.0, peak)
    total = torch.sub(logits, peak, out=scratch).exp_().sum(dim)
    return total.log_().add_(peak.squeeze(dim))
