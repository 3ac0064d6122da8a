"""Fused output projection and cross-entropy against its formula in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lcl_kernels import cross_entropy as module
from lcl_kernels import linear_cross_entropy, linear_cross_entropy_reference
from torch import Tensor


def problem(rows: int, vocab: int, width: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + vocab)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    return hidden, weight, bias, labels, torch.rand(rows, generator=generator)


def worst(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, truth, strict=True))


def evaluate(function: Any, *leaves: Tensor, dtype: torch.dtype, **options: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias = (x.to(dtype).clone().requires_grad_() for x in leaves)
    loss = function(hidden, weight, bias=bias, **options)
    return (loss.detach(), *torch.autograd.grad(3.0 * loss, (hidden, weight, bias)))


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_matches_fp64(chunk: int | None) -> None:
    hidden, weight, bias, labels, factors = problem(50, 33)
    labels[3:9] = -100
    options: dict[str, Any] = {"labels": labels, "row_weights": factors, "valid_vocab": 33}
    ours = evaluate(linear_cross_entropy, hidden, weight, bias, dtype=torch.float32, chunk_rows=chunk, **options)
    truth = evaluate(linear_cross_entropy_reference, hidden, weight, bias, dtype=torch.float64, **options)
    assert worst(ours, truth) < 2e-6


def test_padding_words_take_no_part() -> None:
    hidden, weight, bias, labels, _ = problem(20, 40)
    labels %= 29
    weight[29:] = float("inf")  # whatever lies there must not matter
    bias[29:] = float("nan")
    loss, _, d_weight, d_bias = evaluate(
        linear_cross_entropy, hidden, weight, bias, dtype=torch.float32, labels=labels, valid_vocab=29
    )
    truth = linear_cross_entropy_reference(hidden.double(), weight[:29].double(), labels, bias=bias[:29])
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    assert torch.equal(d_weight[29:], torch.zeros(11, 16))
    assert torch.equal(d_bias[29:], torch.zeros(11))


def test_gradcheck() -> None:
    hidden, weight, bias, labels, factors = problem(5, 7, 3)
    inputs = tuple(x.double().requires_grad_() for x in (hidden, weight, bias))

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, row_weights=factors, bias=b, valid_vocab=6, chunk_rows=2)

    labels.clamp_(max=5)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_fp32(dtype: torch.dtype) -> None:
    """512 rows summed into one weight gradient: bf16 accumulation would be off by per cents."""
    hidden, weight, bias, labels, _ = problem(512, 50)
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    ours = evaluate(linear_cross_entropy, hidden, weight, bias, dtype=dtype, labels=labels, chunk_rows=8)
    truth = evaluate(linear_cross_entropy_reference, hidden, weight, bias, dtype=torch.float64, labels=labels)
    assert ours[0].dtype == torch.float32
    assert ours[0].item() == pytest.approx(truth[0].item(), rel=1e-6)
    assert worst(ours, truth) < (4e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_is_added_to_a_buffer(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels, _ = problem(50, 33)
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    truth = evaluate(linear_cross_entropy_reference, hidden, weight, bias, dtype=torch.float64, labels=labels)
    buffer = torch.full((33, 16), 0.25)
    ours = evaluate(
        linear_cross_entropy, hidden, weight, bias, dtype=dtype, labels=labels, chunk_rows=8, weight_gradient=buffer
    )
    bound = 2e-6 if dtype == torch.float32 else 4e-3
    assert worst((ours[1], buffer - 0.25, ours[3]), truth[1:]) < bound


def test_autocast_does_not_reach_the_products() -> None:
    hidden, weight, bias, labels, _ = problem(40, 50)
    plain = evaluate(linear_cross_entropy, hidden, weight, bias, dtype=torch.float32, labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = evaluate(linear_cross_entropy, hidden, weight, bias, dtype=torch.float32, labels=labels)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_logits_exist_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, labels, _ = problem(100, 64)
    seen: list[int] = []
    real = module._logits

    def spy(x: Tensor, w: Tensor, out: Tensor) -> None:
        seen.append(out.numel())
        real(x, w, out)

    monkeypatch.setattr(module, "_logits", spy)
    linear_cross_entropy(hidden, weight, labels, chunk_rows=30)
    assert seen == [30 * 64, 30 * 64, 30 * 64, 10 * 64]
    assert module._default_rows(torch.empty(50304, 1)) * 50304 * 4 <= 64 << 20
    assert [module._even_rows(count, 320) for count in (0, 1, 320, 324, 1000)] == [1, 1, 320, 162, 250]


def test_no_rows_and_only_ignored_rows() -> None:
    hidden, weight, _, labels, _ = problem(6, 9)
    for k, target in ((0, labels[:0]), (6, torch.full((6,), -100))):
        h, w = hidden[:k].clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(h, w, target, row_weights=torch.full((k,), 2.0))
        loss.backward()
        assert loss.item() == 0.0
        assert torch.equal(h.grad, torch.zeros(k, 16))
        assert torch.equal(w.grad, torch.zeros(9, 16))


def test_evaluation_forms_no_gradient() -> None:
    hidden, weight, _, labels, _ = problem(6, 9)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight.requires_grad_(), labels)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(linear_cross_entropy(hidden, weight, labels).item(), rel=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(9, 5)}, r"\[V, h\]"),
        ({"weight": torch.zeros(9, 4).double()}, "cast one"),
        ({"labels": torch.zeros(3)}, "integers"),
        ({"row_weights": torch.zeros(2)}, "row_weights"),
        ({"chunk_rows": 0}, "chunk_rows=0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(9, 4),
        "labels": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(arguments | change))
