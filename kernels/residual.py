"""The end of a transformer's branch in one pass: bias, layer scale, drop path, dropout, residual sum, next LayerNorm.

``total = residual + mask * gain * (branch + bias)``, ``normed = LayerNorm(total)``. On CUDA one Triton kernel reads
both inputs once and writes both results; backward is one more with the parameters' gradients in it, and a small one
that adds their partial sums. Dropout's mask is never stored: forward and backward draw it from integers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lcl_kernels.splitmix64 import GOLDEN, mix, signed
from lcl_kernels.triton_fused import FusedImpl, launches_triton
from torch import Tensor
from torch.autograd.function import once_differentiable

Norm = tuple[Tensor, Tensor, float]
"""Weight [h], bias [h] and epsilon of a LayerNorm."""


def residual_branch(
    residual: Tensor,
    branch: Tensor,
    *,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout: tuple[Tensor, float] | None = None,
    norm: Norm | None = None,
    impl: FusedImpl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The residual stream behind a branch, and its LayerNorm.

    Args:
        residual: ``[t, h]`` the stream before the branch.
        branch: ``[t, h]`` what the branch's last matrix product gave, same dtype.
        bias: ``[h]`` of that product.
        gain: ``[h]`` layer scale.
        row_scale: ``[n]`` fp32, drop path: factor of each image's branch, 0 or 1/(1 - p); t/n tokens an image.
        dropout: keys of the rows, ``[t]`` int64, and the probability p; see :func:`drawn_keep`.
        norm: the LayerNorm that follows, of the sum as rounded to its dtype.
        impl: "triton" (CUDA, half precision or fp32), "plain" torch, or "auto": the first where it runs.

    Returns:
        The sum ``[t, h]`` and its norm (None without ``norm``), each rounded once.

    Raises:
        ValueError: shapes that do not fit, or "triton" where it cannot run.
    """
    if residual.dim() != 2 or residual.shape != branch.shape or residual.dtype != branch.dtype:
        raise ValueError(
            f"residual {tuple(residual.shape)} {residual.dtype} and branch {tuple(branch.shape)} {branch.dtype} "
            "must be [t, h] of one dtype"
        )
    if row_scale is not None and residual.shape[0] % len(row_scale):
        raise ValueError(f"row_scale [{len(row_scale)}] does not divide {residual.shape[0]} rows")
    if not launches_triton(impl, residual):
        return _compose(residual, branch, bias, gain, row_scale, dropout, norm)
    weight, shift, eps = norm or (None, None, 0.0)
    keys, p = dropout or (None, 0.0)
    total, normed = _FusedResidual.apply(residual, branch, bias, gain, weight, shift, row_scale, keys, p, eps)
    return total, normed


def residual_branch_reference(
    residual: Tensor,
    branch: Tensor,
    *,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout: tuple[Tensor, float] | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same by its formula: fp64 throughout, plain autograd."""
    bias, gain = (None if p is None else p.double() for p in (bias, gain))
    norm = None if norm is None else (norm[0].double(), norm[1].double(), norm[2])
    row_scale = None if row_scale is None else row_scale.double()
    return _compose(residual.double(), branch.double(), bias, gain, row_scale, dropout, norm)


def drawn_keep(row_keys: Tensor, width: int, p: float) -> Tensor:
    """Dropout's mask ``[t, width]``: True where an element is kept, with probability ``1 - round(2^16 p) / 2^16``.

    Counter-based: four neighbours in a row take 16 bits each, low bits first, of splitmix64's output
    ``1 + column // 4`` from the row's key. It depends on nothing else, the device included.
    """
    counters = torch.arange(1, -(-width // 4) + 1, device=row_keys.device) * signed(GOLDEN)
    draws = mix(row_keys[:, None] + counters)
    # int16 has no unsigned comparison: both sides move down by half the range.
    return (draws.view(torch.int16) ^ -32768)[:, :width] >= round(p * 65536) - 32768


def drop(x: Tensor, row_keys: Tensor, p: float) -> Tensor:
    """x ``[t, width]`` with dropout: kept elements are multiplied by the number that keeps the mean."""
    return x * drawn_keep(row_keys, x.shape[1], p) * (65536 / (65536 - round(p * 65536)))


def _compose(
    residual: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    row_scale: Tensor | None,
    dropout: tuple[Tensor, float] | None,
    norm: Norm | None,
) -> tuple[Tensor, Tensor | None]:
    if bias is not None:
        branch = branch + bias
    if gain is not None:
        branch = branch * gain
    if row_scale is not None:
        rows = row_scale.to(branch.dtype).repeat_interleave(len(branch) // len(row_scale))
        branch = branch * rows[:, None]
    if dropout is not None:
        branch = drop(branch, *dropout)
    total = residual + branch
    if norm is None:
        return total, None
    weight, shift, eps = norm
    return total, F.layer_norm(total, weight.shape, weight, shift, eps)


class _FusedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        weight: Tensor | None,
        shift: Tensor | None,
        row_scale: Tensor | None,
        row_keys: Tensor | None,
        p: float,
        eps: float,
    ) -> tuple[Tensor, Tensor | None]:
        branch, residual = branch.contiguous(), residual.contiguous()
        total, normed, mean, rstd = torch.ops.lcl.residual_branch(
            branch, bias, gain, residual, weight, shift, eps, row_scale, row_keys, p
        )
        kept = (None, None, None) if weight is None else (total, mean, rstd)
        ctx.save_for_backward(*kept, None if gain is None else branch, bias, gain, weight, row_scale, row_keys)
        ctx.p = p
        return total, None if weight is None else normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, weight, row_scale, row_keys = ctx.saved_tensors
        bias, gain = saved[4:]
        grad_total = grad_total.contiguous()
        grad_normed = None if weight is None or grad_normed is None else grad_normed.contiguous()
        branch, residual, *parameters = torch.ops.lcl.residual_branch_backward(
            grad_total, grad_normed, *saved, weight, row_scale, row_keys, ctx.p
        )
        residual = grad_total if weight is None else residual
        if gain is None and row_scale is None and row_keys is None:
            branch = residual
        there = (bias, gain, weight, weight)
        gradients = (g if p is not None else None for g, p in zip(parameters, there, strict=True))
        return residual, branch, *gradients, None, None, None, None
