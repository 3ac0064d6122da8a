"""Transformer Engine's and Apex's FusedAdam against torch's, steered by the same adapter; run by the GPU report."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from lcl_mcore import optional_packages as probe
from lcl_mcore.config.schema import OptimConfig
from lcl_mcore.fused_adam import Adam, FusedAdam, TorchAdam

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda", 0)
OPTIM = OptimConfig(lr=3e-2, weight_decay=0.2)
SIZES = (70_001, 3, 1, 2_000_000)
# (skipped, divisor): clipping, single and repeated refusals.
PLAN = [(0.0, 1.0), (0.0, 3.5), (1.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 2.0), (0.0, 1.7)]


def groups() -> list[dict[str, Any]]:
    generator = torch.Generator("cuda").manual_seed(1)
    shards = [torch.randn(size, generator=generator, device=DEVICE) for size in SIZES]
    return [
        {"params": shards[:2], "wd_mult": 1.0},
        {"params": [], "wd_mult": 1.0},
        {"params": shards[2:], "wd_mult": 0.0},
    ]


def tensors(update: Adam) -> list[torch.Tensor]:
    shards = [shard for group in update.inner.param_groups for shard in group["params"]]
    return [*shards, *(update.inner.state[shard][name] for shard in shards for name in ("exp_avg", "exp_avg_sq"))]


@pytest.mark.parametrize("name", ["te", "apex"])
def test_equals_torch_and_never_makes_the_host_wait(name: str) -> None:
    found = {"te": probe.te_adam, "apex": probe.apex_adam}[name]()
    if not found.usable:
        pytest.skip(f"{found.name}: {found.reason}")
    kind = importlib.import_module(probe.ADAM_MODULES[name]).FusedAdam
    fused, plain = FusedAdam(kind, groups(), OPTIM, DEVICE), TorchAdam(groups(), OPTIM, DEVICE)
    scalars = [tuple(torch.tensor(value, device=DEVICE) for value in pair) for pair in PLAN]
    for number, (skip, divisor) in enumerate(scalars):
        before = [t.clone() for t in tensors(fused)]
        for update in (fused, plain):
            generator = torch.Generator("cuda").manual_seed(number)
            for group in update.inner.param_groups:
                for shard in group["params"]:
                    shard.grad = torch.randn(shard.shape, generator=generator, device=DEVICE)
                    shard.grad[0] = float("nan") if PLAN[number][0] else 1.0
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                update.prepare(1e-2 / (1 + number), divisor, skip)
                update.inner.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if PLAN[number][0]:
            assert all(torch.equal(a, b) for a, b in zip(before, tensors(fused), strict=True)), number
        else:
            assert not torch.equal(before[0], tensors(fused)[0])
        torch.testing.assert_close(tensors(fused), tensors(plain), rtol=1e-5, atol=1e-6)
    for update in (fused, plain):
        update.count_from(2)
        for group in update.inner.param_groups:
            for shard in group["params"]:
                shard.grad = torch.ones_like(shard)
        update.prepare(1e-2, torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE))
        update.inner.step()
    torch.testing.assert_close(tensors(fused), tensors(plain), rtol=1e-5, atol=1e-6)
