"""The contrastive loss on one device: tiled torch against the fp64 formula, symmetries and hard inputs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from lcl_kernels import infonce, infonce_reference, tiled
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

infonce_module = import_module("lcl_kernels.infonce")  # the package exports the function under the same name


def embeddings(n: int, d: int, kind: str = "trained") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * n + d)
    image = normalize(torch.randn(n, d, generator=generator), dim=1)
    noise = normalize(torch.randn(n, d, generator=generator), dim=1)
    text = {
        "trained": normalize(image + 3.0 * noise, dim=1),
        "random": noise,
        "saturated": normalize(image + noise, dim=1),
        "identical": image,
        "opposite": -image,
        "duplicates": noise[torch.arange(n) // 2],
    }[kind]
    if kind in ("identical", "opposite"):
        image, text = image[:1].repeat(n, 1), text[:1].repeat(n, 1)
    if kind == "duplicates":
        image = image[torch.arange(n) // 2]
    return image, text


def evaluate(
    image: Tensor, text: Tensor, scale: float, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and its three gradients."""
    i, t = (x.to(dtype).clone().requires_grad_() for x in (image, text))
    s = torch.tensor(scale, dtype=dtype, requires_grad=True)
    loss = infonce(i, t, s, **options)
    return (loss.detach(), *torch.autograd.grad(loss, (i, t, s)))


def errors(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], floor: float = 1e-12) -> list[float]:
    return [
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(floor))
        for a, b in zip(ours, truth, strict=True)
    ]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised buffer starts as NaN, so that reading one shows in the result."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        return real(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scale", [1.0, 14.3, 50.0, 100.0])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (77, 64), (133, 96), (200, 1)])
