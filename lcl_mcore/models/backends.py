"""Which implementation each part of the model uses here, and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from lcl_kernels.triton_fused import FusedImpl

from lcl_mcore import optional_packages as probe
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.models.layers import LayerBackend, LayerNorm, torch_backend
from lcl_mcore.models.transformer_config import DTYPES


@dataclass(frozen=True)
class Choice:
    """One line of the report at start-up: the part, what serves it, and the reason."""

    part: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Backends:
    """What the model is built from, chosen once, before it is built.

    Attributes:
        layers: classes of the transformer layers' parts.
        gradient_accumulation_fusion: the LM's matmuls add weight gradients to the fp32 buffers themselves.
        choices: the reasons, for the start-up summary.
    """

    layers: LayerBackend
    gradient_accumulation_fusion: bool
    choices: tuple[Choice, ...]


def choose_backends(config: RunConfig, device: torch.device) -> Backends:
    """The fastest implementations that are here and that the configuration allows.

    Raises:
        ConfigError: a requested one is not available.
    """
    dtype = DTYPES[config.train.precision]
    requested = "te" if config.train.precision == "fp8" else config.train.backend
    layers, choices = choose_layers(dtype, requested)
    wanted = config.parallel.gradient_accumulation_fusion
    fusion = choose_gradient_fusion(wanted, choices[0].backend, dtype, device)
    residual = choose_elementwise(config.train.elementwise_backend, device)
    layers = replace(layers, elementwise=residual.backend)  # type: ignore[arg-type]
    return Backends(layers, fusion.backend != "off", (*choices, residual, fusion))


def _te_backend(attention: Choice) -> LayerBackend:
    """Transformer Engine's layers; its attention where packed sequences are known to be served (Hopper on)."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TERowParallelLinear,
    )

    core: Any = TEDotProductAttention
    if attention.backend != "transformer-engine":
        core = torch_backend(attention.backend).core_attention  # type: ignore[arg-type]
    return LayerBackend(TEColumnParallelLinear, TERowParallelLinear, LayerNorm, core)


def choose_attention(dtype: torch.dtype) -> Choice:
    """The fastest attention that can serve packed sequences of this dtype without s x s scores."""
    if dtype == torch.float32:
        return Choice("attention", "sdpa", "fp32: the variable-length kernels take half precision only")
    flash, varlen = probe.flash_attn(), probe.torch_varlen()
    if flash.usable:
        return Choice("attention", "flash-attn", f"flash-attn {flash.version}")
    if varlen.usable:
        return Choice("attention", "torch-varlen", f"flash-attn: {flash.reason}")
    return Choice("attention", "sdpa", f"flash-attn: {flash.reason}; torch varlen: {varlen.reason}")


def choose_layers(dtype: torch.dtype, requested: str = "auto") -> tuple[LayerBackend, list[Choice]]:
    """Pick the layer implementation ("auto", "torch" or "te") and say why.

    Raises:
        ConfigError: "te" was requested and cannot be used.
    """
    te = probe.transformer_engine()
    if requested == "te" and not te.usable:
        raise ConfigError(
            explain(
                "Transformer Engine layers (--backend te or --precision fp8)",
                te.reason,
                "Install transformer-engine on a machine with a GPU, or use --precision bf16 --backend auto.",
            )
        )
    if te.usable and requested != "torch" and dtype != torch.float32:
        why = f"transformer-engine {te.version}"
        attention = Choice("attention", "transformer-engine", why)
        capability = probe.cuda_capability()
        if capability is None or capability < (9, 0):  # its packed attention needs sm_90 or flash-attn
            attention = choose_attention(dtype)
        return _te_backend(attention), [Choice("layers", "transformer-engine", why), attention]
    reason = "requested" if requested == "torch" else f"transformer-engine: {te.reason}"
    if te.usable and dtype == torch.float32:
        reason = "fp32 runs use megatron-core's own layers"
    attention = choose_attention(dtype)
    return torch_backend(attention.backend), [Choice("layers", "megatron-core", reason), attention]  # type: ignore[arg-type]


def choose_elementwise(requested: FusedImpl, device: torch.device) -> Choice:
    """What serves residual branches, their norms and the activations: "triton" or "plain".

    Raises:
        ConfigError: "triton" was requested and cannot be used.
    """
    part, triton = "residual", probe.triton()
    if requested == "plain":
        return Choice(part, "plain", "requested")
    if device.type == "cuda" and triton.usable:
        return Choice(part, "triton", f"triton {triton.version}: residual branches with their norms, activations")
    reason = f"triton: {triton.reason}" if device.type == "cuda" else "fused kernels need CUDA"
    if requested == "triton":
        where = f"train.elementwise_backend = triton on {device.type}"
        raise ConfigError(explain(where, reason, "Use --elementwise-backend auto."))
    return Choice(part, "plain", reason)


def choose_gradient_fusion(wanted: bool, layers: str, dtype: torch.dtype, device: torch.device) -> Choice:
    """Whether matmuls add the LM's weight gradients to the fp32 buffers: the backend is who does, or "off".

    Args:
        layers: backend of the linear layers, from `choose_layers`.
    """
    part, te, apex = "wgrad", "transformer-engine", probe.apex_gradient_fusion()
    if not wanted:
        return Choice(part, "off", "requested")
    if device.type != "cuda" or dtype == torch.float32:
        return Choice(part, "off", "gradient accumulation fusion needs CUDA and half precision")
    if layers == te:
        return Choice(part, te, "added to the fp32 buffers within the LM's matmuls")
    if apex.usable:
        return Choice(part, "apex", "added to the fp32 buffers within the LM's matmuls")
    return Choice(part, "off", f"gradient accumulation fusion: {apex.reason}")
