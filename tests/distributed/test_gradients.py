"""Losses and every parameter's gradient are those of one plain process, in every layout."""

from __future__ import annotations

from typing import Any

import pytest

from launch import run_worker

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module", params=[1, 2, 4])
def cases(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """All cases of one world size; ranks hold ragged, empty and context-free shares of one batch."""
    return run_worker("gradients_worker", request.param, timeout=280)


@pytest.mark.timeout(300)
def test_losses_and_gradients_equal_the_reference(cases: list[dict[str, Any]]) -> None:
    exact = [case for case in cases if "expected" in case]
    assert len(exact) >= 13
    for case in exact:
        contrastive, generation = case["expected"]
        if case.get("contrastive_weight") != 0.0:
            assert case["contrastive"] == pytest.approx(contrastive, rel=1e-5), case
        if case.get("generation_weight") != 0.0:
            assert case["generation"] == pytest.approx(generation, rel=1e-5), case
        assert case["worst_gradient"] < 2e-5, case


@pytest.mark.timeout(300)
def test_dropout_and_drop_path_are_the_same_in_every_layout(cases: list[dict[str, Any]]) -> None:
    """Masks depend on identities, not on where they are computed; the values are those of one process."""
    for case in (case for case in cases if case["shape"] == "dropping"):
        expected = DROPPING[case["layers"]]
        assert case["contrastive"] == pytest.approx(expected["contrastive"], rel=1e-5), case
        assert case["generation"] == pytest.approx(expected["generation"], rel=1e-5), case
        assert case["gradient_sum"] == pytest.approx(expected["gradient_sum"], rel=1e-4), case


# From one process (tp 1, dp 1), by layers of the LM: what every other layout must reproduce.
DROPPING = {
    2: {"contrastive": 2.7515423, "generation": 5.7134096, "gradient_sum": 516.0304},
    4: {"contrastive": 2.7607877, "generation": 5.7108665, "gradient_sum": 530.1965},
}
