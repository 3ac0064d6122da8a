"""`--micro-batch-size auto`: the largest that fits, the same run as with that number typed, kept by a resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.run_folder import read_config
from lcl_mcore.errors import ConfigError
from lcl_mcore.planning.micro_batch import ask, possible_sizes
from training_runs import assert_same_run

pytestmark = pytest.mark.timeout(200)


def test_auto_is_the_largest_that_fits() -> None:
    """Of sizes that divide a rank's 12 sequences; one byte less room than one needs gives the next smaller one."""
    demo = load_recipe("demo")
    config = replace(demo, train=replace(demo.train, micro_batch_size="auto", global_batch_size=24))
    assert possible_sizes(config, 2) == [1, 2, 3, 4, 6, 12]
    roomy = ask(config, 2, 1e15, "cpu")
    assert (roomy.size, roomy.fits) == (12, True)
    tight = ask(config, 2, roomy.peak - 1, "cpu")
    assert (tight.size, tight.fits) == (6, True)
    assert tight.peak < 0.9 * roomy.peak


def test_sizes_leave_a_pipeline_full_and_fp8_is_refused() -> None:
    config = load_recipe("paper-l14")
    stages = replace(config, parallel=replace(config.parallel, pipeline_parallel_size=2))
    assert possible_sizes(config, 512) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert possible_sizes(stages, 512) == [1, 2, 3, 4, 6, 8, 12]  # of 48 sequences, at least four micro-batches
    with pytest.raises(ConfigError, match=r"^train.micro_batch_size = auto with train.precision = fp8: Transformer "):
        ask(replace(config, train=replace(config.train, precision="fp8")), 512, 1e12, "cuda")


def test_a_run_with_auto_is_the_run_with_that_number(
    arguments: Callable[..., list[str]], run_tool: Callable[..., Any], tmp_path: Path
) -> None:
    """And its resume keeps the number, which is in `config.yaml`, the start-up summary and so in the model card."""
    auto, typed = tmp_path / "auto", tmp_path / "typed"
    done = run_tool(*arguments(auto, "--steps", "2", "--micro-batch-size", "auto"))
    assert done.returncode == 0, done.stderr
    assert "train.micro_batch_size = auto: 4; 0.0" in done.stdout
    assert " GiB of tensors expected, " in done.stdout
    assert "usable: 50% of this machine's memory, shared by 1 ranks\n" in done.stdout
    assert "  batch      4 sequences x 1 micro-batches on each data-parallel rank\n" in done.stdout
    assert read_config(auto / "config.yaml").train.micro_batch_size == 4
    assert run_tool(*arguments(typed, "--steps", "2", "--micro-batch-size", "4")).returncode == 0
    assert_same_run(auto, typed)
    smaller = tmp_path / "smaller"
    shutil.copytree(auto, smaller)
    file = smaller / "config.yaml"
    file.write_text(file.read_text().replace("micro_batch_size: 4", "micro_batch_size: 2"))
    done = run_tool(*arguments(smaller, "--steps", "3", "--micro-batch-size", "auto", "--resume"))
    assert done.returncode == 0, done.stderr
    assert "train.micro_batch_size = auto: 2, which the run had before\n" in done.stdout
    assert read_config(file).train.micro_batch_size == 2
