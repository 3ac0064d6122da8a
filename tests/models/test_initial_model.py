"""Numbers of the paper's initial model that docs/paper.md states, at the widths of its recipes with fewer blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lcl_kernels import residual_branch
from torch import Tensor

from lcl_mcore.build import cast
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.models import layers
from lcl_mcore.models.lcl import LclModel

Build = Callable[..., LclModel]


def first_pass(
    build: Build, monkeypatch: pytest.MonkeyPatch, recipe: str, layer_scale: float | None, dropout: bool = False
) -> tuple[LclModel, Tensor, list[float]]:
    """The model in bf16, its image latents, and the share of the residual stream that each branch leaves as it is."""
    shape = load_recipe(recipe).model
    vision = dataclasses.replace(shape.vision, layers=2, layer_scale=layer_scale, drop_path=0.0)
    shape = dataclasses.replace(shape, vision=vision, language=dataclasses.replace(shape.language, layers=1))
    model = build(shape, train=False)
    cast(model, "bf16")
    unchanged = []

    def observed(residual: Tensor, branch: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        total, normed = residual_branch(residual, branch, **options)
        unchanged.append(float((total == residual).float().mean()))
        return total, normed

    monkeypatch.setattr(layers, "residual_branch", observed)
    coarse = torch.rand(2, 3, 14, 14, generator=torch.Generator().manual_seed(1)) * 255
    images = torch.nn.functional.interpolate(coarse, size=224, mode="bicubic").clamp(0, 255).to(torch.uint8)
    with torch.no_grad():
        latents = model.encode_images(images, torch.arange(2), 0).latents
    return model, latents.float(), unchanged


@pytest.mark.parametrize(
    ("recipe", "size"), [("paper-l14", 0.339), ("paper-b16", 0.332), ("released-b16-laion", 0.336)]
)
def test_image_latents_are_17_times_larger_than_token_embeddings(
    build: Build, monkeypatch: pytest.MonkeyPatch, recipe: str, size: float
) -> None:
    scale = load_recipe(recipe).model.vision.layer_scale
    model, latents, _ = first_pass(build, monkeypatch, recipe, scale)
    rms = float(latents.square().mean().sqrt())
    embedding = float(model.language.token_embedding.weight.detach().float().std())
    assert rms == pytest.approx(size, rel=0.03)
    assert embedding == pytest.approx(0.02, rel=0.01)
    assert rms / embedding == pytest.approx(16.8, abs=0.6)


def test_bf16_sees_the_layer_scale_of_the_recipes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CaiT's 1e-5 nearly all of the residual stream would come out of a block as it went in."""
    scale = load_recipe("paper-l14").model.vision.layer_scale
    assert scale == 0.1
    for value, low, high in ((scale, 0.05, 0.25), (1e-5, 0.999, 1.0)):
        _, _, unchanged = first_pass(build, monkeypatch, "paper-l14", value)
        assert len(unchanged) == 4
        assert all(low < share < high for share in unchanged), (value, unchanged)


def test_one_norm_serves_both_losses(build: Build) -> None:
    shape = load_recipe("paper-b16").model
    small = dataclasses.replace(shape.language, layers=1, vocab_size=300)
    shape = dataclasses.replace(shape, vision=dataclasses.replace(shape.vision, layers=1), language=small)
    model = build(shape)
    assert model.language.norm_head is None
    hidden, positions = torch.randn(5, 768), torch.tensor([1, 3])
    with torch.no_grad():
        model.language.norm_final.weight.mul_(2.0)
        targets = model.language.targets(hidden, positions)
        contexts = model.language.contexts(hidden, positions)
    assert torch.allclose(contexts, targets @ model.language.context_projection, atol=1e-4)


def test_embeddings_are_not_dropped(build: Build) -> None:
    """Training with the recipes' dropout leaves image latents and tokens whole on their way into the LM."""
    language = load_recipe("paper-l14").model.language
    assert (language.dropout, language.embedding_dropout) == (0.1, 0.0)
    from batches import OPT, micro_batch

    shape = dataclasses.replace(OPT, language=dataclasses.replace(OPT.language, dropout=0.1))
    dropping = dataclasses.replace(shape, language=dataclasses.replace(shape.language, embedding_dropout=0.1))
    batch = micro_batch(shape, [[(8, "i", 9)]])
    model, seen = build(shape), list[Tensor]()
    model.language.blocks.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.language.shape = shape.language
    with torch.no_grad():
        model(batch)
        model.language.shape = dropping.language
        model(batch)
    shares = [float((x == 0).float().mean()) for x in seen]
    assert shares[0] == 0.0
    assert shares[1] == pytest.approx(0.1, abs=0.03)
