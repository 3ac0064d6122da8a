"""The training step on a CUDA device against the same step on the CPU; run by the GPU report."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lcl_mcore import optional_packages as probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(150),
]
WORKER = Path(__file__).parent / "step_worker.py"
NEEDS_TE = pytest.mark.skipif(
    torch.cuda.is_available() and not probe.transformer_engine().usable,
    reason=f"Transformer Engine: {probe.transformer_engine().reason}" if torch.cuda.is_available() else "",
)
NEEDS_FP8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="FP8 needs compute capability 8.9 or newer",
)


def needs(found: Callable[[], probe.Probe]) -> pytest.MarkDecorator:
    """Skip without this package; nothing is looked for where there is no GPU."""
    missing = torch.cuda.is_available() and not found().usable
    return pytest.mark.skipif(missing, reason=f"{found().name}: {found().reason}" if missing else "")


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Result of the worker with these options; the same options run once."""
    done: dict[tuple[str, ...], dict[str, Any]] = {}

    def start(device: str, *options: str) -> dict[str, Any]:
        key = (device, *options)
        if key not in done:
            out = tmp_path_factory.mktemp("step") / "result.pt"
            command = [sys.executable, str(WORKER), "--device", device, *options, "--out", str(out)]
            hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
            process = subprocess.run(
                command, env={**os.environ, **hidden}, capture_output=True, text=True, timeout=120, check=False
            )
            assert process.returncode == 0, process.stderr[-4000:]
            done[key] = torch.load(out, weights_only=True)
        return done[key]

    return start


def worst(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str]:
    """Largest error of a parameter's gradient, relative to its norm, and whose it is.

    The floor forgives what is zero but for rounding, such as the gradient of a key's bias.
    """
    largest = max(float(g.norm()) for g in theirs["gradients"].values())
    return max(
        (float((ours["gradients"][name] - g).norm()) / max(float(g.norm()), 1e-4 * largest), name)
        for name, g in theirs["gradients"].items()
    )


@pytest.mark.parametrize("micro_batches", ["1", "2"])
def test_fp32_step_equals_the_cpu(run: Run, micro_batches: str) -> None:
    cpu = run("cpu", "--micro-batches", micro_batches)
    cuda = run("cuda", "--micro-batches", micro_batches)
    error, name = worst(cuda, cpu)
    assert error < 1e-4, name
    # Gradient norm and losses of all steps: the optimizer moves both models alike.
    assert torch.allclose(cuda["reports"], cpu["reports"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_bf16_step_is_near_the_fp32_reference(run: Run, recompute: str) -> None:
    cpu = run("cpu", "--micro-batches", "1")
    cuda = run("cuda", "--precision", "bf16", "--recompute", recompute)
    assert_near(cuda, cpu, gradient=0.12, loss=0.02)


def test_recompute_changes_no_gradient(run: Run) -> None:
    kept = run("cuda", "--precision", "bf16", "--recompute", "none")
    again = run("cuda", "--precision", "bf16", "--recompute", "full")
    error, name = worst(again, kept)
    assert error < 2e-3, name  # the sums of attention's backward pass have no fixed order


@NEEDS_TE
def test_transformer_engine_is_near_the_fp32_reference(run: Run) -> None:
    cuda = run("cuda", "--precision", "bf16", "--backend", "te")
    assert cuda["backends"]["layers"] == "transformer-engine"
    assert_near(cuda, run("cpu", "--micro-batches", "1"), gradient=0.12, loss=0.02)


@NEEDS_TE
@NEEDS_FP8
def test_fp8_is_on_and_near_the_fp32_reference(run: Run) -> None:
    cuda = run("cuda", "--precision", "fp8", "--backend", "te")
    assert cuda["fp8"], "precision fp8 left FP8 off in the model's configuration"
    assert_near(cuda, run("cpu", "--micro-batches", "1"), gradient=0.5, loss=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "title"),
    [
        pytest.param("te", "TE FusedAdam", marks=needs(probe.te_adam)),
        pytest.param("apex", "Apex FusedAdam", marks=needs(probe.apex_adam)),
    ],
)
def test_fused_optimizer_learns_what_torch_learns(run: Run, name: str, title: str, precision: str) -> None:
    plain = run("cuda", "--precision", precision)
    fused = run("cuda", "--precision", precision, "--optimizer", name)
    assert (plain["backends"]["optimizer"], fused["backends"]["optimizer"]) == ("torch AdamW", title)
    tolerance = 1e-4 if precision == "fp32" else 1e-2  # attention's backward has no fixed order of sums
    assert torch.allclose(fused["reports"], plain["reports"], rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "who"),
    [
        pytest.param("torch", "apex", marks=needs(probe.apex_gradient_fusion)),
        pytest.param("te", "transformer-engine", marks=NEEDS_TE),
    ],
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradient_accumulation_fusion_changes_no_gradient(run: Run, layers: str, who: str, recompute: str) -> None:
    """Over two micro-batches, which share the fp32 buffers; not fused, a weight's gradient is rounded to bf16 first."""
    options = ("--precision", "bf16", "--backend", layers, "--micro-batches", "2", "--recompute", recompute)
    plain, fused = run("cuda", *options), run("cuda", *options, "--fuse")
    assert (plain["backends"]["wgrad"], fused["backends"]["wgrad"]) == ("off", who)
    error, name = worst(fused, plain)
    assert error < 1e-2, name
    assert torch.allclose(fused["reports"], plain["reports"], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "bf16"),
        ("--precision", "bf16", "--micro-batches", "2", "--recompute", "full", "--dropout", "0.1"),
        ("--precision", "fp32"),
        pytest.param(
            ("--precision", "bf16", "--backend", "te", "--optimizer", "te", "--fuse"),
            marks=[NEEDS_TE, needs(probe.te_adam)],
        ),
        pytest.param(
            ("--precision", "bf16", "--optimizer", "apex", "--fuse"),
            marks=[needs(probe.apex_adam), needs(probe.apex_gradient_fusion)],
        ),
    ],
    ids=lambda options: " ".join(options),
)
def test_the_host_never_waits_in_a_step(run: Run, options: tuple[str, ...]) -> None:
    waits = run("cuda", *options, "--watch-sync")["waits"]
    assert not waits, "\n" + "\n".join(waits)


def assert_near(ours: dict[str, Any], theirs: dict[str, Any], *, gradient: float, loss: float) -> None:
    """Gradients of the first step as one vector, and losses of every step."""
    squares = [
        (float((ours["gradients"][n] - g).square().sum()), float(g.square().sum()))
        for n, g in theirs["gradients"].items()
    ]
    error = (sum(d for d, _ in squares) / sum(s for _, s in squares)) ** 0.5
    assert error < gradient
    # [.., contrastive loss, generation loss, scale]
    assert torch.allclose(ours["reports"][:, -3:], theirs["reports"][:, -3:], rtol=loss, atol=loss)
