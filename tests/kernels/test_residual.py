"""Residual branch and activation in plain torch, and what the Triton operators promise about shapes and traffic."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lcl_kernels import (
    bias_activation,
    bias_activation_reference,
    drawn_keep,
    residual_branch,
    residual_branch_reference,
)
from lcl_kernels.triton_fused import FusedImpl
from torch import Tensor

from lcl_mcore.planning.counter import StepCounter

T, H = 12, 20


def row_keys(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(seed))


def leaves(device: str = "cpu", dtype: torch.dtype = torch.float64, rows: int = T, width: int = H) -> list[Tensor]:
    """Residual, branch, bias, gain, norm weight and norm bias."""
    torch.manual_seed(0)
    shapes = [(rows, width)] * 2 + [(width,)] * 4
    return [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "drop path": {"row_scale": torch.tensor([0.0, 1.25, 1.25])},
    "dropout": {"dropout": (row_keys(T), 0.3)},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("full", [True, False])
def test_plain_is_the_formula(masks: dict[str, Any], full: bool) -> None:
    def call(function: Callable[..., Any], cast: torch.dtype) -> list[Tensor]:
        x = leaves(dtype=cast)
        options = {"bias": x[2], "gain": x[3], "norm": (x[4], x[5], 1e-5)} if full else {}
        out = [o for o in function(x[0], x[1], **options, **masks) if o is not None]
        sum((o * o).sum() for o in out).backward()  # type: ignore[union-attr]
        return [*out, *(leaf.grad for leaf in x if leaf.grad is not None)]

    ours, truth = call(residual_branch, torch.float32), call(residual_branch_reference, torch.float64)
    assert len(ours) == len(truth) == (8 if full else 3)
    # Single precision draws other numbers than double precision from one seed: compare what is computed in both.
    again = call(residual_branch, torch.float64)
    for a, b in zip(again, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dropout_mask_is_the_stream_of_splitmix64() -> None:
    """Four elements share one output of the row's stream, low bits first; the definition on Python's integers."""
    keys = row_keys(3)
    mask = drawn_keep(keys, 10, 0.25)
    for row, key in enumerate(keys.tolist()):
        for column in range(10):
            draw = (key + (column // 4 + 1) * 0x9E3779B97F4A7C15) % 2**64
            draw = (draw ^ draw >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            draw = (draw ^ draw >> 27) * 0x94D049BB133111EB % 2**64
            draw ^= draw >> 31
            assert bool(mask[row, column]) == ((draw >> 16 * (column % 4)) % 65536 >= 16384)


def test_dropout_mask_belongs_to_the_row_alone() -> None:
    """Any share of the rows, as sequence parallelism has them, sees the mask of the whole."""
    keys = row_keys(64)
    whole = drawn_keep(keys, 37, 0.1)
    assert torch.equal(torch.cat([drawn_keep(part, 37, 0.1) for part in keys.split([5, 40, 19])]), whole)
    assert torch.equal(drawn_keep(keys, 90, 0.1)[:, :37], whole)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    kept = drawn_keep(row_keys(2000), 512, p).float()
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - (1 - p)) <= 4 * sigma + 2**-17
    out, _ = residual_branch(torch.zeros(2000, 512), torch.ones(2000, 512), dropout=(row_keys(2000), p))
    assert abs(float(out.mean()) - 1) <= 4 * sigma / (1 - p) + 1e-6


def test_neighbours_are_independent() -> None:
    """Neighbours share a draw, not bits: pairs at any distance agree as often as chance has it."""
    kept = drawn_keep(row_keys(4000), 256, 0.5).float() * 2 - 1
    for distance in (1, 2, 3, 4, 8):
        correlation = float((kept[:, distance:] * kept[:, :-distance]).mean())
        assert abs(correlation) < 5 / (4000 * 240) ** 0.5, distance
    assert abs(float((kept[1:] * kept[:-1]).mean())) < 5 / (4000 * 240) ** 0.5


@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_plain_activation(kind: Any) -> None:
    x, bias = torch.randn(5, 7), torch.randn(7)
    assert torch.equal(bias_activation(x, bias, kind), bias_activation_reference(x, bias, kind))


def moved(counter: StepCounter) -> int:
    return sum(call.bytes * times for call, times in counter.operators.items())


X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: residual_branch(X, X.half()),
            "residual (4, 6) torch.float32 and branch (4, 6) torch.float16 must be [t, h] of one dtype",
        ),
        (lambda: residual_branch(X, X, row_scale=torch.ones(3)), "row_scale [3] does not divide 4 rows"),
        (lambda: residual_branch(X, X, impl="cuda"), "impl='cuda': must be one of auto, triton, plain"),  # type: ignore[arg-type]
        (
            lambda: residual_branch(X, X, impl="triton"),
            'impl="triton" cannot run on torch.float32 on cpu; use impl="plain"',
        ),
        (lambda: bias_activation(X, None, "swish"), "kind='swish': must be one of gelu, relu"),  # type: ignore[arg-type]
        (lambda: bias_activation(X, X[0, :2], "gelu"), "x (4, 6) and bias (2,) must be [t, f], [f]"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize(
    ("parts", "masked", "forward", "backward"), [("gbn", True, 4, 6), ("bn", True, 4, 5), ("bn", False, 4, 4)]
)
def test_traffic_of_the_residual_branch(parts: str, masked: bool, forward: int, backward: int) -> None:
    """In units of t x h elements, as the planner counts them: each input is read once, each result written once."""
    rows, width = 8192, 64
    x = leaves("meta", torch.bfloat16, rows, width)
    unit = rows * width * 2
    counter = StepCounter(torch.device("meta"))
    with counter:
        outputs = residual_branch(
            x[0],
            x[1],
            bias=x[2],
            gain=x[3] if "g" in parts else None,
            row_scale=torch.empty(16, device="meta") if masked else None,
            norm=(x[4], x[5], 1e-5),
            impl="triton",
        )
        before = moved(counter)
        used = [leaf for i, leaf in enumerate(x) if i != 3 or "g" in parts]
        gradients = torch.autograd.grad(outputs, used, [torch.empty_like(o) for o in outputs if o is not None])
    assert before / unit == pytest.approx(forward, rel=0.02)
    assert (moved(counter) - before) / unit == pytest.approx(backward, rel=0.02)
    assert [(g.shape, g.dtype) for g in gradients] == [(leaf.shape, leaf.dtype) for leaf in used]


@pytest.mark.parametrize(
    ("options", "plain", "fused"),
    [
        ("none", (30, 60), (16, 36)),
        ("gain", (34, 76), (16, 40)),
        ("gain and drop path", (38, 84), (16, 40)),
        ("dropout", (98, 137), (16, 38)),
    ],
)
def test_traffic_of_a_block(options: str, plain: tuple[int, int], fused: tuple[int, int]) -> None:
    """Two branches with their norms and the activation, as docs/kernels.md has them: forward, forward and backward."""
    rows, width = 24576, 768
    x = leaves("meta", torch.bfloat16, rows, width)
    wide, bias = (
        torch.empty(*n, 4 * width, dtype=torch.bfloat16, device="meta").requires_grad_() for n in ((rows,), ())
    )
    gain = x[3] if "gain" in options else None
    used = [leaf for leaf in x if gain is not None or leaf is not x[3]]

    def units(impl: FusedImpl) -> tuple[int, int]:
        counter, forward = StepCounter(torch.device("meta")), 0
        extra: dict[str, Any] = {}
        if "drop path" in options:
            extra["row_scale"] = torch.empty(96, device="meta")
        if "dropout" in options:
            extra["dropout"] = torch.empty(rows, dtype=torch.int64, device="meta"), 0.1
        with counter:
            for _ in range(2):
                before = moved(counter)
                out = residual_branch(x[0], x[1], bias=x[2], gain=gain, norm=(x[4], x[5], 1e-5), impl=impl, **extra)
                forward += moved(counter) - before
                torch.autograd.grad(out, used, [torch.empty_like(o) for o in out if o is not None])
            before = moved(counter)
            y = bias_activation(wide, bias, "gelu", impl=impl)
            forward += moved(counter) - before
            torch.autograd.grad(y, (wide, bias), torch.empty_like(y))
        return round(forward / (rows * width * 2)), round(moved(counter) / (rows * width * 2))

    assert units("plain") == plain
    assert units("triton") == fused
