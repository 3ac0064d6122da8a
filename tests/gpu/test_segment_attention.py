"""Variable-length attention kernels on a CUDA device against the SDPA fallback; run by the GPU report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lcl_mcore import optional_packages as probe
from lcl_mcore.models import attention as module
from lcl_mcore.models.attention import make_segments, sdpa_segments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
RAGGED = (1, 7, 64, 200, 513, 17, 1246)
LENGTHS = {"ragged": RAGGED, "uniform": (257,) * 8, "one": (2048,)}


def kernel(name: str) -> Any:
    """One of `models.segments`' kernels, or a skip that says why it is not here."""
    found = {"torch-varlen": probe.torch_varlen, "flash-attn": probe.flash_attn}[name]()
    if not found.usable:
        pytest.skip(f"{found.name}: {found.reason}")
    return module._KERNELS[name]


def inputs(total: int, heads: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as views of one interleaved projection, the way megatron's layer hands them over."""
    generator = torch.Generator("cuda").manual_seed(0)
    mixed = torch.randn(total, heads, 3 * channels, generator=generator, device="cuda", dtype=dtype)
    return [part.detach().requires_grad_() for part in mixed.split(channels, dim=-1)]


def evaluate(function: Any, leaves: list[Tensor], lengths: tuple[int, ...], causal: bool) -> list[Tensor]:
    q, k, v = leaves
    segments = make_segments(lengths, q.device)
    out = function(q, k, v, segments, causal, q.shape[-1] ** -0.5)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("name", ["torch-varlen", "flash-attn"])
@pytest.mark.parametrize("channels", [64, 88])
@pytest.mark.parametrize(
    ("lengths", "causal"), [("ragged", True), ("uniform", True), ("uniform", False), ("one", True)]
)
def test_kernel_equals_the_fallback(name: str, channels: int, lengths: str, causal: bool) -> None:
    sizes = LENGTHS[lengths]
    leaves = inputs(sum(sizes), 4, channels, torch.bfloat16)
    ours = evaluate(kernel(name), leaves, sizes, causal)
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    truth = evaluate(sdpa_segments, exact, sizes, causal)
    fallback = evaluate(sdpa_segments, leaves, sizes, causal)
    for mine, other, right in zip(ours, fallback, truth, strict=True):
        error = float((mine.float() - right).norm() / right.norm())
        assert error < 1e-2
        assert error < 2 * float((other.float() - right).norm() / right.norm()) + 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_fallback_in_fp32_equals_the_cpu(causal: bool) -> None:
    sizes = RAGGED if causal else LENGTHS["uniform"]
    leaves = inputs(sum(sizes), 2, 64, torch.float32)
    ours = evaluate(sdpa_segments, leaves, sizes, causal)
    on_cpu = [leaf.detach().cpu().requires_grad_() for leaf in leaves]
    theirs = evaluate(sdpa_segments, on_cpu, sizes, causal)
    for mine, right in zip(ours, theirs, strict=True):
        assert float((mine.cpu() - right).norm() / right.norm()) < 1e-5


def test_segments_do_not_see_each_other() -> None:
    """Changing one segment changes no bit of the others."""
    attend = kernel("torch-varlen")
    leaves = inputs(sum(RAGGED), 4, 64, torch.bfloat16)
    before = evaluate(attend, leaves, RAGGED, True)[0]
    start = sum(RAGGED[:4])
    with torch.no_grad():
        for leaf in leaves:
            leaf[start : start + RAGGED[4]] += 1.0
    after = evaluate(attend, leaves, RAGGED, True)[0]
    keep = torch.ones(sum(RAGGED), dtype=torch.bool, device="cuda")
    keep[start : start + RAGGED[4]] = False
    assert torch.equal(before[keep], after[keep])
    assert not torch.equal(before[~keep], after[~keep])
