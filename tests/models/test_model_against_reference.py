"""`LclModel` against the plain model of `reference_model`: features, losses, and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lcl_kernels import infonce_reference, linear_cross_entropy_reference
from torch import Tensor

from batches import SHAPES, Document, micro_batch
from lcl_mcore.batch import MicroBatch
from lcl_mcore.models.lcl import LclModel
from reference_model import ReferenceLcl, reference_grads_as_lcl, worst_gradient

Build = Callable[..., LclModel]

ROWS: dict[str, list[list[Document]]] = {
    "ragged": [[(5, "i", 3, "i", 4), ("i", 6)], [("i", 2, "i", "i", 3), (9,)], [(4, "i")]],
    "uniform": [[(30,)], [(11, "i", 9 + 4)], [(30,)]],
    "one image": [[(5, "i", 3)], [(20,)]],
    "no image": [[(5,), (7,)], [(20,)]],
}


def lcl_losses(model: LclModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Both losses of one process's batch, on `LclModel`'s outputs and the formulas of `lcl_kernels`."""
    features, hidden = model(batch)
    image, context = model.image_embeds(batch, features.vectors), model.context_embeds(batch, hidden)
    contrastive = infonce_reference(image, context, model.temperature())
    total = linear_cross_entropy_reference(
        model.language.targets(hidden, batch.target_positions),
        model.language.head_weight,
        batch.target_labels,
        valid_vocab=model.shape.language.vocab_size,
    )
    generation = total / max(len(batch.target_positions), 1)
    return contrastive, generation


def both(build: Build, name: str, seed: int = 3) -> tuple[LclModel, ReferenceLcl]:
    model = build(SHAPES[name], seed, train=False, noise=0.1)
    reference = ReferenceLcl(SHAPES[name])
    reference.load_lcl_state(model.state_dict())
    return model, reference


def close(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))


@pytest.mark.parametrize("name", SHAPES)
def test_features_and_hidden_states_equal_the_reference(build: Build, name: str) -> None:
    model, reference = both(build, name)
    batch = micro_batch(SHAPES[name], ROWS["ragged"])
    with torch.no_grad():
        features, hidden = model(batch)
        vectors, latents = reference.encode(batch.images)
        assert close(features.vectors, vectors) < 1e-5
        assert close(features.latents, latents) < 1e-5
        expected = reference.read(batch, latents)
        assert close(hidden, expected) < 1e-5
        ours = model.context_embeds(batch, hidden)
        context = F.normalize(reference.contexts(expected, batch.context_positions), dim=-1)
        assert ours.shape == (5, SHAPES[name].language.width)  # 7 images, 2 of them first in a document
        assert close(ours, context) < 1e-5


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SHAPES)
def test_losses_and_every_gradient_equal_the_reference(build: Build, name: str, rows: str) -> None:
    model, reference = both(build, name)
    batch = micro_batch(SHAPES[name], ROWS[rows], seed=1)
    ours, theirs = lcl_losses(model, batch), reference.losses([batch])
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.isfinite(mine)
        assert abs(mine.item() - expected.item()) < 1e-5 * max(abs(expected.item()), 1e-3)
    (0.1 * ours[0] + ours[1]).backward()
    (0.1 * theirs[0] + theirs[1]).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert [n for n, grad in grads.items() if grad is None] == []
    worst, name_of_worst = worst_gradient(grads, reference_grads_as_lcl(reference))
    assert worst < 1e-5, name_of_worst


def test_each_shape_has_the_loss_terms_that_distinguish_it(build: Build) -> None:
    """Gradients of the padding rows of the vocabulary are exactly zero; unused position rows too."""
    for name, shape in SHAPES.items():
        model, _ = both(build, name)
        batch = micro_batch(shape, ROWS["ragged"])
        torch.stack(lcl_losses(model, batch)).sum().backward()
        head = model.language.head_weight.grad
        assert head is not None
        assert head.shape[0] == 384
        assert head[shape.language.vocab_size :].abs().max() == 0
        assert head[: shape.language.vocab_size].abs().min(dim=1).values.max() > 0
        positions = model.language.position_embedding.grad
        assert positions is not None
        assert positions[: shape.language.position_offset].abs().sum() == 0
        assert positions[shape.language.position_offset].abs().max() > 0


def test_reference_means_over_images_and_over_ranks(build: Build) -> None:
    """Ragged ranks: the two means differ, and each equals its definition on the logits."""
    _, reference = both(build, "clip")
    shape = SHAPES["clip"]
    ranks: list[MicroBatch | list[MicroBatch]] = [
        micro_batch(shape, [[(5, "i", 3, "i", 4)], [(3, "i")]], seed=1),
        micro_batch(shape, [[(6,)], [("i", 2)]], seed=2),
        [micro_batch(shape, [[(3, "i", 2)]], seed=3), micro_batch(shape, [[(3, "i"), (2, "i")]], seed=4)],
    ]
    with torch.no_grad():
        per_image, per_token = reference.losses(ranks)
        per_rank, per_rank_token = reference.losses(ranks, "rank")
        everything = [b for held in ranks for b in ([held] if isinstance(held, MicroBatch) else held)]
        vectors, contexts, nll = [], [], []
        for b in everything:
            pooled, latents = reference.encode(b.images)
            hidden = reference.read(b, latents)
            vectors.append(F.normalize(pooled[b.context_images], dim=-1))
            contexts.append(F.normalize(reference.contexts(hidden, b.context_positions), dim=-1))
            logits = reference.logits(hidden, b.target_positions)
            nll.append(F.cross_entropy(logits, b.target_labels, reduction="none"))
        scores = reference.logit_scale.exp() * torch.cat(vectors) @ torch.cat(contexts).T
        target = torch.arange(6)
        losses = (
            F.cross_entropy(scores, target, reduction="none") + F.cross_entropy(scores.T, target, reduction="none")
        ) / 2
        assert len(losses) == 6  # 3 on the first rank, none on the second, 3 on the third
        torch.testing.assert_close(per_image, losses.mean())
        torch.testing.assert_close(per_rank, (losses[:3].mean() + losses[3:].mean()) / 2)
        torch.testing.assert_close(per_token, torch.cat(nll).mean())
        by_rank = (nll[0].mean() + nll[1].mean() + torch.cat(nll[2:]).mean()) / 3
        torch.testing.assert_close(per_rank_token, by_rank)
        assert abs(float(per_token - per_rank_token)) > 1e-4
