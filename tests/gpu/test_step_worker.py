"""What the GPU tests start works on a CPU, so that it is not first tried where a GPU is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import run_script


@pytest.mark.slow
def test_the_worker_trains_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "result.pt"
    done = run_script("tests/gpu/step_worker.py", "--device", "cpu", "--micro-batches", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = torch.load(out, weights_only=True)
    assert result["backends"]["optimizer"] == "torch AdamW"
    assert all(torch.isfinite(gradient).all() for gradient in result["gradients"].values())
    # [.., contrastive loss, generation loss, scale] of four steps on one batch
    assert result["reports"].shape == (4, 8)
    for loss in result["reports"][:, -3:-1].T.tolist():
        assert loss == sorted(loss, reverse=True)
        assert loss[-1] < 0.9 * loss[0]
