"""A run in bf16 keeps its state in fp32: from the file it starts from to the files that are made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch import last_json, torchrun
from lcl_mcore.checkpoint.consolidate import consolidate, consolidated_weights
from lcl_mcore.checkpoint.store import complete_checkpoints
from lcl_mcore.checkpoint.weights_file import consolidated_state, read_consolidated, without_vocabulary_padding
from lcl_mcore.config.run_folder import read_config
from lcl_mcore.export.formats import FORMATS
from lcl_mcore.interop.vit_formats import TIMM, to_format

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
Arguments = Callable[..., list[str]]
Tool = Callable[..., Any]


@pytest.fixture(scope="module")
def run(arguments: Arguments, run_tool: Tool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps in bf16, one process, layer scale on."""
    out = tmp_path_factory.mktemp("bf16") / "run"
    done = run_tool(*arguments(out, "--precision", "bf16", "--steps", "3", "model.vision.layer_scale=1e-5"))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def masters(run: Path) -> dict[str, torch.Tensor]:
    """What the run's checkpoint holds; hardly any of it is a bf16 number."""
    stored = without_vocabulary_padding(consolidated_weights(complete_checkpoints(run / "checkpoints")[-1]), 400)
    matrices = [value for value in stored.values() if value.dim() > 1]
    for value in (*matrices, stored["vision.blocks.layers.1.mlp_bda.gamma"], stored["temperature.log_scale"]):
        assert value.dtype == torch.float32
        assert (value == value.bfloat16()).float().mean() < 0.05
    return stored


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def test_files_made_of_a_checkpoint_hold_its_masters(
    run: Path, masters: dict[str, torch.Tensor], run_tool: Tool, tmp_path: Path
) -> None:
    consolidate(str(run), tmp_path / "weights")
    assert_equal(read_consolidated(tmp_path / "weights"), masters)
    done = run_tool("tools/export_encoder.py", str(run), "--out", str(tmp_path), "--formats", "full", "timm")
    assert done.returncode == 0, done.stderr
    assert_equal(read_consolidated(tmp_path / "full"), masters)
    config = read_config(run / "config.yaml")
    assert read_config(tmp_path / "full" / "config.yaml") == config
    assert_equal(load_file(tmp_path / "timm" / "model.safetensors"), to_format(masters, config.model.vision, TIMM))


def test_evaluation_reads_the_masters(run: Path, masters: dict[str, torch.Tensor], groups: Any) -> None:
    from lcl_mcore.distributed.context import detached
    from lcl_mcore.distributed.device import pick_device
    from lcl_mcore.evaluation.load import open_model

    loaded = open_model(run, detached(pick_device("cpu"), groups))
    assert loaded.config.train.precision == "bf16"
    assert_equal(consolidated_state(loaded.model), masters)


@pytest.mark.timeout(240)
def test_a_run_starts_from_the_very_numbers_of_a_file(run: Path, tmp_path: Path) -> None:
    """Four ranks, three layouts: every element of every rank's masters, once per data-parallel group."""
    whole, encoder = tmp_path / "whole", tmp_path / "timm"
    consolidate(str(run), whole)
    encoder.mkdir()
    FORMATS["timm"].write(read_consolidated(whole), read_config(whole / "config.yaml").model.vision, encoder)
    found = last_json(torchrun(4, "tests/training/masters_worker.py", str(whole), str(encoder)))
    assert found.keys() == {"dp4", "tp2-dp2-sp", "tp2-pp2"}
    for layout, counts in found.items():
        assert counts[0][0] > counts[1][0] > 15_000, layout
        for elements, off_the_file, not_rounded, short in counts:
            assert (off_the_file, not_rounded) == (0, 0), layout
            assert short < 0.2 * elements, layout  # biases at zero, norms at one, padding rows
