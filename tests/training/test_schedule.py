"""The learning rate of `docs/recipes.md`, and what of a configuration survives a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcl_mcore.config.cli import parse_flags, resolve
from lcl_mcore.config.files import read_config, write_config
from lcl_mcore.config.recipes import RECIPES, load_recipe
from lcl_mcore.config.run import OptimConfig
from lcl_mcore.lr_schedule import cosine_with_warmup


def test_learning_rate_at_known_steps() -> None:
    optim = OptimConfig(lr=3e-4, warmup_steps=2000)

    def rate_at(step: int) -> float:
        return cosine_with_warmup(step, 200_000, optim.warmup_steps, optim.lr, optim.min_lr)

    expected = {0: 1.5e-7, 999: 1.5e-4, 1999: 3e-4, 2000: 3e-4, 101_000: 1.5e-4}
    for step, rate in expected.items():
        assert rate_at(step) == pytest.approx(rate, rel=1e-9)
    assert rate_at(199_999) == pytest.approx(1.9e-14, rel=0.02)


@pytest.mark.parametrize("name", RECIPES)
def test_a_resolved_configuration_starts_the_same_run_again(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    write_config(config, tmp_path)
    assert read_config(tmp_path / "config.yaml") == config
    assert resolve(parse_flags(["--config", str(tmp_path / "config.yaml")])) == config


def test_flags_reach_their_knobs() -> None:
    line = "--recipe demo --data a:2 b --tp 2 --sequence-parallel --lr 0.5 --steps 7 --precision bf16"
    config = resolve(parse_flags([*line.split(), "--no-overlap", "--set", "model.vision.layers=3"]))
    assert [(s.path, s.weight) for s in config.data.sources] == [("a", 2.0), ("b", 1.0)]
    assert (config.parallel.tensor_parallel_size, config.parallel.sequence_parallel) == (2, True)
    assert not config.parallel.overlap_grad_reduce
    assert (config.optim.lr, config.train.steps, config.train.precision) == (0.5, 7, "bf16")
    assert config.model.vision.layers == 3


def test_the_command_line_is_a_decision() -> None:
    """A flag is added here on purpose or not at all."""
    import dataclasses

    from lcl_mcore.config.cli import Flags

    assert len(dataclasses.fields(Flags)) == 37
