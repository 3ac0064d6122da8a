"""Which layers stand on which pipeline stage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.schema import LanguageConfig, ModelConfig, ParallelConfig, RunConfig, VisionConfig
from lcl_mcore.models.stages import split_stages, stage_of


def config(recipe: str, **parallel: object) -> RunConfig:
    return replace(load_recipe(recipe), parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["paper-l14", "large-h14", "large-g14", "released-b16-laion"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6, 8])
def test_every_layer_stands_on_one_stage(recipe: str, stages: int) -> None:
    run = config(recipe, pipeline_parallel_size=stages)
    split = split_stages(run)
    assert len(split) == stages
    assert min(split[1:], default=1) >= 1
    assert [i for s in range(stages) for i in stage_of(split, s).layers] == list(range(run.model.language.layers))


def test_the_split_is_the_best_of_all_for_two_stages() -> None:
    """Against the costs written out: ViT-B/16 at 6 layers of width 512 beside rows of 1024 tokens."""
    vision = VisionConfig(width=512, layers=2, heads=8, mlp_width=2048)
    language = LanguageConfig(width=512, layers=12, heads=8, mlp_width=2048, vocab_size=1024)
    run = load_recipe("paper-b16")
    run = replace(
        run,
        model=ModelConfig(vision=vision, language=language, pool_heads=8),
        data=replace(run.data, sequence_length=1024),
        parallel=ParallelConfig(pipeline_parallel_size=2),
    )
    # In multiply-adds per token: a layer of width w costs 12 w^2, and attention 2 w per key.
    width, row, patches = 512, 1024, 196
    lm_layer = row * (12 * width**2 + row / 2 * 2 * width)
    vit_layer = 197 * (12 * width**2 + 197 * 2 * width)
    images = row / 2 / patches * (2 * vit_layer + patches * (768 + 3 * width) * width)
    logits = row / 2 * width * 1024
    expected = min(range(12), key=lambda n: max(n * lm_layer + images, (12 - n) * lm_layer + logits))
    assert expected not in (0, 6)  # the ViT weighs, but less than half of the LM
    assert split_stages(run) == (expected, 12 - expected)


def test_a_heavy_vit_has_the_first_stage_to_itself() -> None:
    assert split_stages(config("paper-l14", pipeline_parallel_size=2)) == (0, 12)


def test_the_configured_split_is_taken() -> None:
    assert split_stages(config("paper-l14", pipeline_parallel_size=3, stage_layers=(2, 4, 6))) == (2, 4, 6)


def test_small_vits_are_replicated_and_large_ones_split() -> None:
    assert config("paper-l14", tensor_parallel_size=2).resolved_vision_parallel == "data"
    assert config("large-g14", tensor_parallel_size=2).resolved_vision_parallel == "tensor"
    assert config("large-g14", tensor_parallel_size=2, vision_parallel="data").resolved_vision_parallel == "data"
    assert config("paper-l14", tensor_parallel_size=1).resolved_vision_parallel == "tensor"
