"""Image latents into the sequence and back, against loops of slices."""

from __future__ import annotations

import pytest
import torch
from lcl_kernels import (
    gather_image_latents,
    gather_image_latents_reference,
    scatter_image_latents,
    scatter_image_latents_reference,
)


def inputs(n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(20, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    latents = torch.randn(n, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    return embeddings, latents, torch.tensor([9, 0, 16])[:n]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_scatter_matches_the_loop(n: int) -> None:
    embeddings, latents, starts = inputs(n)
    ours, truth = (f(embeddings, latents, starts) for f in (scatter_image_latents, scatter_image_latents_reference))
    assert torch.equal(ours, truth)
    probe = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * probe).sum(), (embeddings, latents))
    expected = torch.autograd.grad((truth * probe).sum(), (embeddings, latents), allow_unused=True)
    assert torch.equal(grads[0], expected[0])
    assert torch.equal(grads[1], torch.zeros_like(latents) if expected[1] is None else expected[1])
    covered = torch.zeros(20, dtype=torch.bool)
    for start in starts.tolist():
        covered[start : start + 4] = True
    assert torch.equal(grads[0][covered], torch.zeros(int(covered.sum()), 6, dtype=torch.float64))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_gather_matches_the_loop_and_inverts_scatter(n: int) -> None:
    embeddings, latents, starts = inputs(n)
    ours = gather_image_latents(embeddings, starts, 4)
    truth = gather_image_latents_reference(embeddings, starts, 4)
    assert ours.shape == (n, 4, 6)
    assert torch.equal(ours, truth)
    probe = torch.randn_like(ours)
    (grad,) = torch.autograd.grad((ours * probe).sum(), embeddings)
    (expected,) = torch.autograd.grad((truth * probe).sum(), embeddings)
    assert torch.equal(grad, expected)
    placed = scatter_image_latents(embeddings, latents, starts)
    assert torch.equal(gather_image_latents(placed, starts, 4), latents)


def test_gradcheck() -> None:
    embeddings, latents, starts = inputs()
    assert torch.autograd.gradcheck(lambda e, x: scatter_image_latents(e, x, starts), (embeddings, latents))
    assert torch.autograd.gradcheck(lambda e: gather_image_latents(e, starts, 4), (embeddings,))


def test_latents_take_the_dtype_of_the_sequence() -> None:
    embeddings, latents, starts = inputs()
    out = scatter_image_latents(embeddings.bfloat16(), latents.float(), starts)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[9:13], latents[0].bfloat16())


def test_wrong_arguments_are_named() -> None:
    embeddings, latents, starts = inputs()
    with pytest.raises(ValueError, match=r"\[n, p, h\]"):
        scatter_image_latents(embeddings, latents[:, :, :5], starts)
    with pytest.raises(ValueError, match="integers"):
        scatter_image_latents(embeddings, latents, starts[:2])
    with pytest.raises(IndexError, match="leaves the sequence"):
        scatter_image_latents(embeddings, latents, starts + 1)
    with pytest.raises(IndexError, match="leaves the sequence"):
        gather_image_latents(embeddings, starts - 1, 4)
    with pytest.raises(ValueError, match=r"\[t, h\]"):
        gather_image_latents(latents, starts, 4)
