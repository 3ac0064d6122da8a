"""What megatron is told for each choice of precision, recompute and layout."""

from __future__ import annotations

import pytest

from lcl_mcore.config.model import LanguageConfig, VisionConfig
from lcl_mcore.models.transformer_config import (
    Layout,
    language_transformer_config,
    vision_transformer_config,
)


@pytest.mark.parametrize(
    ("recipe", "name"), [("current", "tensorwise"), ("delayed", "delayed"), ("block", "blockwise")]
)
def test_fp8_recipes(recipe: str, name: str) -> None:
    config = language_transformer_config(LanguageConfig(), Layout(fp8=recipe))
    assert (config.fp8, config.fp8_recipe) == ("hybrid", name)
    assert config.disable_parameter_transpose_cache
    assert language_transformer_config(LanguageConfig(), Layout()).fp8 is None


@pytest.mark.parametrize(
    ("choice", "granularity", "method", "layers"),
    [
        ("none", None, None, None),
        ("selective", "selective", None, None),
        ("full", "full", "uniform", 1),
        ("block:3", "full", "block", 3),
    ],
)
def test_recompute_of_one_tower(choice: str, granularity: str, method: str, layers: int) -> None:
    layout = Layout(recompute_vision=choice)
    vision = vision_transformer_config(VisionConfig(), layout)
    assert (vision.recompute_granularity, vision.recompute_method, vision.recompute_num_layers) == (
        granularity,
        method,
        layers,
    )
    assert language_transformer_config(LanguageConfig(), layout).recompute_granularity is None


def test_a_replicated_vit_is_not_split() -> None:
    layout = Layout(tensor_parallel=2, sequence_parallel=True, vision_data=True)
    vision = vision_transformer_config(VisionConfig(), layout)
    language = language_transformer_config(LanguageConfig(), layout)
    assert (vision.tensor_model_parallel_size, vision.sequence_parallel) == (1, False)
    assert (language.tensor_model_parallel_size, language.sequence_parallel) == (2, True)
