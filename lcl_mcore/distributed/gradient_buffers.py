"""megatron's fp32 gradient buffers, for operators that add a weight's gradient to its buffer themselves.

megatron's hook, which otherwise adds `weight.grad` to the buffer after backward, then leaves it alone. Where one use of
a weight does this, all must: the mark holds for the weight, not for a use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gradient_buffer(weight: Tensor) -> Tensor | None:
    """megatron's fp32 gradient buffer of this weight; None before `DistributedDataParallel` has made one."""
    return getattr(weight, "main_grad", None)


def mark_added(weight: Tensor) -> None:
    """Tell megatron's hook that the buffer has this weight's gradient, and that `weight.grad` holds nothing."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]


class _ThroughBuffer(torch.autograd.Function):
    """A weight as it is, for any use; its gradient goes to its buffer."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        buffer = gradient_buffer(ctx.weight)
        if buffer is not None:
            buffer.add_(grad)
            mark_added(ctx.weight)
        return grad


def through_buffer(weight: Tensor) -> Tensor:
    """The weight, for a use by other code: where one use adds to the buffer itself, all must."""
    result: Tensor = _ThroughBuffer.apply(weight)
    return result
