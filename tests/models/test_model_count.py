"""Parameter and FLOP counts against known totals, the really built model, and torch's counter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lcl_kernels import infonce_reference, linear_cross_entropy_reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from batches import CLIP, OPT, SHAPES, Document, micro_batch
from lcl_mcore.batch import GlobalCounts, MicroBatch, StepBatch
from lcl_mcore.config.recipes import RECIPES, load_recipe
from lcl_mcore.config.schema import DataConfig, ModelConfig, RunConfig, VisionConfig
from lcl_mcore.distributed.device import Device
from lcl_mcore.hardware import measured_peak, peak_flops
from lcl_mcore.models import attention as segments
from lcl_mcore.models.flops import (
    MfuMeter,
    attention_pairs,
    batch_flops,
    describe_model,
    document_lengths,
    flop_rates,
    parameter_counts,
    step_flops,
)
from lcl_mcore.models.lcl import LclModel

Build = Callable[..., LclModel]

H100 = Device("cuda", torch.device("cuda"), "nccl", "NVIDIA H100 80GB HBM3")
CPU = Device("cpu", torch.device("cpu"), "gloo", "a CPU")
L14 = VisionConfig(patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(VisionConfig(), 85_799_424), (VisionConfig(patch_size=32), 87_456_000), (L14, 303_179_776)],
    ids=["B/16", "B/32", "L/14"],
)
def test_vision_encoders_have_the_published_sizes(shape: VisionConfig, expected: int) -> None:
    def count(**changes: Any) -> int:
        return parameter_counts(ModelConfig(vision=dataclasses.replace(shape, **changes)))["vision_encoder"]

    assert count() == expected
    assert count(class_token=False) == expected - 2 * shape.width  # the token and its position
    assert count(layer_scale=0.1) - expected == {768: 18_432, 1024: 49_152}[shape.width]


def test_opt_125m_has_its_published_size() -> None:
    assert parameter_counts(ModelConfig())["language_model"] == 125_239_296


@pytest.mark.parametrize(
    ("recipe", "pool", "text", "head", "total"),
    [
        ("released-b16-laion", 2_366_976, 123_808_512, 37_949_184, 249_924_097),
        ("released-b32-laion", 1_448_704, 63_455_744, 25_299_456, 177_659_905),
        ("released-b32-mmc4", 1_448_704, 64_438_784, 25_299_456, 178_642_945),
    ],
)
def test_released_recipes_have_the_released_sizes(recipe: str, pool: int, text: int, head: int, total: int) -> None:
    counts = parameter_counts(load_recipe(recipe).model)
    assert counts["pool_and_projector"] == pool
    assert counts["language_model"] + counts["context_projection"] == text
    assert counts["output_head"] == head
    assert sum(counts.values()) == total


def by_component(model: LclModel, shape: ModelConfig) -> dict[str, int]:
    """What the built model holds, without the padding rows of the vocabulary."""
    language = shape.language
    padding = (language.padded_vocab_size - language.vocab_size) * language.width
    counts = dict.fromkeys(parameter_counts(shape), 0)
    for name, parameter in model.named_parameters():
        part, _, rest = name.partition(".")
        if rest == "context_projection":
            component = rest
        elif rest == "head" or rest.startswith("norm_head"):
            component = "output_head"
        else:
            component = {
                "vision": "vision_encoder",
                "pool": "pool_and_projector",
                "language": "language_model",
                "temperature": "temperature",
            }[part]
        size = parameter.numel()
        counts[component] += size - padding if rest in ("head", "token_embedding.weight") else size
    return counts


@pytest.mark.parametrize("name", SHAPES)
def test_counts_equal_a_built_model(build: Build, name: str) -> None:
    assert by_component(build(SHAPES[name]), SHAPES[name]) == parameter_counts(SHAPES[name])


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("large") else name for name in RECIPES]
)
def test_counts_equal_the_built_model_of_every_recipe(build: Build, recipe: str) -> None:
    shape = load_recipe(recipe).model
    with FakeTensorMode():  # shapes without storage
        model = build(shape, initialize=False)
    assert by_component(model, shape) == parameter_counts(shape)
    if recipe.startswith("released"):
        assert len(list(model.parameters())) == 318


def padded_to_itself(shape: ModelConfig) -> ModelConfig:
    """A vocabulary without padding rows, whose logits torch's counter would see and ours does not count."""
    return dataclasses.replace(shape, language=dataclasses.replace(shape.language, vocab_size=384))


