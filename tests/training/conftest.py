"""A tiny data set and a command line that trains on it in seconds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "training"), str(TESTS / "data"), str(TESTS / "distributed")]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pairs/` (60 documents) and `tokenizer.json`."""
    from tiny import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def arguments(corpus: Path) -> Callable[..., list[str]]:
    """Command line of a tiny run."""
    from tiny import DROPPING, MODEL

    def make(out: Path, *more: str) -> list[str]:
        """`more` are flags with their values, and settings of the form section.name=value."""
        settings = [word for word in more if "=" in word]
        flags = [word for word in more if "=" not in word]
        return [
            "tools/pretrain_lcl.py",
            "--recipe",
            "demo",
            "--data",
            str(corpus / "pairs"),
            "--tokenizer",
            str(corpus),
            "--out",
            str(out),
            "--steps",
            "8",
            "--micro-batch-size",
            "2",
            "--global-batch-size",
            "4",
            "--checkpoint-every",
            "3",
            "--log-every",
            "1",
            "--timeout",
            "60",
            *flags,
            "--set",
            *MODEL,
            *DROPPING,
            *settings,
        ]

    return make


@pytest.fixture(scope="session")
def undisturbed(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps on two ranks, dropout and drop-path on, checkpoints at 18 and 20; not to be written to."""
    from launch import torchrun
    from training_runs import records

    out = tmp_path_factory.mktemp("undisturbed") / "run"
    torchrun(2, *arguments(out, "--steps", "20"), timeout=580)
    assert len(records(out)) == 20
    return out


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in one process."""
    from launch import run_script

    return run_script
