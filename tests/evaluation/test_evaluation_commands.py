"""Evaluation of a run of two tensor-parallel ranks, while it trains and by the commands after it."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation_runs import command, records
from launch import Job

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
Tool = Callable[..., str]


@pytest.mark.timeout(600)
def test_periodic_numbers_are_those_of_the_command(run: Path, pairs: Path, tool: Tool) -> None:
    lines = records(run / "evaluation.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["images"] == 60
        assert 0.0 <= line["R@1"] <= line["R@5"] <= 1.0
        assert 3.0 < line["generation"] < math.log(400) + 1
    assert any((run / "tensorboard").iterdir())
    # One process, from the checkpoint, on the same documents.
    tool("tools/evaluate.py", str(run), "--data", str(pairs / "pairs"))
    report = json.loads((run / "report.json").read_text())
    assert report["candidates"] == 60
    for k in (1, 5):
        assert report["retrieval"]["trained"][f"R@{k}"] == pytest.approx(lines[1][f"R@{k}"], abs=1e-6)
    assert report["generation"]["right"] == pytest.approx(lines[1]["generation"], rel=1e-4)


@pytest.mark.timeout(600)
def test_a_stop_signal_during_evaluation_is_noticed(pairs: Path, tmp_path: Path) -> None:
    """The evaluation would go on for long: it reads every document once per step."""
    out = tmp_path / "stopped"
    settings = ("evaluation.every=1", "evaluation.limit=60", "train.micro_batch_size=1", "train.steps=500")
    with Job(None, *command(pairs, out, *settings)) as job:
        end = time.monotonic() + 300
        while not (out / "evaluation.jsonl").is_file() and time.monotonic() < end:
            assert job.poll() is None, job.stdout + job.stderr
            time.sleep(0.02)
        os.kill(job.pids[0], signal.SIGTERM)
        assert job.wait(200) == 0, job.stdout + job.stderr
        output = job.stdout
    assert "stopped by request" in output
    done = len(records(out / "metrics.jsonl"))
    assert done < 100
    assert (out / "checkpoints" / f"step-{done:08d}" / "manifest.json").is_file()


@pytest.mark.timeout(600)
def test_classification(run: Path, labelled: Path, tool: Tool) -> None:
    words = ["--epochs", "20", "--batch-size", "50", "--lr", "3e-3"]
    tool("tools/evaluate.py", "classify", str(run), "--data", str(labelled), *words)
    result: dict[str, Any] = json.loads((run / "results" / "classification-frozen-transfer.json").read_text())
    assert (result["train_images"], result["test_images"], result["classes"]) == (200, 60, 3)
    assert result["steps"] == 4
    for name in ("trained", "random_init"):
        assert result[name]["top1"] > 0.8, result
    assert result["pixels"]["linear"]["top1"] > 0.8
    assert result["trained"] != result["random_init"]


@pytest.mark.timeout(600)
def test_the_other_commands(run: Path, pairs: Path, labelled: Path, tool: Tool, tmp_path: Path) -> None:
    """Fine-tuning, zero-shot, retrieval and captions; one process each, as a user would."""
    words = ["--transfer", "full", "--epochs", "2", "--batch-size", "50", "--lr", "1e-3", "--no-baselines"]
    tool("tools/evaluate.py", "classify", str(run), "--data", str(labelled), *words)
    found = json.loads((run / "results" / "classification-full-transfer.json").read_text())
    assert 0 <= found["trained"]["top1"] <= 1
    assert "random_init" not in found
    (tmp_path / "names.txt").write_text("left\nright\nmiddle\n")
    tool("tools/evaluate.py", "zeroshot", str(run), "--data", str(labelled), "--classnames", f"{tmp_path}/names.txt")
    found = json.loads((run / "results" / "zeroshot.json").read_text())
    assert found["largest_class"]["top1"] >= 1 / 3
    assert found["trained"]["top5"] == 1.0
    tool("tools/evaluate.py", "retrieval", str(run), "--data", str(pairs / "pairs"), "--limit", "20")
    found = json.loads((run / "results" / "retrieval.json").read_text())
    assert found["images"] == 20
    assert found["captions"] >= 20
    assert found["trained"] != found["random_init"]
    tool("tools/evaluate.py", "caption", str(run), "--data", str(pairs / "pairs"), "--limit", "6", "--max-tokens", "5")
    found = json.loads((run / "results" / "caption.json").read_text())
    assert len(found["examples"]) == 6
    assert all(0 <= found["trained"][name] <= 100 for name in ("BLEU-1", "BLEU-4"))
    from corpora import make_dataset

    train = make_dataset(tmp_path / "train", documents=20, seed=1)
    words = ["--limit", "6", "--train", str(train), "--transfer", "full", "--steps", "2", "--batch-size", "4"]
    more = ["--chunk-size", "3", "--language-model", "pretrained", "--text-tokens", "20", "--max-tokens", "4"]
    tool("tools/evaluate.py", "caption", str(run), "--data", str(pairs / "pairs"), *words, *more)
    found = json.loads((run / "results" / "caption-full-transfer.json").read_text())
    assert (found["train_images"], found["images"], found["training"]["drop_path"]) == (20, 6, 0.2)
    assert 3.0 < found["trained"]["test_loss"] < math.log(400) + 1
    assert found["trained"]["test_loss"] != found["random_init"]["test_loss"]
    assert "pixels" not in found
