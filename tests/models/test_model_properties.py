"""Properties that hold whatever the weights are, the initial weights, and the keyed masks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from lcl_kernels import infonce_reference, linear_cross_entropy_reference
from torch import Tensor

from batches import CLIP, OPT, SHAPES, Document, micro_batch, with_rates
from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.schema import ModelConfig
from lcl_mcore.models.attention import make_segments
from lcl_mcore.models.layers import draw_masks
from lcl_mcore.models.lcl import INITIAL_LOG_SCALE, LclModel, image_multiple
from lcl_mcore.rng import uniform

Build = Callable[..., LclModel]
names = pytest.mark.parametrize("name", SHAPES)


def contexts(model: LclModel, batch: MicroBatch) -> Tensor:
    with torch.no_grad():
        return model.context_embeds(batch, model(batch)[1])


def losses(model: LclModel, batch: MicroBatch, seed: int = 0) -> tuple[Tensor, Tensor]:
    features, hidden = model(batch, seed)
    contrastive = infonce_reference(
        model.image_embeds(batch, features.vectors), model.context_embeds(batch, hidden), model.temperature()
    )
    generation = linear_cross_entropy_reference(
        model.language.targets(hidden, batch.target_positions),
        model.language.head_weight,
        batch.target_labels,
        valid_vocab=model.shape.language.vocab_size,
    )
    return contrastive, generation / max(len(batch.target_positions), 1)


@names
def test_uniform_attention_pools_to_the_mean_of_the_projected_latents(build: Build, name: str) -> None:
    model = build(SHAPES[name], noise=0.1)
    with torch.no_grad():
        model.pool.linear_q.weight.zero_()
        model.pool.linear_q.bias.zero_()
        batch = micro_batch(SHAPES[name], [[(3, "i", 2, "i")]])
        features, _ = model(batch)
    assert float((features.vectors - features.latents.mean(1)).abs().max()) < 1e-6


@names
def test_an_image_changes_later_contexts_of_its_document_only(build: Build, name: str) -> None:
    model = build(SHAPES[name], train=False, noise=0.1)
    batch = micro_batch(SHAPES[name], [[(5, "i", 3, "i", 4, "i")], [(4, "i", 2), (2, "i", "i")]])
    before = contexts(model, batch)
    images = batch.images.clone()
    images[1] = 255 - images[1]  # the second image of the first document
    change = (contexts(model, dataclasses.replace(batch, images=images)) - before).abs().amax(1)
    assert change[[0, 1, 3, 4, 5]].max() == 0.0
    assert change[2] > 1e-3


@names
def test_a_document_is_read_alike_alone_and_packed(build: Build, name: str) -> None:
    model = build(SHAPES[name], train=False, noise=0.1)
    document: Document = (4, "i", 3)
    packed = micro_batch(SHAPES[name], [[(7,), document, (5, "i")], [(11, "i", 6)]], seed=5)
    start = packed.lengths[0]
    length = packed.lengths[1]
    alone = micro_batch(SHAPES[name], [[document]], row_length=length)
    alone = dataclasses.replace(alone, tokens=packed.tokens[start : start + length], images=packed.images[:1])
    with torch.no_grad():
        difference = model(packed)[1][start : start + length] - model(alone)[1]
    assert float(difference.abs().max()) < 2e-5


@names
def test_padding_does_not_change_the_losses(build: Build, name: str) -> None:
    model = build(SHAPES[name], train=False, noise=0.1)
    rows: list[list[Document]] = [[(5, "i", 3), (4, "i")], [(6, "i", 2)]]
    with torch.no_grad():
        short = losses(model, micro_batch(SHAPES[name], rows, row_length=40))
        long = losses(model, micro_batch(SHAPES[name], rows, row_length=64))
    for a, b in zip(short, long, strict=True):
        assert float(abs(a - b)) < 2e-6 * float(a)


def test_an_image_without_context_enters_the_generation_loss_only(build: Build) -> None:
    model = build(CLIP, train=False, noise=0.1)
    first: list[list[Document]] = [[(5, "i", 3, "i", 4)]]
    with torch.no_grad():
        small = micro_batch(CLIP, first)
        large = micro_batch(CLIP, [*first, [("i", 9)]])
        large = dataclasses.replace(large, images=torch.cat((small.images, large.images[2:])))
        without, with_one = losses(model, small), losses(model, large)
        index0 = micro_batch(CLIP, [*first, [("i", 9)]], context_rule="index0")
    assert len(index0.context_positions) == 3
    assert with_one[0].item() == pytest.approx(without[0].item(), rel=1e-6)
    assert abs(with_one[1].item() - without[1].item()) > 1e-3


@names
@pytest.mark.parametrize("rows", [[[(5,), (9,)]], [[(5, "i", 2)]], [[("i", 4)]]])
def test_every_parameter_gets_a_finite_gradient(build: Build, name: str, rows: list[list[Document]]) -> None:
    model = build(with_rates(SHAPES[name], 0.2, 0.1))
    torch.stack(losses(model, micro_batch(SHAPES[name], rows))).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def test_no_targets_at_all_gives_zero(build: Build) -> None:
    model = build(OPT)
    batch = micro_batch(OPT, [[(5,)]])
    batch = dataclasses.replace(
        batch, target_positions=batch.target_positions[:0], target_labels=batch.target_labels[:0]
    )
    both = losses(model, batch)
    assert [float(x.detach()) for x in both] == [0.0, 0.0]
    torch.stack(both).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Wider than the other shapes, so that sample statistics are sharp.
_WIDE_VISION = dataclasses.replace(OPT.vision, width=192, heads=3, mlp_width=768, class_token=True)
WIDE_OPT = ModelConfig(
    vision=_WIDE_VISION,
    language=dataclasses.replace(OPT.language, vocab_size=4000, width=128, heads=2, mlp_width=512),
    pool_heads=2,
)
WIDE_CLIP = ModelConfig(
    vision=_WIDE_VISION,
    language=dataclasses.replace(CLIP.language, vocab_size=4000, width=128, heads=2, mlp_width=512),
    pool_heads=2,
)


@pytest.mark.parametrize("shape", [WIDE_OPT, WIDE_CLIP], ids=["opt", "clip"])
def test_initial_losses_temperature_and_latents(build: Build, shape: ModelConfig) -> None:
    model = build(shape)
    batch = micro_batch(shape, [[(8, "i", 9), (10, "i")], [(30, "i"), (7, "i", 3)]] * 4)
    with torch.no_grad():
        features, _ = model(batch)
        contrastive, generation = losses(model, batch)
    # Logits of variance 1/3 (untied head) or 0.02^2 D (tied) raise the loss above ln V by half of it.
    variance = 128 * 0.02**2 if shape.language.tied_head else 1 / 3
    assert float(generation) == pytest.approx(math.log(4000) + variance / 2, abs=0.05)
    assert 0.5 * math.log(16) < float(contrastive) < 1.5 * math.log(16)
    assert model.temperature().item() == pytest.approx(1 / 0.07)
    assert float(model.temperature.log_scale.detach()) == pytest.approx(INITIAL_LOG_SCALE)
    # Two uniform matrices of variance 1 / (3 fan-in) after a norm: standard deviation 1/3.
    assert float(features.latents.std()) == pytest.approx(1 / 3, rel=0.06)


def _expected_std(shape: ModelConfig, name: str) -> float | None:
    """Standard deviations of the released code's initial weights; None: constant, tested apart."""
    w, d = shape.vision.width, shape.language.width
    deep = (2 * shape.language.layers) ** -0.5
    if name.startswith("vision"):
        table = {
            "qkv.weight": math.sqrt(6 / (4 * w)) / math.sqrt(3),
            "patch_embedding": (3 * shape.vision.patch_size**2) ** -0.5 / math.sqrt(3),
            "class_token": w**-0.5,
            "position_embedding": w**-0.5,
            "proj.weight": w**-0.5 / math.sqrt(3),
            "fc1.weight": w**-0.5 / math.sqrt(3),
            "fc1.bias": w**-0.5 / math.sqrt(3),
            "fc2.weight": shape.vision.mlp_width**-0.5 / math.sqrt(3),
            "fc2.bias": shape.vision.mlp_width**-0.5 / math.sqrt(3),
        }
    elif name.startswith("pool"):
        table = {"query": 1.0, "out.weight": d**-0.5 / math.sqrt(3), "weight": w**-0.5 / math.sqrt(3)}
    elif shape.language.init == "opt":
        table = {"context_projection": d**-0.5, "bias": 0.0, "weight": 0.02, "embedding": 0.02}
    else:
        table = {
            "context_projection": d**-0.5,
            "head": d**-0.5 / math.sqrt(3),
            "token_embedding.weight": 0.02,
            "position_embedding": 0.01,
            "qkv.weight": d**-0.5,
            "proj.weight": d**-0.5 * deep,
            "fc2.weight": d**-0.5 * deep,
            "fc1.weight": (2 * d) ** -0.5,
            "fc1.bias": d**-0.5 / math.sqrt(3),
            "fc2.bias": shape.language.mlp_width**-0.5 / math.sqrt(3),
        }
    return next((std for ending, std in table.items() if name.endswith(ending)), None)


