"""Bias and activation between the two matrix products of an MLP, in one pass each way, the bias's gradient included."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lcl_kernels._pair_terms import check_choice
from lcl_kernels.triton_fused import FusedImpl, launches_triton
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = Literal["gelu", "relu"]


def bias_activation(x: Tensor, bias: Tensor | None, kind: Activation, *, impl: FusedImpl = "auto") -> Tensor:
    """``activation(x + bias)``: GELU in its exact form, or ReLU.

    Saved for backward: x for GELU, the result for ReLU (x can be freed).

    Args:
        x: ``[t, f]``.
        bias: ``[f]`` or None.
        kind: "gelu" or "relu".
        impl: "triton" (CUDA, half precision or fp32), "plain" torch, or "auto": the first where it runs.

    Raises:
        ValueError: an unknown ``kind``, shapes that do not fit, or "triton" where it cannot run.
    """
    check_choice("kind", kind, Activation)
    if x.dim() != 2 or (bias is not None and bias.shape != x.shape[1:]):
        raise ValueError(
            f"x {tuple(x.shape)} and bias {None if bias is None else tuple(bias.shape)} must be [t, f], [f]"
        )
    if not launches_triton(impl, x):
        return bias_activation_reference(x, bias, kind)
    y: Tensor = _FusedActivation.apply(x, bias, kind == "gelu")
    return y


def bias_activation_reference(x: Tensor, bias: Tensor | None, kind: Activation) -> Tensor:
    """The same by its formula, in the dtype of ``x``, plain autograd."""
    return (F.gelu if kind == "gelu" else F.relu)(x if bias is None else x + bias)


class _FusedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        x = x.contiguous()
        y: Tensor = torch.ops.lcl.bias_activation(x, bias, gelu)
        ctx.save_for_backward(x if gelu else y, bias)
        ctx.gelu = gelu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, bias = ctx.saved_tensors
        grad_x, grad_bias = torch.ops.lcl.bias_activation_backward(grad.contiguous(), saved, bias, ctx.gelu)
        return grad_x, None if bias is None else grad_bias, None
