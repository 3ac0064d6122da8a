"""Triton kernels without a GPU: in the interpreter against fp64, and compiled for sm_80 and sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lcl_kernels.triton_config import SHARED_MEMORY

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def run_worker(name: str, arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables |= {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / "cache")} | environment
    command = [sys.executable, "-W", "ignore", str(HERE / name), *arguments]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], timeout: float) -> None:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("interpreter")
    result = folder / "result.json"
    finish(run_worker("interpreter_worker.py", [str(result)], folder, TRITON_INTERPRET="1"), 280)
    return json.loads(result.read_text())


@pytest.mark.timeout(300)
def test_interpreted_loss_and_gradients_match_fp64(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["cases"]) >= 20
    for case in interpreted["cases"]:
        half = case["precision"] == "fp16"
        # Equal vectors: every logit is +-100 or the sum of it and a multiple of its last place.
        cancels = "identical" in case["name"] or "opposite" in case["name"]
        assert case["loss"] < (1e-5 if half or cancels else 1e-6), case["name"]
        for part in ("image", "text", "scale"):
            assert case[part] < (5e-4 if half else 1.2e-5), (case["name"], part)


@pytest.mark.timeout(300)
def test_interpreted_blocks_match_fp64(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["blocks"]) == 3
    for block in interpreted["blocks"]:
        assert block["worst"] < 1e-5, block["name"]


@pytest.mark.timeout(300)
def test_the_fallback_is_what_saves_opposite_embeddings(interpreted: dict[str, Any]) -> None:
    """Without it the shifted sums vanish, so the case above would not prove anything if they did not."""
    assert not interpreted["without_fallback"] < 1.0


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compile")
    processes = [run_worker("compile_worker.py", [str(folder / f"{c}.json"), str(c)], folder) for c in SHARED_MEMORY]
    for process in processes:
        finish(process, 800)
    return [row for c in SHARED_MEMORY for row in json.loads((folder / f"{c}.json").read_text())]


@pytest.mark.timeout(900)
def test_compiled_kernels_fit_their_gpu(compiled: list[dict[str, Any]]) -> None:
    assert {r["capability"] for r in compiled} == {80, 90, 100}
    assert len(compiled) == 37
    for row in compiled:
        assert row["spill_stores"] == row["spill_loads"] == 0, row
        assert 0 < row["shared"] <= SHARED_MEMORY[row["capability"]], row
        assert 0 < row["registers"] <= 255, row


@pytest.mark.timeout(900)
def test_half_precision_tiles_move_by_descriptor_or_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    for row in (r for r in compiled if r["precision"] == "fp16"):
        moved = row["loads_by_descriptor"], row["loads_to_shared_by_thread"]
        assert (moved[0] > 0, moved[1] > 0) == ((False, True) if row["capability"] == 80 else (True, False)), row
        if row["kernel"] == "gradient":
            stores = {"16": 8} if row["capability"] == 80 else {}
            assert row["stores_to_global"] == stores, row
            assert (row["stores_by_descriptor"] > 0) == (row["capability"] >= 90), row


@pytest.mark.timeout(900)
def test_compiled_kernels_use_the_matrix_units(compiled: list[dict[str, Any]]) -> None:
    unit = {80: ["mma.sync"], 90: ["wgmma.mma_async"], 100: ["tcgen05.mma"]}
    for row in compiled:
        if row["precision"] != "fp32":
            assert row["matrix"] == unit[row["capability"]], row