def counted(model: LclModel, batch: MicroBatch) -> tuple[int, int]:
    """FLOPs of forward and of forward plus backward, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # matmuls that the counter sees one by one
        features, hidden = model(batch)
        image, context = model.image_embeds(batch, features.vectors), model.context_embeds(batch, hidden)
        loss = infonce_reference(image, context, model.temperature())
        loss = loss + linear_cross_entropy_reference(
            model.language.targets(hidden, batch.target_positions), model.language.head_weight, batch.target_labels
        )
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def ours(shape: ModelConfig, batch: MicroBatch, pairs: int) -> tuple[int, int]:
    sizes: dict[str, Any] = {
        "images": len(batch.images),
        "tokens": len(batch.tokens),
        "pairs": pairs,
        "contexts": len(batch.context_positions),
        "targets": len(batch.target_positions),
    }
    return step_flops(shape, **sizes, forward_only=True), step_flops(shape, **sizes)


@pytest.mark.parametrize("name", SHAPES)
def test_flops_equal_torchs_count_with_full_squares(build: Build, name: str) -> None:
    """Segments of one length need no padding; the kernel multiplies full squares, so we count those."""
    shape = padded_to_itself(SHAPES[name])
    long = 62 - shape.vision.patches - 2
    batch = micro_batch(shape, [[(62,)], [(10, "i", long - 10)], [(3, "i", long - 3)]])
    assert batch.lengths == (64, 64, 64)
    expected = ours(shape, batch, attention_pairs(batch.lengths, causal=False))
    assert counted(build(shape), batch) == expected


def attend_to_the_past(
    q: Tensor, k: Tensor, v: Tensor, packed: segments.Segments, causal: bool, scale: float
) -> Tensor:
    """Attention that multiplies exactly the pairs its mask keeps: one matmul per query."""
    outputs, start = [], 0
    for length in packed.lengths:
        for i in range(start, start + length):
            last = i + 1 if causal else start + length
            keys, values = (x[start:last].transpose(0, 1) for x in (k, v))  # [a, L, d]
            weights = (q[i, :, None] @ keys.transpose(1, 2) * scale).softmax(-1)
            outputs.append((weights @ values)[:, 0])
        start += length
    return torch.stack(outputs)


@pytest.mark.parametrize("rows", [[[(30,)], [(30,)]], [[(5, "i", 3), ("i", 4)], [(9,), (4, "i"), (1,)]]])
@pytest.mark.parametrize("name", SHAPES)
def test_flops_equal_torchs_count_of_the_causal_pairs(
    build: Build, name: str, rows: list[list[Document]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = padded_to_itself(SHAPES[name])
    monkeypatch.setattr(segments, "sdpa_segments", attend_to_the_past)
    batch = micro_batch(shape, rows, row_length=32 if len(rows[0]) == 1 else 48)
    forward, both = counted(build(shape), batch)
    expected_forward, expected_both = ours(shape, batch, attention_pairs(batch.lengths))
    if len(batch.images) == 0:  # the encoder still runs, on a stand-in that the count leaves out
        rates = flop_rates(shape)
        expected_forward += rates.image
        expected_both += 3 * rates.image - rates.patches
    assert (forward, both) == (expected_forward, expected_both)


def test_the_shares_of_a_known_model() -> None:
    """ViT-B/16 and OPT-125M against 2 FLOPs per weight and position, plus attention, by hand."""
    rates = flop_rates(ModelConfig())
    blocks = 12 * (7_087_872 - 768 * 13)  # weights of the matrices of 12 blocks: 768 * 768 * 12 each
    assert rates.token == 2 * blocks
    encoder = 2 * 197 * blocks + 12 * 4 * 197**2 * 768 + 2 * 196 * 768 * 768
    assert rates.image == encoder + 2 * 196 * 2 * 768**2 + 4 * 196 * 768 + 2 * 197 * 768**2
    assert rates.pair == 12 * 4 * 768
    assert attention_pairs([3, 1]) == 7
    assert attention_pairs([3, 1], causal=False) == 10


def test_padding_is_left_out_by_its_missing_targets() -> None:
    batch = micro_batch(CLIP, [[(5, "i", 3), ("i", 4)], [(62,)], [(9,)]])
    assert document_lengths(batch) == [21, 17, 64, 11]
    assert batch.lengths == (21, 17, 26, 64, 11, 53)


def test_the_flops_of_a_batch_add_up_to_its_mfu(build: Build) -> None:
    micro = [micro_batch(OPT, [[(5, "i", 3)], [(40,), (12,)]]), micro_batch(OPT, [[("i", 4)], [(30,)]])]
    lengths = [n for m in micro for n in document_lengths(m)]
    counts = GlobalCounts(
        images=(2,), contexts=(1,), targets=(100,), tokens=(sum(lengths),), micro_contexts=((1,), (0,))
    )
    batch = StepBatch(tuple(micro), counts, {}, "")
    config = RunConfig(model=OPT, data=DataConfig(sequence_length=64))
    meter = MfuMeter(config, H100, torch.float32, 4)
    expected = step_flops(
        OPT, images=2, tokens=sum(lengths), pairs=attention_pairs(lengths), contexts=1, targets=100, encoder_calls=2
    )
    assert batch_flops(config, batch) == expected
    assert meter.mfu(batch, 0.5) == pytest.approx(expected / (0.5 * 4 * 67e12))
    assert "67 TFLOP/s" in meter.describe()
    empty = GlobalCounts(images=(0,), contexts=(0,), targets=(0,), tokens=(0,))
    assert batch_flops(config, StepBatch((), empty, {}, "")) == 0


@pytest.mark.parametrize(
    ("device", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A800-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H200", "fp8", 1978.9),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA RTX A1000", "bf16", None),
        ("Some CPU", "fp32", None),
    ],
)
def test_peak_rates_of_known_devices(device: str, precision: str, tflops: float | None) -> None:
    peak = peak_flops(device, precision)
    assert (peak.flops / 1e12 if peak else None) == (pytest.approx(tflops) if tflops else None)


def test_the_measured_rate_is_labelled_as_such() -> None:
    peak = measured_peak(CPU, torch.float32, size=256)
    assert 1e8 < peak.flops < 1e14
    assert peak.source.startswith("measured")


def test_description_of_a_recipe() -> None:
    report = describe_model(load_recipe("paper-l14"))
    assert report["parameters"]["vision_encoder"] == 303_179_776 + 49_152
    assert report["tokens_per_image"] == {"encoder": 257, "language_model": 256, "with_markers": 258}
    training, forward = report["training_flops"], report["forward_flops"]
    assert training["per_lm_token"] == 3 * forward["per_lm_token"]
    assert forward["per_lm_token_attention_in_full_sequence"] == 12 * 4 * 768 * 2049 / 2
