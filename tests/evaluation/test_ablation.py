"""Two runs of the ablation on pages made here: from HTML to table and plot, and again without training."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import ROOT, forked_run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def make_pages(folder: Path) -> None:
    """Forty pages of three images; far more words between them than are kept."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for page in range(40):
        parts = []
        for number in range(3):
            stored = io.BytesIO()
            pixels = generator.integers(0, 256, (64, 80, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(stored, "PNG")
            (folder / f"{page}-{number}.png").write_bytes(stored.getvalue())
            words = " ".join(f"word{generator.integers(0, 50)}" for _ in range(60))
            parts.append(f'<p>{words}</p><img src="{page}-{number}.png">')
        (folder / f"page{page}.html").write_text(f"<html><body>{''.join(parts)}</body></html>")


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the example here; the processes that it starts are forked."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "ablation")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(subprocess, "run", forked_run)

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", list(words))
        runpy.run_path(words[0], run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.timeout(900)
def test_two_settings_end_in_a_table(tmp_path: Path, labelled: Path, ablation: Callable[..., str]) -> None:
    make_pages(tmp_path / "pages")
    words = [
        "examples/ablation/run.py",
        "--pages",
        str(tmp_path / "pages"),
        "--labelled",
        str(labelled),
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "runs"),
        "--report",
        str(tmp_path / "report"),
        "--steps",
        "3",
        "--seeds",
        "1",
        "--probe-images",
        "60",
        "--settings",
        "generation only",
        "both, 0.1",
    ]
    first = ablation(*words)
    report = json.loads((tmp_path / "report" / "ablation.json").read_text())
    assert [run["setting"] for run in report["runs"]] == ["generation only", "both, 0.1"]
    assert set(report["summary"]) == {"generation only", "both, 0.1", "untrained"}
    one, two = (run["trained"] for run in report["runs"])
    assert one["steps"] == two["steps"] == 3
    assert one["images_seen"] == two["images_seen"] > 0
    assert one["images"] > 3
    assert [("untrained" in run) for run in report["runs"]] == [True, False]
    for numbers in (one, two, report["runs"][0]["untrained"]):
        assert 0 <= numbers["frozen_accuracy"] <= 1
        assert 1 < numbers["effective_rank"] < 128
    assert one != report["runs"][0]["untrained"]
    texts = (tmp_path / "data" / "corpus" / "tokenizer.json").stat()
    table = (tmp_path / "report" / "ablation.md").read_text()
    assert "| both, 0.1 | " in table
    assert (tmp_path / "report" / "ablation.svg").read_text().count("<g id=") > 50

    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.log")}
    assert len(logs) == 4
    again = ablation(*words)
    assert sorted(again.splitlines()) == sorted(first.splitlines())  # two runs at a time end in any order
    assert {path: path.stat().st_mtime_ns for path in logs} == logs
    assert (tmp_path / "data" / "corpus" / "tokenizer.json").stat().st_mtime_ns == texts.st_mtime_ns
