"""Everything of the package on a CUDA device: accuracy, no host synchronisation, repeatability, time, memory.

Run by the GPU report; without a device these tests are the only ones that do not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lcl_kernels import (
    DistributedInfoNCE,
    gather_image_latents,
    infonce,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    scatter_image_latents,
)
from lcl_kernels.infonce import select_engine
from torch import Tensor
from torch.nn.functional import normalize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Any operation that waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def embeddings(n: int, d: int, kind: str = "trained", seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    image = normalize(torch.randn(n, d, generator=generator, device="cuda"), dim=1)
    noise = normalize(torch.randn(n, d, generator=generator, device="cuda"), dim=1)
    if kind == "opposite":
        return image[:1].repeat(n, 1), -image[:1].repeat(n, 1)
    return image, normalize(image + 3.0 * noise, dim=1) if kind == "trained" else noise


def evaluate(
    image: Tensor, text: Tensor, scale: float, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, ...]:
    i, t = (x.to(dtype).clone().requires_grad_() for x in (image, text))
    s = torch.full((), scale, dtype=dtype, device="cuda", requires_grad=True)
    loss = infonce(i, t, s, **options)
    return (loss.detach(), *torch.autograd.grad(loss, (i, t, s)))


def errors(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], floor: float = 1e-12) -> list[float]:
    return [
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(floor))
        for a, b in zip(ours, truth, strict=True)
    ]


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Best time of a call, after one to warm up."""
    function()
    best = float("inf")
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def matrix_rate(size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    return 20 * 2 * size**3 / seconds(lambda: [torch.mm(a, b) for _ in range(20)], repeats=2)


def test_auto_is_triton() -> None:
    from lcl_kernels.triton_engine import TritonBlock

    assert select_engine("auto", torch.zeros(1, 1, device="cuda")) is TritonBlock


@pytest.mark.parametrize("impl", ["tiled", "triton"])
@pytest.mark.parametrize("precision", ["fp32", "tf32x3", "fp16", "bf16"])
@pytest.mark.parametrize(("n", "d", "scale"), [(1500, 768, 14.3), (777, 1024, 100.0), (129, 40, 50.0)])
def test_loss_matches_fp64(impl: Any, precision: Any, n: int, d: int, scale: float) -> None:
    image, text = embeddings(n, d)
    w = torch.rand(n, device="cuda")
    w[::7] = 0.0
    options: dict[str, Any] = {"weights": w, "group_ids": torch.arange(n, device="cuda") // 3 * 2**40}
    if precision in ("fp16", "bf16"):
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        image, text = image.to(dtype).float(), text.to(dtype).float()
    ours = evaluate(image, text, scale, impl=impl, precision=precision, tile=(512, 384), **options)
    truth = evaluate(image, text, scale, torch.float64, impl="reference", **options)
    found = errors(ours, truth)
    assert found[0] < 1e-5
    assert max(found) < {"fp16": 1e-3, "bf16": 8e-3}.get(precision, 5e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_opposite_embeddings_need_the_fallback(precision: Any) -> None:
    image, text = embeddings(700, 64, "opposite")
    loss, d_image, _, _ = evaluate(image, text, 100.0, impl="triton", precision=precision)
    assert loss.item() == pytest.approx(torch.tensor(700.0).log().item(), rel=1e-4)
    assert d_image.abs().max().item() < 1e-4


def test_random_embeddings_at_scale_100_and_width_1024() -> None:
    image, text = embeddings(4096, 1024, "random")
    ours = evaluate(image, text, 100.0, impl="triton", precision="fp16")
    assert max(errors(ours, evaluate(image, text, 100.0, torch.float64, impl="reference"))) < 2e-3


def test_no_host_sync_and_bitwise_repeatable() -> None:
    image, text = (x.requires_grad_() for x in embeddings(3000, 256))
    scale = torch.full((), 30.0, device="cuda", requires_grad=True)
    groups = torch.arange(3000, device="cuda") // 2
    losses = [
        lambda: infonce(image, text, scale, group_ids=groups, precision="fp16"),
        lambda: infonce(image, text, scale, impl="tiled"),
        lambda: DistributedInfoNCE(None, schedule="gather_both", weighting="rank", precision="fp16")(
            image, text, scale, [3000], group_ids=groups
        ),
    ]
    for loss in losses:
        torch.autograd.grad(loss(), (image, text, scale))  # compiles
        with no_host_sync():
            runs = [torch.autograd.grad(loss(), (image, text, scale)) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("n", [32768, 65536])
def test_time_is_within_1_4_of_the_arithmetic_floor(n: int) -> None:
    d = 768
    image, text = (x.requires_grad_() for x in embeddings(n, d))
    scale = torch.full((), 30.0, device="cuda", requires_grad=True)

    def step() -> None:
        torch.autograd.grad(infonce(image, text, scale, precision="fp16"), (image, text, scale))

    floor = 8 * n * n * d / matrix_rate()
    ours = seconds(step, repeats=3)
    assert ours < 1.4 * floor, f"{ours * 1e3:.2f} ms is {ours / floor:.2f} times the floor"


def test_memory_is_linear_in_n() -> None:
    n, d = 65536, 768
    image, text = (x.requires_grad_() for x in embeddings(n, d))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    infonce(image, text, 30.0, precision="fp16").backward()
    used = torch.cuda.max_memory_allocated() - before
    # fp16 operands, fp32 gradients and a transient of theirs, 1 GiB of G, small sums; naive needs 66 GB.
    assert used < 2 * n * d * (2 + 4 + 4) + (1 << 30) + (1 << 28)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy(dtype: torch.dtype) -> None:
    rows, width, vocab = 1000, 256, 5003
    hidden = torch.randn(rows, width, device="cuda", dtype=dtype).requires_grad_()
    weight = (0.1 * torch.randn(vocab, width, device="cuda", dtype=dtype)).requires_grad_()
    labels = torch.randint(0, 5000, (rows,), device="cuda")
    labels[::9] = -100

    def run() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(hidden, weight, labels, valid_vocab=5000, chunk_rows=300)
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    run()
    with no_host_sync():
        ours = run()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    truth = linear_cross_entropy_reference(h, w, labels, valid_vocab=5000)
    found = errors(ours, (truth.detach(), *torch.autograd.grad(truth, (h, w))))
    half = dtype == torch.bfloat16  # whose logits are rounded: errors of the loss average over rows
    assert max(found) < (1e-2 if half else 1e-5)
    assert found[0] < (1e-4 if half else 1e-5)


def test_linear_cross_entropy_never_stores_full_logits() -> None:
    rows, width, vocab = 4096, 1024, 50304
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels).backward()
    used = torch.cuda.max_memory_allocated() - before
    gradients = (rows + vocab) * width * (4 + 2)
    assert used < gradients + 3 * (256 << 20)
    assert used < gradients + 4 * rows * vocab


def test_latents_round_trip() -> None:
    embeddings_ = torch.randn(4096, 128, device="cuda", requires_grad=True)
    latents = torch.randn(30, 64, 128, device="cuda", requires_grad=True)
    starts = torch.randperm(60, device="cuda")[:30] * 66
    with no_host_sync():
        placed = scatter_image_latents(embeddings_, latents, starts)
        back = gather_image_latents(placed, starts, 64)
    assert torch.equal(back, latents)
    d_embeddings, d_latents = torch.autograd.grad(back.sum(), (embeddings_, latents))
    assert torch.equal(d_latents, torch.ones_like(latents))
    assert d_embeddings.abs().max().item() == 0.0
