"""The transformer layer of both towers: megatron's `TransformerLayer` with our norm and residual branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lcl_mcore.models.attention import AttentionBackend, SegmentAttention, Segments
from lcl_mcore.models.linear import ColumnLinear, RowLinear
from lcl_mcore.rng import dropout_keep_mask, key63, uniform


def mark_sequence_parallel(parameter: nn.Parameter, enabled: bool) -> nn.Parameter:
    """Ask megatron to sum this parameter's gradient over the TP ranks, which each saw part of the tokens."""
    parameter.sequence_parallel = enabled  # type: ignore[attr-defined]
    return parameter


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm with the signature megatron's specs call, usable under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=parameter_device(config))
        for parameter in self.parameters():
            mark_sequence_parallel(parameter, config.sequence_parallel)


def parameter_device(config: TransformerConfig) -> torch.device | int:
    """Where megatron puts the parameters of this configuration."""
    return torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()


class ResidualBranch(nn.Module):
    """Bias, layer-scale, drop-path or dropout, and the residual sum of one branch.

    Stands in for megatron's bias-dropout-add. With drop-path (ViT) whole images lose the branch; with
    dropout (LM) single channels do; both keyed by identity, see `models.randomness`.
    """

    def __init__(
        self, config: TransformerConfig, place: str, layer_scale: float | None, drop_path: float, dropout: float
    ) -> None:
        super().__init__()
        self.place, self.drop_path, self.dropout = place, drop_path, dropout
        self.gamma: nn.Parameter | None = None
        if layer_scale is not None:
            gamma = torch.full((config.hidden_size,), layer_scale, dtype=config.params_dtype)
            self.gamma = nn.Parameter(gamma.to(parameter_device(config)))
            mark_sequence_parallel(self.gamma, config.sequence_parallel)
        self.segments: Segments | None = None
        self.token_range = (0, 0)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        return self._train if training else self._evaluate

    def _scaled(self, branch_with_bias: tuple[Tensor, Tensor | None]) -> Tensor:
        branch, bias = branch_with_bias
        if bias is not None:
            branch = branch + bias
        return branch if self.gamma is None else branch * self.gamma

    def _evaluate(self, branch_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        return residual + self._scaled(branch_with_bias)

    def _train(self, branch_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        branch = self._scaled(branch_with_bias)
        segments = self.segments
        assert segments is not None
        seed = key63(segments.seed, self.place)
        if self.drop_path > 0.0:
            assert segments.keys is not None
            keep = (uniform(segments.keys, seed) >= self.drop_path).to(branch.dtype) / (1.0 - self.drop_path)
            start, stop = (edge // segments.lengths[0] for edge in self.token_range)
            per_token = keep[start:stop].repeat_interleave(segments.lengths[0])  # [t]
            branch = branch * per_token[:, None, None]
        if self.dropout > 0.0:
            branch = sequence_dropout(branch, segments, seed, self.dropout, self.token_range)
        return residual + branch


def sequence_dropout(x: Tensor, segments: Segments, seed: int, p: float, token_range: tuple[int, int]) -> Tensor:
    """Dropout of x [t_local, 1, h], the positions `token_range` of the packed sequences."""
    length = sum(segments.lengths) // len(segments.sequence_keys)
    keep = dropout_keep_mask(segments.sequence_keys, seed, p, length, x.shape[-1], *token_range, x.device)
    return x * keep[:, None, :] / (1.0 - p)


class LclTransformerLayer(TransformerLayer):
    """megatron's layer; tells its residual branches which tokens they are looking at.

    The description arrives with each call, so activation recompute, which calls again later, sees the
    same one.

    Under selective recompute the MLP, too, computes its wide activations again instead of keeping them.
    megatron's own switch for this returns the bias from an autograd function, which makes that parameter
    lose its gradient.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.recompute_granularity == "selective":
            self.mlp.forward = partial(self._recomputed, self.mlp.forward)

    def _recomputed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        segments: Segments = kwargs["packed_seq_params"]
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        local = hidden.shape[0]
        start = self.tp_group.rank() * local if self.config.sequence_parallel else 0
        for branch in (self.self_attn_bda, self.mlp_bda):
            branch.segments, branch.token_range = segments, (start, start + local)
        return super().forward(*args, **kwargs)


@dataclass(frozen=True)
class LayerBackend:
    """Which implementation each part of a transformer layer uses, chosen by `models.backends`."""

    column_linear: type
    row_linear: type
    norm: type
    core_attention: ModuleSpec | type


def torch_backend(attention: AttentionBackend) -> LayerBackend:
    """megatron's own linear layers, torch's LayerNorm, and segment attention on the given kernel."""
    return LayerBackend(
        column_linear=ColumnLinear,
        row_linear=RowLinear,
        norm=LayerNorm,
        core_attention=ModuleSpec(module=SegmentAttention, params={"backend": attention}),
    )


def layer_spec(
    config: TransformerConfig,
    backend: LayerBackend,
    tower: str,
    index: int,
    *,
    causal: bool,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> ModuleSpec:
    """Spec of layer `index` (0-based, global) of a tower ("vision" or "language")."""

    def branch(name: str) -> ModuleSpec:
        options = {
            "config": config,
            "place": f"{tower}.{index}.{name}",
            "layer_scale": layer_scale,
            "drop_path": drop_path,
            "dropout": dropout,
        }
        return ModuleSpec(module=ResidualBranch, params=options)

    return ModuleSpec(
        module=LclTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_linear,
                    core_attention=backend.core_attention,
                    linear_proj=backend.row_linear,
                ),
            ),
            self_attn_bda=branch("attention"),
            pre_mlp_layernorm=backend.norm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=backend.column_linear, linear_fc2=backend.row_linear)
            ),
            mlp_bda=branch("mlp"),
        ),
    )
