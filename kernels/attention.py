"""Dense attention of sequences of one length, by torch's kernels where they are good.

Shapes: g sequences, L their length, a heads, d channels per head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lcl_kernels.cpu_products import bf16_units
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 512
"""Longest sequence whose scores `_ShortAttention` forms whole."""
SCORE_BYTES = 16 << 20


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """softmax(scale q k^T) v without L x L scores in memory. q, k, v ``[g, L, a, d]`` -> ``[g, L, a, d]``."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] <= SHORT:
        short: Tensor = _ShortAttention.apply(q, k, v, causal, scale)
        return short
    return _sdpa(q, k, v, causal, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, scale=scale
    )
    return out.transpose(1, 2)


class _ShortAttention(torch.autograd.Function):
    """torch's CPU attention in bf16, with a backward that forms the scores of some sequences at a time.

    The backward of its flash kernel is some 4 times as slow for such lengths, and less exact: here scores and
    probabilities are fp32, from bf16 products (`cpu_products`).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        """q, k, v [g, L, a, d] -> [g, L, a, d]."""
        ctx.save_for_backward(q, k, v)
        ctx.causal, ctx.scale = causal, scale
        return _sdpa(q, k, v, causal, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        g, length, heads, d = q.shape
        gradients = q.new_empty(3, g, length, heads, d)
        future = torch.ones(length, length, dtype=torch.bool).triu_(1) if ctx.causal else None
        part = max(1, SCORE_BYTES // (4 * length * length * heads))
        for i in range(0, g, part):
            # [part * a, L, d] each
            q_, k_, v_, o_ = (x[i : i + part].transpose(1, 2).reshape(-1, length, d) for x in (q, k, v, grad))
            with bf16_units(q):
                scores = torch.bmm(q_.float(), k_.float().transpose(1, 2)).mul_(ctx.scale)
                d_probabilities = torch.bmm(o_.float(), v_.float().transpose(1, 2))
            if future is not None:
                scores.masked_fill_(future, -torch.inf)
            probabilities = torch.softmax(scores, -1)
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, torch.float32)
            d_scores = d_scores.mul_(ctx.scale).to(q.dtype)
            parts = (
                torch.bmm(d_scores, k_),
                torch.bmm(d_scores.transpose(1, 2), q_),
                torch.bmm(probabilities.to(q.dtype).transpose(1, 2), o_),
            )
            for into, value in zip(gradients, parts, strict=True):
                into[i : i + part] = value.view(-1, heads, length, d).transpose(1, 2)
        dq, dk, dv = gradients
        return dq, dk, dv, None, None
