"""The campaign of kills and damage in small: real runs, real signals, twenty kills."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "campaigns")]

from nothing_lost import Tally, campaign, markdown, rows  # noqa: E402


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_twenty_kills(tmp_path: Path) -> None:
    tally = campaign(tmp_path, 20, seed=7, ranks=2)
    assert tally.problems == []
    assert sum(tally.kills.values()) == 20
    assert sum(tally.damage.values()) >= 3
    assert tally.steps_compared >= 80
    assert tally.worst <= 1e-5


def test_the_report_names_every_number() -> None:
    tally = Tally(worst=2e-7, problems=["run-1: stuck in dp2"])
    tally.kills["rank"] = 3
    text = markdown(
        {"command": "c", "machine": "m", "commit": "abc", "date": "d", "minutes": 2.0, "seed": 1} | rows(tally)
    )
    assert "| kills | rank 3 |" in text
    assert "| largest relative difference of a loss | 2.0e-07 |" in text
    assert "| problems | run-1: stuck in dp2 |" in text
    assert "| minutes | 2.0 |" in text
