"""Parts that every implementation of the contrastive loss shares: operands, keys, per-pair terms.

Shape legend used in this package
    N     pairs of the whole batch (all ranks); n: pairs of this rank; M, K: rows and columns of a block
    D     embedding width
    s     logit scale (the exponential of the learned parameter)
    S_ij  logit s * <image_i, text_j>
    E_ij  exp(S_ij) for negatives, 0 for the positive (i = j) and for masked pairs
    w_i   weight of pair i; the loss of N equally weighted pairs has w_i = 1/N

Why the positives are kept out of the sums: with ``lr_i = log sum_j E_ij`` over negatives only, the row
loss is ``softplus(lr_i - S_ii)`` and its derivative is a sigmoid. Both keep full relative accuracy when
the positive dominates; ``logsumexp - S_ii`` over all columns subtracts two nearly equal numbers there.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

Precision = Literal["fp32", "tf32x3", "fp16", "bf16"]
Impl = Literal["auto", "reference", "tiled", "triton"]

FP16_GAIN = 2.0**14
"""Factor on gradient entries before rounding to fp16: entries lie in [0, 2], so 2 * 2^14 < 65504 still
fits, and the many entries near 1/N leave fp16's subnormal range."""
KEPT_BYTES = 1 << 28
"""Exponentials that a loss may keep from its sums to its gradients on a CPU: all of them up to N = 8192 in fp32."""


class Block(Protocol):
    """Rows against columns of one step, as :class:`lcl_kernels.tiled.TiledBlock` states it."""

    def lse(self, *, columns: bool = True) -> tuple[Tensor, Any]: ...

    def gradients(self, row: Tensor, col: Tensor, *, want_y: bool = True) -> tuple[Tensor, Any]: ...


class Engine(Protocol):
    """A class of blocks."""

    name: str
    """As ``impl`` has it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Block: ...


def check_choice(name: str, value: str, allowed: object) -> None:
    """Raise ``ValueError`` naming the argument, its value and what is allowed."""
    options = get_args(allowed)
    if value not in options:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(options)}")


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any operand is fp64 (tests, gradcheck), else fp32: the dtype of sums, losses and gradients."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def operand(x: Tensor, precision: Precision, dtype: torch.dtype) -> Tensor:
    """The embedding as the matrix unit sees it: rounded to ``precision="fp16"`` or "bf16", else the work dtype.

    Where both are to be had, fp16: normalised embeddings have |x| <= 1, so fp16's range is enough and its error is
    8x smaller at the same speed. bf16 is for CPUs, whose matrix units know nothing else.
    """
    if dtype != torch.float64:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, dtype)
    return x.detach().to(dtype).contiguous()


def check_embeddings(image: Tensor, text: Tensor) -> None:
    """Raise ``ValueError`` unless both are floating ``[n, D]`` tensors of one shape on one device."""
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(
            f"image {tuple(image.shape)} and text {tuple(text.shape)} must both be [n, D] with equal n and D"
        )
    if not (image.is_floating_point() and text.is_floating_point()):
        raise ValueError(f"embeddings must be floating point, not {image.dtype} and {text.dtype}")
    if image.device != text.device:
        raise ValueError(f"image is on {image.device}, text on {text.device}: both must be on one device")


def as_scale(scale: Tensor | float, like: Tensor) -> Tensor:
    """The logit scale as a 0-dim tensor on the embeddings' device; keeps its place in the autograd graph."""
    if not isinstance(scale, Tensor):
        # full, not tensor: filling on the device does not wait for it.
        return torch.full((), scale, dtype=work_dtype(like), device=like.device)
    if scale.numel() != 1:
        raise ValueError(f"scale has shape {tuple(scale.shape)}: it must hold one number")
    return scale.reshape(())


def unmasked_keys(ids: Tensor, groups: Tensor | None) -> Tensor:
    """One int64 per row such that a pair (i, j) is *not* a negative exactly when the keys are equal.

    Args:
        ids: ``[n]`` integer, the pair's global number; image i and text i share it.
        groups: ``[n]`` integer or None. Rows with the same id >= 0 are not each other's negatives (same
            document, duplicate image); a negative id means "in no group".
    """
    ids = ids.to(torch.int64)
    if groups is None:
        return ids
    if groups.shape != ids.shape or groups.is_floating_point():
        raise ValueError(f"group_ids must be {tuple(ids.shape)} integers, not {tuple(groups.shape)} {groups.dtype}")
    # -1 - id is negative and unique to the pair, so it can collide with no group.
    return torch.where(groups < 0, -1 - ids, groups.to(torch.int64))


