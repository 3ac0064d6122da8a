"""Output projection and vocabulary-parallel cross-entropy in one, without full logits in fp32.

``loss = sum_i a_i * (logsumexp_v(z_iv) - z_i,label_i)``, ``z = hidden @ weight.T + bias``, the vocabulary
split over the ranks of ``tp_group``. Rows go through in chunks: a chunk's logits live in one fp32 buffer,
become their own gradient in place, and feed two matrix products. Idea of chunking: Liger kernel
(arXiv:2410.10989); the vocabulary-parallel softmax: Megatron-LM (arXiv:1909.08053).

Conventions
    * The returned loss is a sum, equal on every rank of ``tp_group``; divide by the global number of targets.
    * Gradients are those of the returned loss with ``hidden`` replicated over ``tp_group``: the gradient of
      ``hidden`` is summed over the group inside the forward call and is complete on every rank. A caller that
      gathered ``hidden`` from sequence-parallel shards must split it, not reduce it again.
    * ``weight`` and ``bias`` gradients are those of this shard, accumulated in fp32.
    * Gradients are formed in forward; backward multiplies and communicates nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lcl_kernels._pair_terms import scaled_gradients
from lcl_kernels.products import bf16_units
from lcl_kernels.triton_fused import FusedImpl, launches_triton
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOGIT_BYTES = {"cpu": 64 << 20}
_LOGIT_BYTES_GPU = 256 << 20  # long chunks: every chunk reads and writes the whole fp32 weight gradient


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    row_weights: Tensor | None = None,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    chunk_rows: int | None = None,
    bias: Tensor | None = None,
    weight_gradient: Tensor | None = None,
    impl: FusedImpl = "auto",
) -> Tensor:
    """Weighted sum of token losses; see the module text for conventions.

    Args:
        hidden: ``[k, h]`` fp16, bf16, fp32 or fp64; equal on all ranks of ``tp_group``. k = 0 gives 0.
        weight: ``[V, h]`` this rank's rows of the output embedding, same dtype.
        labels: ``[k]`` integers in the whole vocabulary. Negative labels are ignored (loss and gradient 0).
        row_weights: ``[k]`` factors a_i, default 1; constants.
        vocab_start: number of the first word in this shard.
        tp_group: ranks that hold the other shards; None: the vocabulary is not split.
        valid_vocab: size of the whole real vocabulary; words numbered from it on are padding rows of the
            embedding and take no part in the softmax (zero gradient). None: all are real.
        chunk_rows: rows whose logits exist at a time; default: 64 MB of them on a CPU, 256 MB on a GPU.
            Must be equal on all ranks of ``tp_group``, as shards of equal size make it.
        bias: ``[V]`` or None.
        weight_gradient: fp32 ``[V, h]`` to which backward adds the gradient of ``weight``, unrounded; autograd then
            gets an empty placeholder for it, whose values mean nothing. None: autograd gets it.
        impl: "triton" (CUDA; logits in the dtype of ``hidden``, softmax in fp32), "plain" torch (logits in fp32), or
            "auto": the first where it runs.

    Returns:
        0-dim fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes or dtypes that do not fit, or "triton" where it cannot run.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [k, h], [V, h]")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: cast one of them")
    if labels.shape != hidden.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels {tuple(labels.shape)} {labels.dtype} must be [{hidden.shape[0]}] integers")
    if row_weights is not None and row_weights.shape != labels.shape:
        raise ValueError(f"row_weights {tuple(row_weights.shape)} must be [{hidden.shape[0]}]")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows}: must be at least 1")
    if tp_group is not None and dist.get_world_size(tp_group) == 1:
        tp_group = None
    valid = weight.shape[0]
    if valid_vocab is not None:
        valid = min(max(valid_vocab - vocab_start, 0), valid)
    rows = chunk_rows or _even_rows(hidden.shape[0], _default_rows(weight))
    gradients, fused = torch.is_grad_enabled(), launches_triton(impl, hidden)
    job = _Job(labels, row_weights, vocab_start, valid, rows, tp_group, gradients, weight_gradient, fused)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, job)
    return loss


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    row_weights: Tensor | None = None,
    valid_vocab: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same loss as its formula: unsplit vocabulary, full logits, plain autograd."""
    dtype = _work_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits[:, :valid_vocab]
    losses = torch.nn.functional.cross_entropy(logits, labels.clamp_min(-1), reduction="none", ignore_index=-1)
    return losses.sum() if row_weights is None else (row_weights.to(dtype) * losses).sum()


def _default_rows(weight: Tensor) -> int:
    budget = _LOGIT_BYTES.get(weight.device.type, _LOGIT_BYTES_GPU)
    rows = budget // (4 * max(weight.shape[0], 1))
    return max(64, rows // 64 * 64)


def _even_rows(count: int, most: int) -> int:
    """Rows of a chunk so that as few chunks as possible have about as many each."""
    chunks = max(-(-count // most), 1)
    return max(-(-count // chunks), 1)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Job:
    """Non-differentiable inputs of one call."""

    def __init__(
        self,
        labels: Tensor,
        row_weights: Tensor | None,
        vocab_start: int,
        valid: int,
        rows: int,
        group: dist.ProcessGroup | None,
        with_gradients: bool,
        weight_gradient: Tensor | None,
        fused: bool,
    ) -> None:
        self.labels = labels
        self.row_weights = row_weights
        self.vocab_start = vocab_start
        self.valid = valid
        self.rows = rows
        self.group = group
        self.with_gradients = with_gradients
        self.weight_gradient = weight_gradient
        self.fused = fused


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> Tensor:
        dtype = _work_dtype(hidden)
        h, w = hidden.detach().contiguous(), weight.detach()
        loss = torch.zeros((), dtype=dtype, device=h.device)
        dh = dw = db = None
        if job.with_gradients and any(ctx.needs_input_grad[:3]):
            dh = torch.empty(h.shape, dtype=dtype, device=h.device)
            dw = torch.empty(w.shape, dtype=dtype, device=h.device)
            db = torch.zeros(w.shape[0], dtype=dtype, device=h.device) if bias is not None else None
        logit_dtype = h.dtype if job.fused else dtype
        buffer = torch.empty(min(job.rows, h.shape[0]) * w.shape[0], dtype=logit_dtype, device=h.device)
        pending: list[Any] = []
        for start in range(0, h.shape[0], job.rows):
            r = slice(start, min(start + job.rows, h.shape[0]))
            logits = buffer[: (r.stop - r.start) * w.shape[0]].view(-1, w.shape[0])
            _logits(h[r], w, logits)
            if job.fused:
                loss += _fused_chunk_loss(logits, bias, r, job, gradient=dh is not None)
            else:
                if bias is not None:
                    logits += bias.detach()
                loss += _chunk_loss(logits, r, job, gradient=dh is not None)
            if dh is None or dw is None:
                continue
            _hidden_gradient(logits, w, dh[r])  # logits are now dloss/dlogits
            _add_weight_gradient(logits, h[r], dw, first=start == 0)
            if db is not None:
                db += logits.sum(0, dtype=dtype)
            if job.group is not None:  # overlaps with the next chunk
                pending.append(dist.all_reduce(dh[r], group=job.group, async_op=True))
        for work in pending:
            work.wait()
        if dh is not None and dw is not None:
            if h.shape[0] == 0:
                dw.zero_()
            ctx.weight_gradient = job.weight_gradient
            saved_weight = dw if job.weight_gradient is not None else dw.to(w.dtype)
            saved_bias = db.to(bias.dtype) if db is not None and bias is not None else None
            ctx.save_for_backward(dh.to(h.dtype), saved_weight, saved_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.weight_gradient is None:
            return (*scaled_gradients(ctx, grad), None)
        dh, dw, db = ctx.saved_tensors
        ctx.weight_gradient.addcmul_(dw, grad)
        d_bias = None if db is None else (db * grad).to(db.dtype)
        return (dh * grad).to(dh.dtype), torch.empty_like(dw, dtype=dh.dtype), d_bias, None


def _chunk_loss(logits: Tensor, rows: slice, job: _Job, *, gradient: bool) -> Tensor:
    """Loss of one chunk; with ``gradient``, ``logits`` ``[c, V]`` is overwritten by dloss/dlogits."""
    labels, a = job.labels[rows], _factors(job, rows, logits.dtype)
    logits[:, job.valid :] = -torch.inf
    local = labels - job.vocab_start
    here = (local >= 0) & (local < job.valid)
    local = local.clamp(0, max(logits.shape[1] - 1, 0))[:, None]
    target = torch.where(here, logits.gather(1, local)[:, 0], 0.0)
    # Clamped: a shard of padding only has no finite logit, and its sum must come out as 0, its lse as -inf.
    largest = logits.amax(1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    total = logits.sub_(largest).exp_().sum(1)
    lse = largest[:, 0] + total.log()
    if job.group is not None:
        lse, target = _of_all_shards(lse, target, job.group)
    if gradient:  # a * (exp(logit - lse) - one_hot)
        logits.mul_((largest[:, 0] - lse).exp().mul_(a)[:, None])
        logits.scatter_add_(1, local, torch.where(here, -a, 0.0)[:, None])
    return torch.where(a != 0, a * (lse - target), 0.0).sum()


def _fused_chunk_loss(logits: Tensor, bias: Tensor | None, rows: slice, job: _Job, *, gradient: bool) -> Tensor:
    """The same in Triton, on logits of the inputs' dtype without their bias: one launch, or two around the gather."""
    labels, a = job.labels[rows], _factors(job, rows, torch.float32)
    shard = (job.vocab_start, job.valid)
    if gradient and job.group is None:
        lse, target = torch.ops.lcl.vocabulary_loss(logits, bias, labels, a, *shard)
        return torch.where(a != 0, a * (lse - target), 0.0).sum()
    lse, target = torch.ops.lcl.vocabulary_sums(logits, bias, labels, *shard)
    if job.group is not None:
        lse, target = _of_all_shards(lse, target, job.group)
    if gradient:
        torch.ops.lcl.vocabulary_gradient(logits, bias, labels, a, lse, *shard)
    return torch.where(a != 0, a * (lse - target), 0.0).sum()


