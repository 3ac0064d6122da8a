"""The same learning in every layout: 20 steps from one checkpoint, and on from the checkpoint of another layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch import torchrun
from lcl_mcore.checkpoint.consolidate import consolidate
from training_runs import records

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
Arguments = Callable[..., list[str]]

SPLIT = "tp2-vision-tensor"
START, END, HANDOVER = 3, 23, 10
PLAIN = ("model.vision.drop_path=0", "model.language.dropout=0")
FOUR_LAYERS = ("model.language.layers=4", "checkpoint.keep=99")

# By number of processes: name -> flags. Micro-batches: 8 rows over the data-parallel ranks, in parts of 8, 4, 2 or 1.
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"micro2": ("--micro-batch-size", "4"), "micro4": ("--micro-batch-size", "2")},
    2: {
        "dp2": ("--micro-batch-size", "4"),
        "tp2-vision-tensor": ("--tp", "2", "--vision-parallel", "tensor", "--micro-batch-size", "8"),
        "tp2-vision-data-micro2": ("--tp", "2", "--vision-parallel", "data", "--micro-batch-size", "4"),
        "pp2-micro4": ("--pp", "2", "--micro-batch-size", "2"),
    },
    4: {
        "tp2-dp2-sp": ("--tp", "2", "--sequence-parallel", "--vision-parallel", "tensor", "--micro-batch-size", "4"),
        "tp2-pp2": ("--tp", "2", "--pp", "2", "--micro-batch-size", "4"),
        "pp4-micro8": ("--pp", "4", "--micro-batch-size", "1", "parallel.stage_layers=[1,1,1,1]"),
    },
    8: {"tp2-pp2-dp2": ("--tp", "2", "--pp", "2", "--micro-batch-size", "2", "--checkpoint-every", "10")},
}
# With dropout and drop-path, whose masks are keyed by identity.
DROPPING: dict[int, dict[str, tuple[str, ...]]] = {
    2: {"dropping-tp2-sp": ("--tp", "2", "--sequence-parallel")},
    4: {"dropping-dp4": ("--micro-batch-size", "2")},
}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]


class Matrix:
    """Runs of one data set under a folder."""

    def __init__(self, root: Path, arguments: Arguments) -> None:
        self.root, self.arguments = root, arguments

    def job(self, name: str, *flags: str, start: tuple[str, int] | None, rates: tuple[str, ...]) -> list[Any]:
        """One entry of the worker's list; `start` names the run and the step whose checkpoint it continues."""
        folder = self.root / name
        if start is not None:
            checkpoint = f"checkpoints/step-{start[1]:08d}"
            shutil.copytree(self.root / start[0] / checkpoint, folder / checkpoint)
        sizes = ("--global-batch-size", "8", "--micro-batch-size", "8", "--checkpoint-every", "0")
        words = self.arguments(folder, "--steps", str(END), *sizes, *flags, *FOUR_LAYERS, *rates)
        return [str(folder), words[1:]]

    def launch(self, processes: int, jobs: list[list[Any]]) -> None:
        file = self.root / f"jobs-{processes}-{len(jobs)}-{Path(jobs[0][0]).name}.json"
        file.write_text(json.dumps(jobs))
        torchrun(processes, "tests/training/layouts_worker.py", str(file), timeout=280)

    def losses(self, name: str, start: int) -> dict[int, dict[str, Any]]:
        """The metrics of the steps after `start`."""
        lines = [json.loads(line) for line in (self.root / name / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line for line in lines if line["step"] > start}


@pytest.fixture(scope="module")
def matrix(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """A run of one process, and every layout from its third step on."""
    matrix = Matrix(tmp_path_factory.mktemp("layouts"), arguments)
    every = ("--checkpoint-every", str(START))
    matrix.launch(
        1, [matrix.job("whole", *every, start=None, rates=PLAIN), matrix.job("dropping", *every, start=None, rates=())]
    )
    for processes, layouts in LAYOUTS.items():
        jobs = [matrix.job(name, *flags, start=("whole", START), rates=PLAIN) for name, flags in layouts.items()]
        for name, flags in DROPPING.get(processes, {}).items():
            jobs += [matrix.job(name, *flags, start=("dropping", START), rates=())]
        matrix.launch(processes, jobs)
    back = matrix.job("back", start=("tp2-pp2-dp2", HANDOVER), rates=PLAIN)
    consolidate(str(matrix.root / SPLIT), matrix.root / "weights")
    still = ("--steps", "1", "--lr", "1e-30", "--init-from", str(matrix.root / "weights"))
    matrix.launch(1, [back, matrix.job("from-weights", *still, start=None, rates=PLAIN)])
    return matrix


def assert_close(left: dict[int, Any], right: dict[int, Any], next_step: float, later: float) -> None:
    """Losses and gradient norms of the same steps, the first to `next_step`, the others to `later` (relative)."""
    assert left.keys() == right.keys()
    for step, record in left.items():
        tolerance = next_step if step == min(left) else later
        assert right[step]["order_hash"] == record["order_hash"]
        for name in ("loss", "contrastive", "generation", "grad_norm"):
            assert right[step][name] == pytest.approx(record[name], rel=tolerance), (step, name)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_from_one_checkpoint(matrix: Matrix, name: str) -> None:
    expected = matrix.losses("whole", START)
    assert len(expected) == 20
    assert expected[END]["loss"] < expected[START + 1]["loss"]  # it learns
    assert_close(expected, matrix.losses(name, START), 1e-6, 1e-5)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for layouts in DROPPING.values() for name in layouts])
