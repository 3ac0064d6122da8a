"""AdamW over megatron's parameter shards: torch's, Transformer Engine's or Apex's, steered from the device.

All three take the gradient divisor (clipping) and the skip flag (bad numbers) as device scalars, so the host
never waits. torch's fused AdamW has attributes for them. The two FusedAdams ask an object like torch's GradScaler,
and only in `capturable` mode do they obey without a copy to the host (TransformerEngine 2.x and apex master,
`optimizers/fused_adam.py`, `multi_tensor_adam.cu`: the kernel returns at once when the flag is 1).
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lcl_mcore import optional_packages as probe
from lcl_mcore.config.schema import OptimConfig
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.models.backends import Choice

TORCH = "torch AdamW"
FUSED = {"te": ("TE FusedAdam", probe.te_adam), "apex": ("Apex FusedAdam", probe.apex_adam)}
"""By the names of `optim.optimizer_backend`, in the order in which `auto` tries them."""


def choose_adam(requested: str, device: torch.device) -> Choice:
    """Pick the optimizer ("auto", "torch", "te" or "apex") for this device and say why.

    Raises:
        ConfigError: "te" or "apex" was requested and cannot be used.
    """
    reasons = []
    for name, (title, look) in FUSED.items():
        if requested not in ("auto", name):
            continue
        found = look()
        if found.usable and device.type == "cuda":
            return Choice("optimizer", title, f"{found.name} {found.version}".rstrip())
        reason = "works on CUDA only" if found.usable else found.reason
        if requested == name:
            remedy = "Install it on a machine with a GPU, or use optim.optimizer_backend=auto."
            raise ConfigError(explain(f"optim.optimizer_backend = {name}", reason, remedy))
        reasons.append(f"{name}: {reason}")
    return Choice("optimizer", TORCH, "requested" if requested == "torch" else f"fused; {'; '.join(reasons)}")


class Adam(ABC):
    """An optimizer of torch's interface, `inner`, that megatron calls and that knows our shards.

    Every shard has its fp32 moments in `inner.state` from the start.
    """

    inner: Any

    @abstractmethod
    def prepare(self, lr: float, divisor: Tensor, skip: Tensor) -> None:
        """Settings of the next `inner.step()`: gradients are divided by `divisor`, nothing changes if `skip` is 1."""

    @abstractmethod
    def count_from(self, steps: int) -> None:
        """So many updates were made already, for the correction of the moments' bias."""

    def _take_over(self, shard_groups: list[dict[str, Any]], optim: OptimConfig) -> None:
        """Hand `inner`, which was built on a placeholder, the shards.

        They are views of the parameters, which constructors refuse (they want leaves) although their steps
        take them.
        """
        settings = {name: value for name, value in self.inner.param_groups[0].items() if name != "params"}
        for group in shard_groups:
            group.update(settings, weight_decay=optim.weight_decay * group["wd_mult"])
        self.inner.param_groups = shard_groups
        self.inner.state.clear()
        for group in shard_groups:
            for shard in group["params"]:
                self.inner.state[shard].update({name: torch.zeros_like(shard) for name in ("exp_avg", "exp_avg_sq")})


def _settings(optim: OptimConfig) -> dict[str, Any]:
    return {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}


def _placeholder(device: torch.device) -> list[Tensor]:
    return [torch.zeros(1, device=device, requires_grad=True)]


class TorchAdam(Adam):
    """torch's fused AdamW, on CPU and CUDA alike."""

    def __init__(self, shard_groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device) -> None:
        self.device = device
        # On the host, because the constructor refuses the planner's "meta" device; the shards decide where it works.
        self.inner = torch.optim.AdamW(_placeholder(torch.device("cpu")), fused=True, **_settings(optim))
        self._take_over(shard_groups, optim)
        self.count_from(0)

    def prepare(self, lr: float, divisor: Tensor, skip: Tensor) -> None:
        self.inner.grad_scale, self.inner.found_inf = divisor, skip
        for group in self.inner.param_groups:
            group["lr"] = lr

    def count_from(self, steps: int) -> None:
        """Every parameter has a counter of its own; megatron would share one, which then runs ahead."""
        for moments in self.inner.state.values():
            moments["step"] = torch.full((), float(steps), device=self.device)


class _DeviceScaler:
    """What a FusedAdam asks of a GradScaler: the scale to undo, and whether a gradient is not finite."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.divisor = torch.ones((), device=device)
        self.skip = torch.zeros((), device=device)

    def _check_inf_per_device(self, optimizer: Any) -> dict[torch.device, Tensor]:
        return {self.device: self.skip}

    def _get_scale_async(self) -> Tensor:
        return self.divisor


class FusedAdam(Adam):
    """Transformer Engine's or Apex's class `kind` in capturable mode: rate, count and skip flag are device tensors."""

    def __init__(
        self, kind: type, shard_groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device
    ) -> None:
        self.device, self.scaler = device, _DeviceScaler(device)
        scaler = self.scaler

        class Steered(kind):  # type: ignore[misc]
            """Megatron calls `step` without arguments."""

            def step(self, closure: Any = None) -> Any:
                return super().step(closure=closure, grad_scaler=scaler)

        self.inner = Steered(_placeholder(device), capturable=True, adam_w_mode=True, **_settings(optim))
        self._take_over(shard_groups, optim)
        if hasattr(self.inner, "param_groups_master"):  # Apex walks both lists and stops at the end of the shorter
            self.inner.param_groups_master = [{"params": [None] * len(g["params"])} for g in shard_groups]
        for group in shard_groups:
            group["lr"] = torch.full((), optim.lr, device=device)
        self.count_from(0)

    def prepare(self, lr: float, divisor: Tensor, skip: Tensor) -> None:
        self.scaler.divisor, self.scaler.skip = divisor, skip
        for group in self.inner.param_groups:
            group["lr"].fill_(lr)

    def count_from(self, steps: int) -> None:
        """One counter per group. It goes up before a step, and stands still in the step after a refused one."""
        for group in self.inner.param_groups:
            group["step"] = torch.full((1,), steps, dtype=torch.int, device=self.device)
        self.inner._dummy_overflow_buf.zero_()


def build_adam(shard_groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device) -> Adam:
    """The optimizer that `choose_adam` names, over megatron's shards."""
    chosen = choose_adam(optim.optimizer_backend, device).backend
    if chosen == TORCH:
        return TorchAdam(shard_groups, optim, device)
    module = probe.ADAM_MODULES[next(name for name, (title, _) in FUSED.items() if title == chosen)]
    return FusedAdam(importlib.import_module(module).FusedAdam, shard_groups, optim, device)
