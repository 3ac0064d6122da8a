"""What megatron is told for each choice of precision, recompute and layout."""

from __future__ import annotations

import pytest
import torch

from lcl_mcore.config.schema import ParallelConfig, RunConfig, TrainConfig
from lcl_mcore.models.transformer_config import language_transformer_config, vision_transformer_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("recipe", "name"), [("current", "tensorwise"), ("delayed", "delayed"), ("block", "blockwise")]
)
def test_fp8_recipes(recipe: str, name: str) -> None:
    run = RunConfig(train=TrainConfig(precision="fp8", fp8_recipe=recipe))  # type: ignore[arg-type]
    config = language_transformer_config(run, CPU)
    assert (config.fp8, config.fp8_recipe) == ("hybrid", name)
    assert config.disable_parameter_transpose_cache
    assert language_transformer_config(RunConfig(), CPU).fp8 is None


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
    run = RunConfig(parallel=ParallelConfig(recompute_vision=choice))
    vision = vision_transformer_config(run, CPU)
    assert (vision.recompute_granularity, vision.recompute_method, vision.recompute_num_layers) == (
        granularity,
        method,
        layers,
    )
    assert language_transformer_config(run, CPU).recompute_granularity is None


def test_a_replicated_vit_is_not_split() -> None:
    run = RunConfig(parallel=ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, vision_parallel="data"))
    vision, language = vision_transformer_config(run, CPU), language_transformer_config(run, CPU)
    assert (vision.tensor_model_parallel_size, vision.sequence_parallel) == (1, False)
    assert (language.tensor_model_parallel_size, language.sequence_parallel) == (2, True)