def test_odd_shapes_match_fp64(n: int, d: int, scale: float) -> None:
    image, text = embeddings(n, d)
    w = torch.rand(n, generator=torch.Generator().manual_seed(0))
    w[::4] = 0.0
    options = {"weights": w, "group_ids": torch.arange(n) // 3 * 2**40}
    ours = evaluate(image, text, scale, tile=(32, 48), impl="tiled", **options)
    truth = evaluate(image, text, scale, torch.float64, impl="reference", **options)
    # With D = 1 embeddings are +-1 and gradients cancel: compare with the size of their terms there.
    assert max(errors(ours, truth, floor=1e-2 * scale if d == 1 else 1e-12)) < 1e-5


@pytest.mark.parametrize("kind", ["random", "trained"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_width_1024_over_the_scale_range(scale: float, kind: str) -> None:
    """A common shift c = s loses whole rows of random embeddings at s = 100: their cosines are near 0."""
    image, text = embeddings(96, 1024, kind)
    ours = evaluate(image, text, scale, tile=(40, 64))
    truth = evaluate(image, text, scale, torch.float64, impl="reference")
    assert max(errors(ours, truth)) < 5e-6


def test_reference_is_the_textbook_loss() -> None:
    image, text = (x.double() for x in embeddings(19, 8))
    logits = 20.0 * image @ text.T
    labels = torch.arange(19)
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    assert infonce_reference(image, text, 20.0).item() == pytest.approx(expected.item(), rel=1e-12)
    masked = infonce_reference(image, text, 20.0, group_ids=torch.arange(19) // 2)
    assert masked.item() < expected.item()
    none = infonce_reference(image, text, 20.0, group_ids=torch.full((19,), -1))
    assert none.item() == pytest.approx(expected.item(), rel=1e-12)


def test_gradcheck() -> None:
    image, text = (x.double().requires_grad_() for x in embeddings(6, 5, "saturated"))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    weights, groups = torch.tensor([0.1, 0.3, 0.0, 0.2, 0.2, 0.2]), torch.tensor([0, 0, 4, -1, -1, 4])

    def loss(i: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return infonce(i, t, s, weights=weights, group_ids=groups, impl="tiled", tile=(4, 3))

    assert torch.autograd.gradcheck(loss, (image, text, scale))


def test_saturated_pairs_keep_relative_accuracy() -> None:
    """A loss of 1e-6 as the difference of two logsumexps in fp32 is mostly noise; ours is not."""
    image, text = embeddings(64, 128, "saturated")
    ours = evaluate(image, text, 35.0)
    truth = evaluate(image, text, 35.0, torch.float64, impl="reference")
    naive = evaluate(image, text, 35.0, impl="reference")
    assert 1e-9 < truth[0].item() < 1e-5
    assert max(errors(ours, truth)) < 1e-5
    assert errors(naive, truth)[0] > 1e-2


@pytest.mark.parametrize("kind", ["identical", "opposite"])
def test_equal_rows_give_log_n_and_no_gradient_along_them(kind: str) -> None:
    image, text = embeddings(50, 32, kind)
    loss, d_image, d_text, d_scale = evaluate(image, text, 100.0, tile=(16, 16))
    assert loss.item() == pytest.approx(torch.tensor(50.0).log().item(), rel=1e-5)
    for gradient in (d_image, d_text):
        # Exactly 0; its terms have size s/N = 2 per row and rounding s S = 100 costs 1e-5 of them.
        assert gradient.abs().max().item() < 5e-5
    assert abs(d_scale.item()) < 5e-5


def test_duplicates_are_masked_by_their_group() -> None:
    image, text = embeddings(40, 64, "duplicates")
    groups = torch.arange(40) // 2
    ours = evaluate(image, text, 100.0, group_ids=groups, tile=(16, 16))
    truth = evaluate(image, text, 100.0, torch.float64, group_ids=groups, impl="reference")
    assert max(errors(ours, truth)) < 5e-6
    # Without the mask a copy of the positive is a negative.
    assert ours[0].item() < evaluate(image, text, 100.0)[0].item() - 1e-4


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("n", [0, 1])
def test_no_negatives(impl: str, n: int) -> None:
    image, text = embeddings(max(n, 1), 8)
    image, text = image[:n].requires_grad_(), text[:n].requires_grad_()
    log_scale = torch.tensor(4.6, requires_grad=True)
    loss = infonce(image, text, log_scale.exp(), impl=impl)
    assert loss.item() == 0.0
    loss.backward()
    assert image.grad is not None
    assert image.grad.shape == (n, 8)
    assert torch.equal(image.grad, torch.zeros(n, 8))
    assert torch.equal(text.grad, torch.zeros(n, 8))
    assert log_scale.grad.item() == 0.0


def test_everything_masked_is_zero_and_finite() -> None:
    image, text = embeddings(7, 8)
    result = evaluate(image, text, 100.0, group_ids=torch.zeros(7, dtype=torch.int64))
    assert [float(x.abs().max()) for x in result] == [0.0] * 4


def test_zero_weights_give_zero() -> None:
    result = evaluate(*embeddings(7, 8), 10.0, weights=torch.zeros(7))
    assert [float(x.abs().max()) for x in result] == [0.0] * 4


def test_permutation_of_pairs_permutes_gradients() -> None:
    image, text = embeddings(61, 24)
    order = torch.randperm(61, generator=torch.Generator().manual_seed(1))
    w, g = torch.rand(61, generator=torch.Generator().manual_seed(2)), torch.arange(61) // 4
    plain = evaluate(image, text, 40.0, weights=w, group_ids=g, tile=(16, 24))
    mixed = evaluate(image[order], text[order], 40.0, weights=w[order], group_ids=g[order], tile=(16, 24))
    assert max(errors(mixed, (plain[0], plain[1][order], plain[2][order], plain[3]))) < 3e-6


def test_swapping_modalities_swaps_gradients() -> None:
    image, text = embeddings(61, 24)
    w = torch.rand(61, generator=torch.Generator().manual_seed(2))
    plain = evaluate(image, text, 40.0, weights=w, tile=(16, 24))
    swapped = evaluate(text, image, 40.0, weights=w, tile=(24, 16))
    assert max(errors(swapped, (plain[0], plain[2], plain[1], plain[3]))) < 3e-6


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_euler_invariant(precision: str) -> None:
    """The loss depends on s, I and T through s <I, T> only: sum<dI,I> = sum<dT,T> = s dL/ds."""
    image, text = embeddings(150, 48)
    image, text = image.half().float(), text.half().float()
    _, d_image, d_text, d_scale = evaluate(image, text, 30.0, precision=precision, tile=(64, 32))
    radial = [float((d_image * image).sum()), float((d_text * text).sum()), 30.0 * d_scale.item()]
    assert abs(radial[0]) > 0.1
    assert radial == pytest.approx([radial[0]] * 3, rel=3e-4 if precision == "fp16" else 1e-5)


def test_tiling_does_not_change_the_result() -> None:
    image, text = embeddings(130, 32)
    whole = evaluate(image, text, 50.0, tile=(130, 130))
    assert max(errors(evaluate(image, text, 50.0, tile=(7, 50)), whole)) < 3e-6
    first, again = (evaluate(image, text, 50.0, tile=(7, 50)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_fp16_operands_cost_what_their_rounding_costs() -> None:
    image, text = embeddings(200, 64)
    truth = evaluate(image, text, 14.3, torch.float64, impl="reference")
    half = errors(evaluate(image, text, 14.3, precision="fp16"), truth)
    assert 1e-6 < max(half) < 1e-3
    rounded = evaluate(image.half(), text.half(), 14.3, torch.float64, impl="reference")
    assert max(errors(evaluate(image, text, 14.3, precision="fp16"), rounded)) < 3e-4


def test_low_precision_inputs_get_gradients_of_their_dtype() -> None:
    image, text = (x.bfloat16().requires_grad_() for x in embeddings(20, 16))
    scale = torch.tensor(10.0, requires_grad=True)
    loss = infonce(image, text, scale)
    loss.backward()
    assert loss.dtype == torch.float32
    assert image.grad.dtype == text.grad.dtype == torch.bfloat16
    truth = evaluate(image.detach(), text.detach(), 10.0, torch.float64, impl="reference")
    assert max(errors((loss.detach(), image.grad, text.grad, scale.grad), truth)) < 4e-3


def test_autocast_does_not_reach_the_products() -> None:
    image, text = embeddings(40, 16)
    plain = evaluate(image, text, 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = evaluate(image, text, 50.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_incoming_gradient_scales_and_evaluation_skips_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = (x.requires_grad_() for x in embeddings(20, 16))
    loss = infonce(image, text, 10.0)
    once = torch.autograd.grad(loss, image, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, image, torch.tensor(-4.0))[0], -4.0 * once)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("gradients formed in evaluation")

    monkeypatch.setattr(tiled.TiledBlock, "gradients", fail)
    with torch.no_grad():
        assert infonce(image, text, 10.0).item() == loss.item()


def test_backward_repeats_while_the_graph_is_kept_and_then_hands_its_buffers_over() -> None:
    image, text = (x.requires_grad_() for x in embeddings(20, 16))
    loss = infonce(image, text, 10.0)
    first = torch.autograd.grad(2.0 * loss, (image, text), retain_graph=True)
    saved = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward(retain_graph=True)
    assert image.grad.data_ptr() != saved
    image.grad = text.grad = None
    loss.backward(torch.tensor(2.0))
    assert torch.equal(image.grad, first[0])
    assert torch.equal(text.grad, first[1])
    assert image.grad.data_ptr() == saved


@pytest.mark.parametrize(("keep", "tiles"), [(0, 1), (3 * 8000, 4), (1 << 28, 130)])
def test_memory_does_not_grow_with_n_squared(monkeypatch: pytest.MonkeyPatch, keep: int, tiles: int) -> None:
    """Exponentials wait in at most ``KEPT_BYTES``; beyond them there is one tile, and a strip of it."""
    numbers = 0
    real = tiled.TiledBlock._memory

    def memory(self: tiled.TiledBlock, count: int, size: int) -> list[Tensor]:
        nonlocal numbers
        numbers += count * size
        return real(self, count, size)

    whole = evaluate(*embeddings(500, 8), 10.0, tile=(500, 500))
    monkeypatch.setattr(tiled.TiledBlock, "_memory", memory)
    monkeypatch.setattr(infonce_module, "KEPT_BYTES", keep)
    kept = evaluate(*embeddings(500, 8), 10.0, tile=(50, 40))
    gradient_tile = 0 if tiles == 130 else 1
    assert numbers == 50 * 40 * (tiles + gradient_tile + 1)
    assert max(errors(kept, whole)) < 3e-6


def test_one_shift_serves_unless_it_loses_exponentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opposite embeddings have all logits at -s: at s = 100 the shifted sums vanish and maxima take over."""
    by_maxima = []
    real = tiled.TiledBlock._lse_by_maxima
    monkeypatch.setattr(
        tiled.TiledBlock, "_lse_by_maxima", lambda self, columns: by_maxima.append(1) or real(self, columns)
    )
    for kind, scale, expected in (("trained", 100.0, 0), ("opposite", 30.0, 0), ("opposite", 100.0, 1)):
        by_maxima.clear()
        image, text = embeddings(60, 32, kind)
        ours = evaluate(image, text, scale, tile=(16, 24))
        truth = evaluate(image, text, scale, torch.float64, impl="reference")
        assert len(by_maxima) == expected, (kind, scale)
        assert max(errors(ours, truth, floor=scale * 60**-0.5)) < 1e-5
    # Lengths of 4 put the logits beyond fp32's exponential: sums and factors both leave its range.
    image, text = (4.0 * x for x in embeddings(60, 32, "saturated"))
    assert max(errors(evaluate(image, text, 30.0), evaluate(image, text, 30.0, torch.float64, impl="reference"))) < 1e-4


@pytest.mark.parametrize("kind", ["trained", "random"])
def test_bf16_products_cost_what_their_rounding_costs(kind: str) -> None:
    """docs/kernels.md states the bound; on a CPU without bf16 units only the operands are rounded."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    image, text = embeddings(300, 256, kind)
    truth = evaluate(image, text, 30.0, torch.float64, impl="reference")
    ours = evaluate(image, text, 30.0, precision="bf16", tile=(128, 128))
    assert 1e-5 < max(errors(ours, truth)) < 1e-2
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(3, 4)}, "equal n and D"),
        ({"image": torch.zeros(4, 4, dtype=torch.int64)}, "floating point"),
        ({"weights": torch.zeros(3)}, r"weights \(3,\)"),
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, "group_ids"),
        ({"impl": "fast"}, "impl='fast'"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"scale": torch.zeros(2)}, "one number"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"image": torch.zeros(4, 4), "text": torch.zeros(4, 4), "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        infonce(**(arguments | change))


@pytest.mark.timeout(60)
def test_import_needs_torch_only() -> None:
    """A process in which triton, numpy and megatron cannot be imported still computes the loss."""
    program = """
import sys
for name in ("triton", "numpy", "megatron"):
    sys.modules[name] = None
import torch, lcl_kernels
x = torch.eye(4, requires_grad=True)
loss = lcl_kernels.infonce(x, torch.eye(4), 2.0)
loss.backward()
assert abs(loss.item() - torch.log(1 + 3 * torch.exp(torch.tensor(-2.0))).item()) < 1e-6
try:
    lcl_kernels.infonce(x, torch.eye(4), 2.0, impl="triton")
except ValueError as error:
    print("refused:", error)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "needs the triton package" in run.stdout
