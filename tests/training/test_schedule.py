"""The learning rate of `docs/recipes.md`."""

from __future__ import annotations

import pytest

from lcl_mcore.config.schema import OptimConfig
from lcl_mcore.lr_schedule import cosine_with_warmup


def test_learning_rate_at_known_steps() -> None:
    optim = OptimConfig(lr=3e-4, warmup_steps=2000)

    def rate_at(step: int) -> float:
        return cosine_with_warmup(step, 200_000, optim.warmup_steps, optim.lr, optim.min_lr)

    expected = {0: 1.5e-7, 999: 1.5e-4, 1999: 3e-4, 2000: 3e-4, 101_000: 1.5e-4}
    for step, rate in expected.items():
        assert rate_at(step) == pytest.approx(rate, rel=1e-9)
    assert rate_at(199_999) == pytest.approx(1.9e-14, rel=0.02)
