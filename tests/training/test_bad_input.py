"""Mistakes get one clear message (value, rule, remedy) and a non-zero exit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcl_mcore.config.cli import parse_flags, resolve
from lcl_mcore.errors import ConfigError

Arguments = Callable[..., list[str]]
Tool = Callable[..., Any]


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(parse_flags(list(arguments)))
    return str(caught.value)


def test_configuration_mistakes_say_value_rule_and_remedy() -> None:
    for arguments, words in {
        ("--recipe", "demoo"): ("demoo", "no recipe has this name", "Did you mean demo?"),
        ("--recipe", "paper-b16", "--tp", "5"): (
            "heads = 12",
            "parallel.tensor = 5",
            "Use --tp from [1, 2, 3, 4, 6, 12]",
        ),
        ("--recipe", "demo", "--pp", "9"): ("parallel.pipeline = 9", "--pp"),
        ("--recipe", "demo", "--pp", "2", "--negatives", "micro_batch"): (
            "micro_batch",
            "--negatives global_batch",
        ),
        ("--recipe", "demo", "--pp", "2", "--set", "parallel.stage_layers=[4]"): ("stage_layers", "balanced"),
        ("--recipe", "demo", "--recompute-vision", "half"): ("recompute_vision = 'half'", "block:4"),
        ("--recipe", "demo", "--cp", "2"): ("parallel.context = 2", "not supported"),
        ("--recipe", "demo", "--sequence-parallel"): ("parallel.sequence", "--tp to 2 or more"),
        ("--recipe", "demo", "--set", "parallel.overlap_tensor=true"): (
            "overlap_tensor = True",
            "Leave it out",
        ),
        ("--recipe", "demo", "--device", "cpu", "--set", "optim.backend=apex"): (
            "optim.backend = apex",
            "CUDA only",
            "optim.backend=auto",
        ),
        ("--recipe", "demo", "--micro-batch-size", "3"): ("micro_batch_size = 3", "multiple of 3"),
        ("--recipe", "demo", "--precision", "fp8", "--device", "cpu"): ("fp8", "GPU", "--precision fp32"),
        ("--recipe", "demo", "--set", "model.vision.wdith=3"): ("model.vision.wdith = 3", "Unexpected"),
        ("--recipe", "demo", "--data", "x", "--set", "data.sequence_length=16"): (
            "sequence_length = 16",
            "must hold an image",
        ),
        ("--recipe", "demo", "--set", "data.sequence_length=300"): (
            "max_positions = 256",
            "Shorten the rows",
        ),
        ("--recipe", "demo", "--lr", "-1"): ("optim.lr = -1.0", "positive"),
        ("--recipe", "demo", "--contrastive-weight", "0", "--generation-weight", "0"): (
            "something to learn",
        ),
        (): ("neither", "--recipe demo"),
        ("--recipe", "demo", "--config", "x.yaml"): ("both",),
        ("--config", "no/such.yaml"): ("no/such.yaml", "cannot be read"),
    }.items():
        text = refusal(*arguments)
        for word in words:
            assert word in text, (arguments, text)


def test_processes_and_batches_must_divide() -> None:
    config = resolve(parse_flags(["--recipe", "demo", "--tp", "2"]))
    with pytest.raises(ConfigError, match=r"3 processes with --tp 2 .* Start a multiple of 2"):
        config.check_processes(3)
    with pytest.raises(ConfigError, match=r"global_batch_size = 8 with 3 .* Use a multiple of 12"):
        config.check_processes(6)
    assert config.check_processes(4) == 2


def test_a_run_folder_is_not_overwritten(tmp_path: Path, run_tool: Tool, arguments: Arguments) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    done = run_tool(*arguments(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: already holds")
    assert "--resume" in done.stderr


@pytest.mark.slow
def test_missing_and_damaged_data(tmp_path: Path, corpus: Path, run_tool: Tool, arguments: Arguments) -> None:
    """Missing data set, missing shard, cut shard, undecodable picture: named, no traceback, nothing written."""

    def train(folder: Path, *more: str) -> Any:
        command = arguments(tmp_path / "out", "--data", str(folder), *more)
        return run_tool(*command)

    done = train(tmp_path / "nowhere")
    assert done.returncode == 2
    assert str(tmp_path / "nowhere") in done.stderr
    broken = tmp_path / "broken"
    shutil.copytree(corpus / "pairs", broken)
    shard = sorted(broken.glob("*.tar"))[0]
    content = shard.read_bytes()
    shard.unlink()
    done = train(broken)
    assert done.returncode == 2
    assert f"{shard}: is missing" in done.stderr
    shard.write_bytes(content[:2000])
    done = train(broken)
    assert done.returncode == 2
    assert shard.name in done.stderr
    assert "Traceback" not in done.stderr
    shard.write_bytes(content.replace(b"JFIF", b"HTML"))
    done = train(broken, "data.max_consecutive_failures=1")
    assert done.returncode == 2
    assert "doc-0000" in done.stderr
    assert "picture in a row that cannot be used" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "checkpoints").exists()
