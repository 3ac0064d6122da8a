"""A tiny data set and a command line that trains on it in seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "training"), str(TESTS / "data"), str(TESTS / "distributed")]

ROOT = TESTS.parent
TINY = (
    "model.vision.image_size=32", "model.vision.width=32", "model.vision.layers=2", "model.vision.heads=4",
    "model.vision.mlp_width=64", "model.vision.drop_path=0.2", "model.language.width=32",
    "model.language.layers=2", "model.language.heads=4", "model.language.mlp_width=64",
    "model.language.dropout=0.1", "model.language.vocab_size=400", "model.pool_heads=4",
    "data.sequence_length=64", "data.decode_backend=cpu", "log.tensorboard=false",
)  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pairs/` (60 documents) and `tokenizer.json`."""
    from corpora import make_dataset, small_tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    make_dataset(folder / "pairs")
    small_tokenizer().save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def arguments(corpus: Path) -> Callable[..., list[str]]:
    """Command line of a tiny run."""

    def make(out: Path, *more: str) -> list[str]:
        """`more` are flags with their values, and settings of the form section.name=value."""
        settings = [word for word in more if "=" in word]
        flags = [word for word in more if "=" not in word]
        return [
            "tools/pretrain_lcl.py", "--recipe", "demo", "--data", str(corpus / "pairs"),
            "--tokenizer", str(corpus), "--out", str(out), "--steps", "8", "--micro-batch-size", "2",
            "--global-batch-size", "4", "--checkpoint-every", "3", "--log-every", "1", "--timeout", "60",
            *flags, "--set", *TINY, *settings,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in one process."""

    def run(*command: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=timeout, check=False, **options,
        )  # fmt: skip

    return run
