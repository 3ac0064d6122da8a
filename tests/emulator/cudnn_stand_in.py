"""Transformer Engine's attention on the emulated GPU: cuDNN wants a driver's answers even to say which kernels it has.

Its calls are taken where they leave Python; shapes, dtypes and the devices of what goes in are real, what comes out has
the right shapes.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


def _operands(arguments: tuple[Any, ...]) -> list[Tensor]:
    """q, k, v (and o and its gradient), of all arguments."""
    return [a for a in arguments if isinstance(a, Tensor) and a.dim() >= 3 and a.is_floating_point()]


def _forward(*arguments: Any, **named: Any) -> list[Tensor]:
    q, k, v = _operands(arguments)[:3]
    assert {t.device.type for t in (q, k, v)} == {"cuda"}
    statistics = torch.empty((*q.shape[:-1], 1), dtype=torch.float32, device=q.device)
    return [torch.empty_like(q), statistics, torch.empty(2, dtype=torch.int64, device=q.device)]


def _backward(*arguments: Any, **named: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in _operands(arguments)[:3]]


def install() -> None:
    """Replace what asks cuDNN, and what calls it."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    extension = importlib.import_module("transformer_engine_torch")  # which the package has loaded by its path

    utils._get_fused_attn_backend = lambda **asked: (int(FusedAttnBackend["F16_arbitrary_seqlen"]), "")
    extension.fused_attn_fwd = _forward
    extension.fused_attn_bwd = _backward