def test_other_layouts_drop_the_same_units(matrix: Matrix, name: str) -> None:
    assert_close(matrix.losses("dropping", START), matrix.losses(name, START), 1e-6, 1e-5)


@pytest.mark.timeout(300)
def test_one_process_continues_what_eight_ranks_saved(matrix: Matrix) -> None:
    """tp2 x pp2 x dp2 wrote the checkpoint: every following loss is that of the run that never left home."""
    assert_close(matrix.losses("whole", HANDOVER), matrix.losses("back", HANDOVER), 1e-6, 1e-5)
    assert len(records(matrix.root / "whole")) == END


@pytest.mark.timeout(300)
def test_megatrons_own_loader_reads_what_eight_ranks_saved(matrix: Matrix) -> None:
    """Weights and moments come out of `dist_checkpointing.load` as our reader sees them, whole and by halves."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from lcl_mcore.checkpoint.consolidate import consolidated_weights
    from lcl_mcore.distributed.device import init_process_group, pick_device

    if not torch.distributed.is_initialized():
        init_process_group(pick_device("cpu"), 60)
    folder = matrix.root / "tp2-pp2-dp2" / f"checkpoints/step-{HANDOVER:08d}"
    weights = consolidated_weights(folder)
    assert len(weights) > 40
    wanted = {
        f"{kind}{name}": ShardedTensor.from_rank_offsets(f"{kind}{name}", torch.full_like(value, torch.nan))
        for kind in ("weights/", "exp_avg/", "exp_avg_sq/")
        for name, value in weights.items()
    }
    loaded = dist_checkpointing.load(wanted, str(folder))
    assert loaded["step"] == HANDOVER
    for name, value in weights.items():
        assert torch.equal(loaded[f"weights/{name}"], value), name
        assert bool((loaded[f"exp_avg_sq/{name}"] >= 0).all()), name
    name = max(weights, key=lambda name: weights[name].numel())
    half = weights[name].chunk(2)[1]
    part = ShardedTensor.from_rank_offsets(f"weights/{name}", torch.full_like(half, torch.nan), (0, 1, 2))
    second = dist_checkpointing.load({"half": part}, str(folder), validate_access_integrity=False)
    assert torch.equal(second["half"], half)


@pytest.mark.timeout(300)
def test_consolidated_weights_are_the_models(matrix: Matrix) -> None:
    """One file from a run of two tensor-parallel ranks: their parameters, bitwise, and `--init-from` takes them."""
    ranks = [torch.load(matrix.root / SPLIT / f"rank{rank}.pt") for rank in (0, 1)]
    whole = load_file(matrix.root / "weights" / "model.safetensors")
    assert whole.keys() == ranks[0].keys()
    split = 0
    for name, value in whole.items():
        axis = ranks[0][name][1]
        parts = [rank[name][0] for rank in ranks]
        model = torch.cat(parts, axis) if axis >= 0 else parts[0]
        split += axis >= 0
        if name == "language.token_embedding.weight":  # padding rows are no part of the model
            assert len(value) == 400 < len(model)
            model = model[:400]
        assert torch.equal(value, model), name
    assert split > 10
    begun = torch.load(matrix.root / "from-weights" / "rank0.pt")
    for name, value in whole.items():
        assert torch.equal(begun[name][0][: len(value)], value), name
