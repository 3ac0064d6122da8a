"""The contrastive loss as its formula: full matrix, plain autograd. The oracle of every test."""

from __future__ import annotations

import math

import torch
from lcl_kernels._pair_terms import as_scale, check_embeddings, unmasked_keys, work_dtype
from torch import Tensor


def infonce_reference(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    weights: Tensor | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    """Symmetrical InfoNCE (CLIP, arXiv:2103.00020, figure 3) with pair weights and masked negatives.

    ``L = sum_i w_i/2 * (logsumexp_j S_ij - S_ii + logsumexp_j S_ji - S_ii)`` with ``S = scale * image @
    text.T``, where pairs i != j of one group are excluded from both sums.

    Args:
        image, text: ``[N, D]`` normalised embeddings; computed in fp64 if one is fp64, else fp32.
        scale: logit scale, 0-dim tensor or number.
        weights: ``[N]`` pair weights >= 0, default 1/N each.
        group_ids: ``[N]`` integers; equal ids >= 0 are not negatives of each other.

    Returns:
        0-dim loss in the work dtype, differentiable any number of times. Memory: about 4 N^2 numbers.
    """
    check_embeddings(image, text)
    dtype = work_dtype(image, text)
    n = image.shape[0]
    image, text, s = image.to(dtype), text.to(dtype), as_scale(scale, image).to(dtype)
    if n == 0:
        return (image.sum() + text.sum()) * s * 0.0
    logits = s * (image @ text.T)
    if group_ids is not None:
        keys = unmasked_keys(torch.arange(n, device=image.device), group_ids)
        same = (keys[:, None] == keys[None, :]).fill_diagonal_(False)
        logits = logits.masked_fill(same, -math.inf)
    losses = logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()
    if weights is None:
        return 0.5 * losses.mean()
    return 0.5 * (weights.to(dtype) * losses).sum()
