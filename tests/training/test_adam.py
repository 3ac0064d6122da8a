"""Which optimizer is picked, and that a FusedAdam steered by our adapter learns what torch's learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adam_stand_in import ApexLike, TeLike
from lcl_mcore import fused_adam as adam
from lcl_mcore import optional_packages as probe
from lcl_mcore.config.schema import OptimConfig, RunConfig
from lcl_mcore.errors import ConfigError
from lcl_mcore.fused_adam import Adam, FusedAdam, TorchAdam, choose_adam
from lcl_mcore.models.backends import choose_gradient_fusion
from lcl_mcore.models.transformer_config import language_transformer_config, vision_transformer_config
from lcl_mcore.optional_packages import Probe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPTIM = OptimConfig(lr=3e-2, weight_decay=0.2)


def shard_groups() -> list[dict[str, Any]]:
    """Views of parameters, as megatron's distributed optimizer has them: with decay, without, and an empty group."""
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(40, generator=generator).requires_grad_() for _ in range(3)]
    views = [w.view(-1)[3:33].detach() for w in whole]
    return [
        {"params": views[:2], "wd_mult": 1.0},
        {"params": views[2:], "wd_mult": 0.0},
        {"params": [], "wd_mult": 1.0},
    ]


def tensors(update: Adam) -> list[torch.Tensor]:
    """Parameters and moments."""
    shards = [shard for group in update.inner.param_groups for shard in group["params"]]
    names = ("exp_avg", "exp_avg_sq")
    return [*shards, *(update.inner.state[shard][name] for shard in shards for name in names)]


def advance(update: Adam, number: int, skip: float, divisor: float) -> None:
    """One update with gradients that depend on the number only; bad ones if it is to be skipped."""
    generator = torch.Generator().manual_seed(number)
    for group in update.inner.param_groups:
        for shard in group["params"]:
            shard.grad = torch.randn(shard.shape, generator=generator) * (float("nan") if skip else 1.0)
    update.prepare(1e-2 / (1 + number), torch.tensor(divisor), torch.tensor(skip))
    update.inner.step()


PLAN = [(0.0, 1.0), (0.0, 3.5), (1.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 2.0), (0.0, 1.7)]


@pytest.mark.parametrize("kind", [TeLike, ApexLike])
def test_fused_equals_torch_through_clipping_skips_and_resume(kind: type) -> None:
    torch_adam, fused = TorchAdam(shard_groups(), OPTIM, CPU), FusedAdam(kind, shard_groups(), OPTIM, CPU)
    begun = [t.clone() for t in tensors(fused)]
    for number, (skip, divisor) in enumerate(PLAN):
        before = [t.clone() for t in tensors(fused)]
        for update in (torch_adam, fused):
            advance(update, number, skip, divisor)
        same = [torch.equal(a, b) for a, b in zip(before, tensors(fused), strict=True)]
        assert all(same) if skip else not any(same), number
        torch.testing.assert_close(tensors(fused), tensors(torch_adam), rtol=2e-6, atol=1e-8)
    assert fused.inner.calls == [(pytest.approx(divisor), skip) for skip, divisor in PLAN]
    assert [group["weight_decay"] for group in fused.inner.param_groups] == [0.2, 0.0, 0.2]
    # A checkpoint's tensors, and the number of updates they have seen, in optimizers that were elsewhere.
    kept = [t.clone() for t in tensors(torch_adam)]
    advance(fused, 90, 1.0, 1.0)
    for update in (torch_adam, fused):
        for tensor, value in zip(tensors(update), kept, strict=True):
            tensor.copy_(value)
        update.count_from(4)
        advance(update, 91, 0.0, 1.0)
    torch.testing.assert_close(tensors(fused), tensors(torch_adam), rtol=2e-6, atol=1e-8)
    assert not any(torch.equal(a, b) for a, b in zip(begun, tensors(fused), strict=True))


def found(usable: bool) -> Any:
    return lambda: Probe("package", usable, "1.0" if usable else "", "ok" if usable else "is not there")


@pytest.mark.parametrize(
    ("te", "apex", "requested", "picked"),
    [
        (True, True, "auto", "TE FusedAdam"),
        (False, True, "auto", "Apex FusedAdam"),
        (False, False, "auto", "torch AdamW"),
        (True, True, "torch", "torch AdamW"),
        (True, True, "apex", "Apex FusedAdam"),
    ],
)
def test_choice_of_the_optimizer(
    monkeypatch: pytest.MonkeyPatch, te: bool, apex: bool, requested: str, picked: str
) -> None:
    monkeypatch.setitem(adam.FUSED, "te", ("TE FusedAdam", found(te)))
    monkeypatch.setitem(adam.FUSED, "apex", ("Apex FusedAdam", found(apex)))
    assert choose_adam(requested, CUDA).backend == picked
    if requested != "apex":
        on_cpu = choose_adam(requested, CPU)
        assert on_cpu.backend == "torch AdamW"
        assert ("te: works on CUDA only" in on_cpu.reason) == (te and requested == "auto")
    if not te:
        with pytest.raises(ConfigError, match=r"optim.optimizer_backend = te: is not there"):
            choose_adam("te", CUDA)


def test_a_fused_adam_without_device_scalars_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(torch.optim.SGD):
        pass

    class Module:
        FusedAdam = Old

    monkeypatch.setattr("importlib.import_module", lambda name: Module)
    judged = probe._steered(Probe("x", True, "0.1", "ok"), "x")
    assert (judged.usable, judged.reason) == (False, "its FusedAdam has no `capturable`: too old")
    Module.FusedAdam = TeLike  # type: ignore[assignment]
    assert probe._steered(Probe("x", True, "0.1", "ok"), "x").usable


def test_gradient_fusion_is_for_the_lm_in_half_precision_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = torch.bfloat16, torch.float32

    def choice(wanted: bool, layers: str, dtype: torch.dtype, device: torch.device, apex: bool) -> str:
        monkeypatch.setattr(probe, "apex_gradient_fusion", found(apex))
        return choose_gradient_fusion(wanted, layers, dtype, device).backend

    assert choice(True, "transformer-engine", half, CUDA, False) == "transformer-engine"
    assert choice(True, "megatron-core", half, CUDA, True) == "apex"
    assert choice(True, "megatron-core", half, CUDA, False) == "off"
    assert choice(True, "megatron-core", single, CUDA, True) == "off"
    assert choice(True, "megatron-core", half, CPU, True) == "off"
    assert choice(False, "transformer-engine", half, CUDA, True) == "off"
    config = RunConfig()
    for fused in (False, True):
        language = language_transformer_config(config, CPU, gradient_accumulation_fusion=fused)
        assert language.gradient_accumulation_fusion == fused
        assert not vision_transformer_config(config, CPU).gradient_accumulation_fusion
