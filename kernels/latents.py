"""Placing image latents in a token sequence and reading them back.

Shapes: t tokens, h hidden width, n images, p latents per image; ``starts[i]`` is the position of image i's
first latent, its run is ``[starts[i], starts[i] + p)``. Runs must lie inside the sequence and must not
overlap; on CUDA that is the caller's promise, since checking it would wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scatter_image_latents(embeddings: Tensor, latents: Tensor, starts: Tensor) -> Tensor:
    """Copy of ``embeddings`` with every image's run replaced by its latents.

    Args:
        embeddings: ``[t, h]`` token embeddings; positions inside runs get no gradient.
        latents: ``[n, p, h]``; converted to the dtype of ``embeddings``.
        starts: ``[n]`` integer positions.

    Returns:
        ``[t, h]``. With n = 0 both inputs stay connected to autograd.

    Raises:
        ValueError: shapes that do not fit. IndexError: on a CPU, a run outside the sequence.
    """
    if embeddings.dim() != 2 or latents.dim() != 3 or latents.shape[2] != embeddings.shape[1]:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} must be [t, h], latents {tuple(latents.shape)} [n, p, h]"
        )
    index = run_positions(starts, latents.shape[0], latents.shape[1])
    _check_on_host(index, embeddings.shape[0])
    return embeddings.index_copy(0, index, latents.reshape(-1, latents.shape[2]).to(embeddings.dtype))


def gather_image_latents(sequence: Tensor, starts: Tensor, length: int) -> Tensor:
    """The inverse: ``[n, length, h]`` runs of ``sequence`` ``[t, h]``; gradients return to those positions.

    Raises:
        ValueError: shapes that do not fit. IndexError: on a CPU, a run outside the sequence.
    """
    if sequence.dim() != 2:
        raise ValueError(f"sequence {tuple(sequence.shape)} must be [t, h]")
    index = run_positions(starts, starts.shape[0], length)
    _check_on_host(index, sequence.shape[0])
    rows: Tensor = _GatherRows.apply(sequence, index)
    return rows.view(starts.shape[0], length, sequence.shape[1])


def run_positions(starts: Tensor, count: int, length: int) -> Tensor:
    """``[n * length]`` int64 positions of all runs, image by image."""
    if starts.shape != (count,) or starts.is_floating_point():
        raise ValueError(f"starts {tuple(starts.shape)} {starts.dtype} must be [{count}] integers")
    steps = torch.arange(length, device=starts.device, dtype=torch.int64)
    return (starts.to(torch.int64)[:, None] + steps).view(-1)


def scatter_image_latents_reference(embeddings: Tensor, latents: Tensor, starts: Tensor) -> Tensor:
    """:func:`scatter_image_latents` as a loop of slices."""
    result = embeddings.clone()
    for image, start in zip(latents, starts.tolist(), strict=True):
        result[start : start + latents.shape[1]] = image.to(embeddings.dtype)
    return result


def gather_image_latents_reference(sequence: Tensor, starts: Tensor, length: int) -> Tensor:
    """:func:`gather_image_latents` as a loop of slices."""
    if starts.numel() == 0:
        return sequence[:0].view(0, length, sequence.shape[1]) if length else sequence.new_empty((0, 0, 0))
    return torch.stack([sequence[start : start + length] for start in starts.tolist()])


def _check_on_host(index: Tensor, size: int) -> None:
    if index.device.type == "cpu" and index.numel() and not (int(index.min()) >= 0 and int(index.max()) < size):
        raise IndexError(f"an image run leaves the sequence of {size} positions")


class _GatherRows(torch.autograd.Function):
    """index_select for distinct positions; its built-in backward adds with atomics, this one copies."""

    @staticmethod
    def forward(ctx: Any, sequence: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = sequence.shape
        return sequence.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, index, grad), None
