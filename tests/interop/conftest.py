"""Small models whose every parameter is off its initial value."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lcl_mcore.config.schema import LanguageConfig, ModelConfig, VisionConfig

if TYPE_CHECKING:
    from lcl_mcore.models.lcl import LclModel

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "models")]  # `reference_model`, `batches`
LANGUAGE = LanguageConfig(vocab_size=300, width=32, layers=1, heads=4, mlp_width=64, max_positions=64)


@pytest.fixture(scope="session")
def make_model(build: Callable[..., LclModel]) -> Callable[..., LclModel]:
    """An fp32 `LclModel` around a ViT."""

    def make(vision: VisionConfig, seed: int = 0) -> LclModel:
        shape = ModelConfig(vision=vision, language=LANGUAGE, pool_heads=4)
        return build(shape, seed, train=False, noise=0.2)

    return make