def _factors(job: _Job, rows: slice, dtype: torch.dtype) -> Tensor:
    """Each row's weight, 0 where it is ignored."""
    counted = job.labels[rows] >= 0
    if job.row_weights is None:
        return counted.to(dtype)
    # where, not a product: an ignored row must give 0 whatever its weight is.
    return torch.where(counted, job.row_weights[rows].to(dtype), 0.0)


def _of_all_shards(lse: Tensor, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """One small gather and the same ordered sum on all ranks, instead of a max and a sum reduction."""
    parts = lse.new_empty((dist.get_world_size(group), 2, len(lse)))
    dist.all_gather_into_tensor(parts.view(-1), torch.stack([lse, target]).view(-1), group=group)
    return parts[:, 0].logsumexp(0), parts[:, 1].sum(0)


def _logits(x: Tensor, w: Tensor, out: Tensor) -> None:
    """``out = x @ w.T`` accumulated and stored in ``out``'s dtype (``out=`` also keeps autocast out)."""
    if x.dtype == out.dtype:
        torch.mm(x, w.T, out=out)
    elif x.device.type == "cpu":  # whose kernels round half precision results: widen blocks of words instead
        wide = x.to(out.dtype)
        with bf16_units(x.dtype == torch.bfloat16):
            for i in range(0, w.shape[0], 4096):
                torch.mm(wide, w[i : i + 4096].to(out.dtype).T, out=out[:, i : i + 4096])
    else:
        torch.mm(x, w.T, out_dtype=out.dtype, out=out)


def _hidden_gradient(g: Tensor, w: Tensor, out: Tensor) -> None:
    """``out = g @ w`` with half precision inputs, summed in ``out``'s dtype."""
    if w.dtype == out.dtype:
        torch.mm(g, w, out=out)
    elif g.device.type == "cpu":
        out.copy_(g.to(w.dtype) @ w)
    else:
        torch.mm(g.to(w.dtype), w, out_dtype=out.dtype, out=out)


def _add_weight_gradient(g: Tensor, x: Tensor, into: Tensor, *, first: bool) -> None:
    """``into += g.T @ x`` summed in ``into``'s dtype; the first time ``into`` holds nothing yet."""
    if g.device.type == "cpu" or x.dtype == into.dtype:
        wide = x.to(into.dtype)
        g = (g if x.dtype in (torch.bfloat16, into.dtype) else g.to(x.dtype)).to(into.dtype)
        with bf16_units(x.dtype == torch.bfloat16):
            torch.mm(g.T, wide, out=into) if first else into.addmm_(g.T, wide)
    elif first:
        torch.mm(g.to(x.dtype).T, x, out_dtype=into.dtype, out=into)
    else:
        torch.addmm(into, g.to(x.dtype).T, x, out_dtype=into.dtype, out=into)