@pytest.mark.parametrize("shape", [WIDE_OPT, WIDE_CLIP], ids=["opt", "clip"])
def test_initial_weights_have_the_released_distributions(build: Build, shape: ModelConfig) -> None:
    for name, parameter in build(shape).named_parameters():
        values = parameter.detach()
        if "norm" in name:
            assert values.eq(1.0 if name.endswith("weight") else 0.0).all(), name
        elif name.endswith("gamma"):
            assert values.eq(shape.vision.layer_scale).all(), name
        elif name == "temperature.log_scale":
            continue
        else:
            expected = _expected_std(shape, name)
            if expected is None or expected == 0.0:
                assert name.endswith("bias"), name
                assert values.eq(0.0).all(), name
                continue
            tolerance = 4 / math.sqrt(2 * values.numel()) + 0.005  # four standard errors
            assert float(values.std()) == pytest.approx(expected, rel=tolerance), name
            assert abs(float(values.mean())) < 4 * expected / math.sqrt(values.numel()), name


def test_initial_weights_follow_the_seed(build: Build) -> None:
    first, again, other = (dict(build(CLIP, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = ("pool.query", "language.head", "vision.blocks.layers.1.mlp.linear_fc1.weight")
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    layers = [first[f"vision.blocks.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 1)]
    assert not torch.equal(*layers)


@names
def test_drop_path_follows_the_image_not_its_place(build: Build, name: str) -> None:
    model = build(with_rates(SHAPES[name], 0.5, 0.0), noise=0.1)
    images = micro_batch(SHAPES[name], [[("i", "i", "i", 1)]]).images
    keys = torch.tensor([71, 5, 2**40])
    order = [2, 0]
    with torch.no_grad():
        together = model.encode_images(images, keys, 9).vectors
        apart = model.encode_images(images[order], keys[order], 9).vectors
        other_step = model.encode_images(images, keys, 10).vectors
        full = model.eval().encode_images(images, keys, 9).vectors
    assert float((together[order] - apart).abs().max()) < 1e-5
    assert (together - full).abs().max() > 1e-3
    assert (together - other_step).abs().max() > 1e-3


@names
def test_dropout_follows_the_row_not_its_place(build: Build, name: str) -> None:
    model = build(with_rates(SHAPES[name], 0.0, 0.3))
    rows: list[list[Document]] = [[(12,), (30,)], [(40,)], [(9,), (8,)]]
    batch = micro_batch(SHAPES[name], rows)
    latents = torch.empty(0, SHAPES[name].vision.patches, SHAPES[name].language.width)
    with torch.no_grad():
        together = model.forward_language(batch, latents, (4, 8, 15), 1).view(3, 64, -1)
        half = dataclasses.replace(
            micro_batch(SHAPES[name], rows[2:]), tokens=batch.tokens[128:], positions=batch.positions[128:]
        )
        alone = model.forward_language(half, latents, (15,), 1).view(1, 64, -1)
        other_key = model.forward_language(half, latents, (16,), 1).view(1, 64, -1)
    assert float((together[2] - alone[0]).abs().max()) < 1e-5
    assert (other_key - alone).abs().max() > 1e-2


def test_masks_have_the_stated_rate_and_keep_the_mean(build: Build) -> None:
    draws = uniform(torch.arange(20_000), 3)
    assert float(draws.min()) >= 0.0
    assert float(draws.max()) < 1.0
    assert float((draws >= 0.2).float().mean()) == pytest.approx(0.8, abs=0.01)
    model = build(with_rates(OPT, 0.4, 0.25))
    ones = torch.ones(4096 * OPT.vision.tokens, 1, OPT.vision.width)
    branch = model.vision.blocks.layers[-1].mlp_bda  # the last block has the full rate
    segments = make_segments((OPT.vision.tokens,) * 4096, torch.device("cpu"), keys=torch.arange(4096), seed=1)
    draw_masks(model.vision.blocks, segments)
    with torch.no_grad():
        branch.gamma.fill_(1.0)
        out, _ = branch((ones, None), torch.zeros_like(ones), None, segments, 0)
    per_image = out.view(4096, -1)
    assert per_image.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert per_image.eq(per_image[:, :1]).all()
    assert float(out.mean()) == pytest.approx(1.0, abs=0.05)


def test_recomputed_activations_give_the_same_gradients(build: Build) -> None:
    shape = with_rates(OPT, 0.3, 0.2)
    batch = micro_batch(shape, [[(5, "i", 3), (4, "i")], [(6, "i", 2)]])
    grads = []
    for recompute in ("none", "selective", "full", "block:1"):
        model = build(shape, recompute_vision=recompute, recompute_language=recompute)
        with torch.no_grad():  # a pass without gradients, as exact micro-batches make one, must leave no trace
            losses(model, batch, seed=11)
        torch.stack(losses(model, batch, seed=11)).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        for other in grads[1:]:
            assert torch.equal(grad, other[name]), name


@pytest.mark.parametrize("tokens", [1, 16, 17, 197, 256, 257, 264])
@pytest.mark.parametrize("shares", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("token_multiple", [1, 16, 32])
def test_images_are_filled_up_to_whole_shares_of_token_counts_that_fp8_takes(
    tokens: int, shares: int, token_multiple: int
) -> None:
    """The smallest number of images for which each rank has whole images and a multiple of tokens."""
    fitting = (n for n in range(1, 1000) if n % shares == 0 and n // shares * tokens % token_multiple == 0)
    assert image_multiple(tokens, shares, token_multiple) == next(fitting)


def test_images_added_for_fp8_change_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images are encoded as sixteen; features and gradients are those of three."""
    model, seen = build(OPT), []
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encode = model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda x, *rest: seen.append(len(x)) or encode(x, *rest))
    results = []
    for multiple in (1, 16):
        model.zero_grad()
        model.token_multiple = multiple
        features = model.encode_images(images, torch.arange(3), 0)
        (features.vectors.sum() + features.latents.square().sum()).backward()
        gradients = [p.grad.clone() for p in model.vision.parameters() if p.grad is not None]
        results.append([features.vectors, features.latents, *gradients])
    tokens = OPT.vision.tokens
    assert seen == [3, -(-3 // (16 // math.gcd(tokens, 16))) * (16 // math.gcd(tokens, 16))]
    assert seen[1] > 3
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)
