"""One tiny run of two tensor-parallel ranks, evaluated while it trains, and a labelled data set that is easy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), *(str(TESTS / name) for name in ("data", "distributed", "evaluation", "models"))]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pairs/` and `tokenizer.json`."""
    from tiny import make_corpus

    return make_corpus(tmp_path_factory.mktemp("evaluation-corpus"))


@pytest.fixture(scope="session")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on two tensor-parallel ranks, evaluated after every second one."""
    from evaluation_runs import command
    from launch import torchrun

    out = tmp_path_factory.mktemp("evaluation-runs") / "run"
    torchrun(2, *command(pairs, out, "parallel.tensor_parallel_size=2", "evaluation.every=2", "evaluation.limit=60"))
    return out


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IDX files of 200 and 60 images of three classes: bright on the left, on the right, or in the middle."""
    folder = tmp_path_factory.mktemp("labelled")
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 60)):
        labels = generator.integers(0, 3, count).astype(np.uint8)
        pixels = generator.integers(0, 80, (count, 28, 28)).astype(np.uint8)
        for i, label in enumerate(labels):
            pixels[i, :, (0, 18, 9)[label] : (10, 28, 19)[label]] += 150
        for kind, values in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", labels)):
            header = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            (folder / f"{prefix}-{kind}").write_bytes(header + values.tobytes())
    return folder


@pytest.fixture(scope="session")
def tool() -> Callable[..., str]:
    """Run a script in one process and return what it printed."""

    from launch import run_script

    def call(*words: str, timeout: float = 500) -> str:
        done = run_script(*words, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call
