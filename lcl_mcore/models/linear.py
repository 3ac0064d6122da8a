"""Linear layers whose matmuls hold the bias and add weight gradients to megatron's fp32 buffers themselves.

megatron's own classes, except where the tensor-parallel group has one rank: there nothing is communicated, and what is
left is a product. Without fusion kernels (a CPU) they would return the weight's gradient, for a hook to add it.

Shape legend
    t   tokens;  i, o  input and output width;  V  vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lcl_kernels.embedding import add_row_gradients
from lcl_kernels.products import add_product
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from lcl_mcore.distributed.gradient_buffers import gradient_buffer, mark_added


class _Linear(torch.autograd.Function):
    """x [t, i] @ weight [o, i].T + bias [o].

    The weight is kept as it is: activation recompute hands back copies of what is saved, and megatron's mark belongs to
    the parameter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.has_bias = weight, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        need_x, need_weight, need_bias = ctx.needs_input_grad
        buffer = gradient_buffer(weight)
        dx = grad @ weight if need_x else None
        d_weight = None
        if need_weight and buffer is None:
            d_weight = grad.T @ x
        elif need_weight and buffer is not None:
            add_product(buffer, grad.T, x)
            mark_added(weight)
            d_weight = torch.empty_like(weight)  # never read; megatron's hook wants to see one
        return dx, d_weight, grad.sum(0) if ctx.has_bias and need_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., i] -> [..., o]; the weight's gradient goes to its buffer, where it has one."""
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], -1)


class ColumnLinear(ColumnParallelLinear):
    """`ColumnParallelLinear`; alone in its group it returns no bias for the caller to add, unless it is to."""

    hands_out_bias = False  # True where a fused operator adds the bias and has its gradient

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1:
            result: tuple[Tensor, Tensor | None] = super().forward(input_, *args, **kwargs)
            return result
        if self.hands_out_bias:
            return linear(input_, self.weight, None), self.bias
        return linear(input_, self.weight, self.bias), None


class RowLinear(RowParallelLinear):
    """`RowParallelLinear`; alone in its group it returns no bias for the caller to add, unless it is to."""

    hands_out_bias = False

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1:
            result: tuple[Tensor, Tensor | None] = super().forward(input_)
            return result
        if self.hands_out_bias:
            return linear(input_, self.weight, None), self.bias
        return linear(input_, self.weight, self.bias), None


class _Rows(torch.autograd.Function):
    """Rows of weight [V, h]; their gradient goes to the weight's buffer."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, shared: bool) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.shared = weight, shared
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (tokens,), weight = ctx.saved_tensors, ctx.weight
        buffer = gradient_buffer(weight)
        if buffer is None:
            return torch.ops.aten.embedding_dense_backward(grad, tokens, weight.shape[0], -1, False), None, None
        add_row_gradients(buffer, tokens, grad)
        mark_added(weight)
        return None if ctx.shared else torch.empty_like(weight), None, None


class TokenEmbedding(VocabParallelEmbedding):
    """`VocabParallelEmbedding` for tokens [t], whose weight's gradient goes to its buffer.

    Attributes:
        shared: autograd meets the weight in the loss again, which hands it the placeholder.
    """

    shared = False

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [t] -> [t, h], on every tensor-parallel rank."""
        if self.tp_group.size() == 1:
            rows: Tensor = _Rows.apply(self.weight, tokens, self.shared)
            return rows
        elsewhere = (tokens < self.vocab_start_index) | (tokens >= self.vocab_end_index)
        rows = _Rows.apply(self.weight, (tokens - self.vocab_start_index).masked_fill(elsewhere, 0), self.shared)
        rows = rows.masked_fill(elsewhere[:, None], 0.0)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
