"""The interface of the FusedAdams of Transformer Engine and Apex in capturable mode, in plain torch on any device.

What their kernels do is written down here from their documentation and behaviour: learning rate and step count are
tensors; the count goes up before the update unless the flag of the step before was 1; a flag of exactly 1 makes the
update do nothing; gradients are multiplied by the inverse scale in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TeLike(torch.optim.Optimizer):
    """Transformer Engine's; `calls` holds each step's scale and flag."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert capturable
        assert adam_w_mode
        assert not amsgrad
        super().__init__(
            params,
            {
                "lr": torch.tensor(lr),
                "bias_correction": bias_correction,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
            },
        )
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)
        self.calls: list[tuple[float, float]] = []

    def shards(self, index: int) -> list[Tensor]:
        return list(self.param_groups[index]["params"])

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for index, group in enumerate(self.param_groups):
            if not group["params"]:
                continue
            device, flag = group["params"][0].device, self._dummy_overflow_buf
            assert group["lr"].dtype == torch.float32
            assert group["step"].dtype == torch.int
            group["step"] += (flag != 1).to(torch.int)
            flag.copy_(grad_scaler._check_inf_per_device(self)[device])
            scale = grad_scaler._get_scale_async()
            if index == 0:
                self.calls.append((scale.item(), flag.item()))
            if flag.item() == 1:
                continue
            beta1, beta2 = group["betas"]
            corrections = [1 - beta ** group["step"].item() for beta in (beta1, beta2)]
            for shard in self.shards(index):
                moments = self.state[shard]
                assert set(moments) == {"exp_avg", "exp_avg_sq"}
                shard.grad *= scale.double().reciprocal().float()
                moments["exp_avg"].lerp_(shard.grad, 1 - beta1)
                moments["exp_avg_sq"].mul_(beta2).addcmul_(shard.grad, shard.grad, value=1 - beta2)
                spread = (moments["exp_avg_sq"] / corrections[1]).sqrt() + group["eps"]
                update = moments["exp_avg"] / corrections[0] / spread + group["weight_decay"] * shard
                shard -= group["lr"] * update


class ApexLike(TeLike):
    """Apex's, which walks its shards together with a list of their masters, to the end of the shorter."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.param_groups_master = [{"params": [None for _ in g["params"]]} for g in self.param_groups]

    def shards(self, index: int) -> list[Tensor]:
        together = zip(self.param_groups[index]["params"], self.param_groups_master[index]["params"], strict=False)
        return [shard for shard, _ in together]
