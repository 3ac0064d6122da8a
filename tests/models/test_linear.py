"""Weight gradients that go straight to their buffers, and short attention's backward, against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lcl_mcore.distributed.gradient_buffers import through_buffer
from lcl_mcore.models.attention import make_segments, sdpa_segments
from lcl_mcore.models.linear import _Rows, linear


def with_buffer(weight: Tensor, start: float = 0.0) -> nn.Parameter:
    """A parameter as megatron's DistributedDataParallel leaves it: an fp32 buffer that holds something already."""
    parameter: Any = nn.Parameter(weight.clone())
    parameter.main_grad = torch.full(weight.shape, start)
    parameter.grad_added_to_main_grad = False
    return parameter


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.detach().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layers_weight_gradient_is_added_to_its_buffer(dtype: torch.dtype, recompute: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((5, 1, 12), (7, 12), (7,)))
    out_grad = torch.randn(5, 1, 7, generator=generator).to(dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    truth = torch.autograd.grad(F.linear(*leaves), leaves, out_grad.double())
    parameter: Any = with_buffer(weight, start=0.5)
    x.requires_grad_()
    bias.requires_grad_()

    def run(value: Tensor) -> Tensor:
        return linear(value, parameter, bias)

    out = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
    dx, _, d_bias = torch.autograd.grad(out, (x, parameter, bias), out_grad)
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    assert parameter.grad_added_to_main_grad
    assert error(parameter.main_grad - 0.5, truth[1]) < bound
    assert error(dx, truth[0]) < bound
    assert error(d_bias, truth[2]) < bound


def test_without_a_buffer_autograd_gets_the_gradients() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    bias = torch.randn(2, requires_grad=True)
    ours = torch.autograd.grad(linear(x, weight, bias).square().sum(), (x, weight, bias))
    truth = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (x, weight, bias))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(ours, truth, strict=True))


def test_all_uses_of_a_tied_matrix_meet_in_its_buffer() -> None:
    weight = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([3, 3, 0, 8])

    def loss(rows: Tensor, matrix: Tensor) -> Tensor:
        return (rows @ matrix.T).logsumexp(1).sum()

    plain = weight.double().requires_grad_()
    (truth,) = torch.autograd.grad(loss(plain[tokens], plain), plain)
    tied: Any = with_buffer(weight)
    loss(_Rows.apply(tied, tokens, True), through_buffer(tied)).backward()
    assert tied.grad_added_to_main_grad
    assert error(tied.main_grad, truth) < 1e-6


@pytest.mark.parametrize(("lengths", "causal"), [((9, 9, 9), False), ((9, 9, 9), True), ((40, 3, 17, 30), True)])
def test_short_attention_in_bf16_has_the_gradients_of_its_formula(
    lengths: tuple[int, ...], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcl_kernels.dense_attention.SCORE_BYTES", 2 * 4 * 40 * 40 * 2)  # two sequences at a time
    generator = torch.Generator().manual_seed(2)
    q, k, v, grad = (torch.randn(sum(lengths), 2, 8, generator=generator).bfloat16() for _ in range(4))
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    segments = make_segments(lengths, q.device)
    exact = sdpa_segments(*leaves, segments, causal, 8**-0.5)  # type: ignore[arg-type]
    truth = torch.autograd.grad(exact, leaves, grad.double())
    half = [t.requires_grad_() for t in (q, k, v)]
    out = sdpa_segments(*half, segments, causal, 8**-0.5)  # type: ignore[arg-type]
    ours = torch.autograd.grad(out, half, grad)
    assert error(out, exact.detach()) < 5e-3
    assert [error(a, b) < 5e-3 for a, b in zip(ours, truth, strict=True)] == [True] * 3
