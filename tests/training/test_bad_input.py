"""Mistakes get one clear message (value, rule, remedy) and a non-zero exit."""

from __future__ import annotations

import json
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
            "parallel.tensor_parallel_size = 5",
            "Use --tp from [1, 2, 3, 4, 6, 12]",
        ),
        ("--recipe", "demo", "--pp", "9"): ("parallel.pipeline_parallel_size = 9", "--pp"),
        ("--recipe", "demo", "--pp", "2", "--negatives", "micro_batch"): (
            "micro_batch",
            "--negatives global_batch",
        ),
        ("--recipe", "demo", "--pp", "2", "--set", "parallel.stage_layers=[4]"): ("stage_layers", "balanced"),
        ("--recipe", "demo", "--recompute-vision", "half"): ("recompute_vision = 'half'", "block:4"),
        ("--recipe", "demo", "--cp", "2"): ("parallel.context = 2", "not supported"),
        ("--recipe", "demo", "--sequence-parallel"): ("parallel.sequence_parallel", "--tp to 2 or more"),
        ("--recipe", "demo", "--set", "parallel.overlap_tensor=true"): (
            "overlap_tensor = True",
            "Leave it out",
        ),
        ("--recipe", "demo", "--device", "cpu", "--set", "optim.optimizer_backend=apex"): (
            "optim.optimizer_backend = apex",
            "CUDA only",
            "optim.optimizer_backend=auto",
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
@pytest.mark.timeout(200)
def test_missing_and_damaged_data(tmp_path: Path, corpus: Path, run_tool: Tool, arguments: Arguments) -> None:
    """Missing data set, missing shard, cut shard, undecodable image: named, no traceback, nothing written."""
    first = sorted((corpus / "pairs").glob("*.tar"))[0]
    content = first.read_bytes()
    damaged = {"gone": None, "cut": content[:2000], "spoiled": content.replace(b"JFIF", b"HTML")}
    expected = {
        "nowhere": (str(tmp_path / "nowhere"),),
        "gone": (f"{first.name}: is missing",),
        "cut": (first.name,),
        "spoiled": ("doc-0000", "image in a row that cannot be used"),
    }
    cases = []
    for name in expected:
        folder = tmp_path / name
        if name != "nowhere":
            shutil.copytree(corpus / "pairs", folder)
            (folder / first.name).unlink()
            if (left := damaged[name]) is not None:
                (folder / first.name).write_bytes(left)
        cases.append(arguments(tmp_path / "out", "--data", str(folder), "data.max_consecutive_failures=1"))
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases))
    done = run_tool("tests/training/tool_worker.py", str(file), timeout=180)
    assert done.returncode == 0, done.stderr
    for result, (name, words) in zip(json.loads(done.stdout.splitlines()[-1]), expected.items(), strict=True):
        assert result["code"] == 2, (name, result)
        for word in words:
            assert word in result["stderr"], (name, result)
        assert "Traceback" not in result["stderr"], name
    assert not (tmp_path / "out" / "checkpoints").exists()