def dense_keys(*keys: Tensor) -> tuple[Tensor, ...]:
    """Replace 64-bit keys by int32 ranks that keep equality across all given tensors.

    Kernels then compare 32-bit integers whatever the caller's ids are (hashes, say). Sorting and counting
    keeps this exact and, unlike ``torch.unique``, needs no host synchronisation.
    """
    joined = torch.cat(keys)
    order = torch.argsort(joined, stable=True)
    ranked = joined[order]
    step = torch.zeros_like(joined, dtype=torch.int32)
    step[1:] = (ranked[1:] != ranked[:-1]).to(torch.int32)
    dense = torch.empty_like(step)
    dense[order] = step.cumsum(0).to(torch.int32)
    return dense.split([len(k) for k in keys])


class PairTerms(NamedTuple):
    """What the row/column sums and the positive logits of ``n`` pairs determine (all ``[n]`` but
    ``loss``)."""

    loss: Tensor
    """0-dim: sum of v_i/2 * (row loss + column loss)."""
    row: Tensor
    """logaddexp(lr, S_ii) - log v: a negative's row term is exp(S_ij - row_i) <= v_i."""
    col: Tensor
    """The same for columns."""
    diagonal: Tensor
    """Twice the derivative of the loss with respect to S_ii."""


def pair_terms(lr: Tensor, lc: Tensor, positive: Tensor, v: Tensor | None) -> PairTerms:
    """Losses and gradient normalisers of ``n`` pairs.

    Args:
        lr, lc: ``[n]`` log-sum-exp over the negatives of the pair's row and column (-inf: no negatives).
        positive: ``[n]`` logits S_ii.
        v: ``[n]`` weights in [0, 1], or None for 1.

    Returns:
        :class:`PairTerms` in units of v, that is before the factor ``max(w)`` of the true weights.
    """
    row_margin, col_margin = lr - positive, lc - positive
    zero = torch.zeros_like(positive)
    # logaddexp(x, 0) is softplus without torch's cut-over at 20, and gives 0 for x = -inf.
    losses = torch.logaddexp(row_margin, zero) + torch.logaddexp(col_margin, zero)
    diagonal = -(torch.sigmoid(row_margin) + torch.sigmoid(col_margin))
    row, col = torch.logaddexp(lr, positive), torch.logaddexp(lc, positive)
    if v is not None:
        losses, diagonal = losses * v, diagonal * v
        # Folding the weight into the exponent leaves one number per row for kernels and for the wire.
        log_v = torch.log(v)
        row, col = row - log_v, col - log_v
    return PairTerms(0.5 * losses.sum(), row, col, diagonal)


def row_dot(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n]`` products <x_i, y_i> in ``dtype`` of the same rounded operands that the kernels read."""
    return (x.to(dtype) * y.to(dtype)).sum(1)


def add_positive(gradient: Tensor, diagonal: Tensor, other: Tensor) -> None:
    """Add the positives' term ``diagonal_i * other_i`` to row i in place; it never passes fp16."""
    gradient.addcmul_(diagonal[:, None], other.to(gradient.dtype))


def total_dot(gradient: Tensor, x: Tensor, rows: int = 8192) -> Tensor:
    """0-dim ``sum_i <gradient_i, x_i>``, a bounded number of rows at a time.

    dL/ds = sum_ij dL/dS_ij <x_i, y_j> equals this sum over ``gradient_i = sum_j dL/dS_ij y_j``. Taking it
    from the finished gradient costs N D instead of a reduction in the epilogue of every tile.
    """
    total = torch.zeros((), dtype=gradient.dtype, device=gradient.device)
    for start in range(0, gradient.shape[0], rows):
        part = slice(start, start + rows)
        total += row_dot(gradient[part], x[part], gradient.dtype).sum()
    return total


def scaled_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """What an autograd function saved in forward as its inputs' gradients, times the incoming gradient.

    When the graph is not kept, nobody can ask for the saved tensors again: they are scaled in place and
    handed over, which halves the peak (gradients are the largest thing these losses allocate). Whether it
    is kept is known to a private function of torch only; without it, assume so and copy.
    """
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    results: list[Tensor | None] = []
    for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False):
        if saved is None or not needed:
            results.append(None)
        else:
            results.append((saved * grad).to(saved.dtype) if kept else saved.mul_(grad))
    return tuple(results)
