"""Dense attention of sequences of one length, by torch's kernels where they are good.

Shapes: g sequences, L their length, a heads, d channels per head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lcl_kernels.products import bf16_units
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 512
"""Longest sequence whose scores `_ShortAttention` forms whole."""
SCORE_BYTES = 4 << 20


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
    probabilities are fp32, from bf16 products (`products`).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        """q, k, v [g, L, a, d] -> [g, L, a, d]."""
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first, is_causal=causal, scale=scale
        )
        out = out.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        g, length, heads, d = q.shape
        wide = -(-length // 16) * 16  # what the bf16 units multiply without an odd rest
        gradients = q.new_empty(3, g, length, heads, d)
        allowed = torch.zeros(wide, wide)
        allowed[:, length:] = -torch.inf
        if ctx.causal:
            allowed.masked_fill_(torch.ones(wide, wide, dtype=torch.bool).triu_(1), -torch.inf)
        part = max(1, SCORE_BYTES // (4 * wide * wide * heads))
        for i in range(0, g, part):
            q_, k_, v_, o_ = (_heads_apart(x[i : i + part], wide) for x in (q, k, v, grad))  # [part * a, wide, d]
            # Of each query: the log of its sum of exponentials, and the mean of its scores' gradients.
            log_sum = F.pad(lse[i : i + part].reshape(-1, length, 1), (0, 0, 0, wide - length))
            mean = F.pad((grad[i : i + part].float() * out[i : i + part]).sum(-1), (0, 0, 0, wide - length))
            mean = mean.transpose(1, 2).reshape(-1, wide, 1)
            with bf16_units(use=True):
                probabilities = (allowed - log_sum).baddbmm_(q_.float(), k_.float().transpose(1, 2), alpha=ctx.scale)
                probabilities.exp_()
                d_scores = torch.baddbmm(-mean, o_.float(), v_.float().transpose(1, 2)).mul_(probabilities)
            half = d_scores.mul_(ctx.scale).to(q.dtype)
            parts = (
                torch.bmm(half, k_),
                torch.bmm(half.transpose(1, 2), q_),
                torch.bmm(probabilities.to(q.dtype).transpose(1, 2), o_),
            )
            for into, value in zip(gradients, parts, strict=True):
                into[i : i + part] = value.view(-1, heads, wide, d)[:, :, :length].transpose(1, 2)
        dq, dk, dv = gradients
        return dq, dk, dv, None, None


def _heads_apart(x: Tensor, length: int) -> Tensor:
    """[g, L, a, d] -> contiguous [g * a, length, d], with zeros behind L."""
    apart = x.new_zeros(x.shape[0], x.shape[2], length, x.shape[3])
    apart[:, :, : x.shape[1]] = x.transpose(1, 2)
    return apart.flatten(0, 1)
