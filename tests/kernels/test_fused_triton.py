"""The fused element-wise Triton kernels without a GPU: in the interpreter against fp64, and compiled for three GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lcl_kernels.triton_config import SHARED_MEMORY

from test_triton import finish, run_worker

pytestmark = pytest.mark.slow
CAPABILITIES = (80, 90, 100)
RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "fused-kernels-compiled.json"


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("interpreter")
    result = folder / "result.json"
    finish(run_worker("fused_interpreter_worker.py", [str(result)], folder, TRITON_INTERPRET="1"), 200)
    return json.loads(result.read_text())


@pytest.mark.timeout(250)
def test_values_and_gradients_match_fp64(interpreted: dict[str, Any]) -> None:
    """In half precision what is left is one rounding of each result: 2^-9 of its size at most."""
    assert len(interpreted["cases"]) == 30
    for case in interpreted["cases"]:
        for part, error in case["errors"].items():
            assert error < (2**-7.5 if case["half"] else 1e-6), (case["name"], part)


@pytest.mark.timeout(250)
def test_masks_have_the_bits_of_their_definition(interpreted: dict[str, Any]) -> None:
    found = [case["same_mask"] for case in interpreted["cases"] if "same_mask" in case]
    assert found == [True] * 15


@pytest.mark.timeout(250)
def test_a_split_vocabulary_has_the_gradient_of_a_whole_one(interpreted: dict[str, Any]) -> None:
    """Sums and gradient in two launches, as tensor parallelism has them, have the bits of the launch that does both."""
    found = [case for case in interpreted["cases"] if "equal" in case]
    assert [case["equal"] for case in found] == [True] * 4
    assert [case["where_zero"] for case in found] == [0.0] * 4, "padding words and ignored rows have no gradient"
    assert interpreted["padding_only"], "a shard of padding adds nothing"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compile")
    workers = [run_worker("fused_compile_worker.py", [str(folder / f"{c}.json"), str(c)], folder) for c in CAPABILITIES]
    for worker in workers:
        finish(worker, 200)
    return [row for c in CAPABILITIES for row in json.loads((folder / f"{c}.json").read_text())]


@pytest.mark.timeout(250)
def test_compiled_kernels_spill_nothing_and_fill_their_gpu(compiled: list[dict[str, Any]]) -> None:
    assert len(compiled) == 17 * len(CAPABILITIES)
    for row in compiled:
        assert row["spill_stores"] == row["spill_loads"] == 0, row
        assert row["shared"] <= SHARED_MEMORY[row["capability"]] // 4, row
        # 65,536 registers a multiprocessor: four blocks of the backward kernels at a time, two of the widest.
        assert row["registers"] * row["threads"] <= 65536 // (2 if row["threads"] == 512 else 4), row


@pytest.mark.timeout(250)
def test_compiled_kernels_read_and_write_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    """Parameters' gradients and the label's logit are single numbers; nothing of the size of the activations is."""
    for row in compiled:
        single = {"residual_reduce": 3, "activation_reduce": 1, "vocabulary": 1}.get(row["kernel"], 0)
        assert row["two_byte_accesses"] <= single, row


@pytest.mark.timeout(250)
def test_the_committed_table_is_of_these_kernels(compiled: list[dict[str, Any]]) -> None:
    """Same kernels, widths and options; registers may differ by a few with another Triton."""

    def identity(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(str(row[key]) for key in ("capability", "kernel", "element", "width", "options", "threads"))

    recorded = json.loads(RECORDED.read_text())["kernels"]
    assert [identity(row) for row in recorded] == [identity(row) for row in compiled]
