"""``infonce``: the contrastive loss of one device, one function over three implementations.

Gradient convention (one for the whole package): the gradient of the returned loss with respect to ``image``,
``text`` and ``scale``, nothing averaged or rescaled. Gradients are formed in the forward call and only
multiplied by the incoming gradient in backward, so backward launches no kernel of note and no collective.
``weights`` and ``group_ids`` are constants. Double backward is refused.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from lcl_kernels._pair_terms import (
    KEPT_BYTES,
    Engine,
    Impl,
    Precision,
    add_positive,
    as_scale,
    check_choice,
    check_embeddings,
    dense_keys,
    operand,
    pair_terms,
    row_dot,
    scaled_gradients,
    total_dot,
    unmasked_keys,
    work_dtype,
)
from lcl_kernels.reference import infonce_reference
from lcl_kernels.tiled import TiledBlock
from torch import Tensor
from torch.autograd.function import once_differentiable


def infonce(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    weights: Tensor | None = None,
    group_ids: Tensor | None = None,
    impl: Impl = "auto",
    precision: Precision = "fp32",
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Symmetrical InfoNCE over all N x N pairs without storing them.

    ``L = sum_i w_i/2 * (log sum_j exp(S_ij - S_ii) + log sum_j exp(S_ji - S_ii))``, ``S = scale * image @
    text.T`` (CLIP, arXiv:2103.00020). Pairs i != j with equal group id are excluded from both sums.

    Args:
        image, text: ``[N, D]`` fp16, bf16, fp32 or fp64, L2-normalised by the caller (not required for
            correctness). N = 0 gives 0, connected to autograd; N = 1 gives 0 with zero gradients.
        scale: logit scale (not its logarithm), 0-dim tensor or number; gets a gradient if it asks for one.
        weights: ``[N]`` pair weights >= 0; default 1/N each (the mean).
        group_ids: ``[N]`` integers; rows with one id >= 0 are not negatives of each other. A negative id is a
            row without a group. 64-bit content hashes are fine.
        impl: "reference" (full matrix), "tiled" (torch, memory O(N D)), "triton" (CUDA), or "auto": triton on
            CUDA where it can be imported, else tiled.
        precision: "fp32"; "tf32x3", fp32-like accuracy on tensor cores (same as "fp32" outside Triton);
            "fp16", embeddings rounded once to fp16, all sums in fp32; "bf16", the same in bf16, which CPUs with
            such units multiply 3 to 4 times as fast. "reference" and fp64 inputs ignore it.
        tile: rows and columns of a logit tile in "tiled"; rows per gradient chunk (first number) in "triton".

    Returns:
        0-dim loss, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an unknown ``impl`` or ``precision``.
    """
    check_embeddings(image, text)
    check_choice("precision", precision, Precision)
    engine = select_engine(impl, image)
    if weights is not None and weights.shape != image.shape[:1]:
        raise ValueError(f"weights {tuple(weights.shape)} must be [{image.shape[0]}]")
    if engine is None:
        return infonce_reference(image, text, scale, weights=weights, group_ids=group_ids)
    options = _Options(engine, precision, weights, group_ids, tile, torch.is_grad_enabled())
    loss: Tensor = _InfoNCE.apply(image, text, as_scale(scale, image), options)
    return loss


def select_engine(impl: Impl, like: Tensor) -> Engine | None:
    """The class of blocks that serves these tensors; None means the reference.

    Raises:
        ValueError: unknown ``impl``, or "triton" asked for where it cannot run.
    """
    check_choice("impl", impl, Impl)
    if impl == "reference":
        return None
    if impl == "tiled" or (impl == "auto" and not _triton_runs(like)):
        return TiledBlock
    try:
        from lcl_kernels.triton_engine import TritonBlock
    except ImportError as error:
        if impl == "auto":
            return TiledBlock
        raise ValueError('impl="triton" needs the triton package; install it or use impl="tiled"') from error
    if not _triton_runs(like):
        raise ValueError(f'impl="triton" cannot run on {like.dtype} on {like.device}; use impl="tiled"')
    return TritonBlock


def _triton_runs(like: Tensor) -> bool:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return like.dtype != torch.float64 and (like.is_cuda or interpreted)


class _Options:
    """Non-differentiable inputs of one call."""

    def __init__(
        self,
        engine: Engine,
        precision: Precision,
        weights: Tensor | None,
        group_ids: Tensor | None,
        tile: tuple[int, int] | None,
        with_gradients: bool,
    ) -> None:
        self.engine = engine
        self.precision = precision
        self.weights = weights
        self.group_ids = group_ids
        self.tile = tile
        self.with_gradients = with_gradients


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, options: _Options) -> Tensor:
        dtype = work_dtype(image, text)
        n, device = image.shape[0], image.device
        s = scale.detach().to(dtype)
        wanted = options.with_gradients and any(ctx.needs_input_grad[:3])
        if n == 0:
            ctx.save_for_backward(torch.zeros_like(image), torch.zeros_like(text), torch.zeros_like(scale))
            return torch.zeros((), dtype=dtype, device=device)
        x, y = operand(image, options.precision, dtype), operand(text, options.precision, dtype)
        ids = torch.arange(n, device=device, dtype=torch.int32)
        if options.group_ids is None:
            keys = ids
        else:
            (keys,) = dense_keys(unmasked_keys(ids, options.group_ids.to(device)))
        v: Tensor | None = None
        unit: Tensor | float = 1.0 / n
        if options.weights is not None:
            w = options.weights.detach().to(device, dtype)
            # All weights zero: divide by the smallest normal number, not by zero.
            unit = w.max().clamp_min(torch.finfo(dtype).tiny)
            v = w / unit
        keep = KEPT_BYTES if wanted else 0
        block = options.engine(x, y, keys, keys, s, tile=options.tile, precision=options.precision, keep=keep)
        lr, lc = block.lse()
        cos = row_dot(x, y, dtype)
        terms = pair_terms(lr, lc, s * cos, v)
        if wanted:
            dx, dy = block.gradients(terms.row, terms.col)
            add_positive(dx, terms.diagonal, y)
            add_positive(dy, terms.diagonal, x)
            k = 0.5 * unit
            ds = k * total_dot(dx, x)
            ctx.save_for_backward(dx.mul_(s * k).to(image.dtype), dy.mul_(s * k).to(text.dtype), ds.to(scale.dtype))
        return terms.loss * unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad), None)
