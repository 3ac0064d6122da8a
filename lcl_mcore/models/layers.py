"""The transformer layer of both towers: megatron's `TransformerLayer` with our norm and residual branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from lcl_kernels import bias_activation, residual_branch
from lcl_kernels.activation import Activation
from lcl_kernels.triton_fused import FusedImpl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lcl_mcore.distributed.device import send
from lcl_mcore.models.attention import AttentionBackend, SegmentAttention, Segments
from lcl_mcore.models.linear import ColumnLinear, RowLinear
from lcl_mcore.rng import key63, row_keys, uniform


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

    def forward(self, x: Tensor | Callable[..., Any]) -> Any:
        """The norm of x; of a residual sum that is yet to be formed, the sum and its norm.

        The sum comes here, and not the weights to it: megatron's hooks wait for a module's weights when it is called.
        """
        if isinstance(x, Tensor):
            return super().forward(x)
        return x(norm=(self.weight, self.bias, self.eps))


def parameter_device(config: TransformerConfig) -> torch.device | int:
    """Where megatron puts the parameters of this configuration."""
    return torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()


class ResidualBranch(nn.Module):
    """Bias, layer scale, drop path or dropout, the residual sum of one branch, and the norm that follows.

    Stands in for megatron's bias-dropout-add. With drop path (ViT) whole images lose the branch; with dropout (LM)
    single channels do; both belong to identities, see `draw_masks`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        place: str,
        layer_scale: float | None,
        drop_path: float,
        dropout: float,
        elementwise: FusedImpl,
    ) -> None:
        super().__init__()
        self.place, self.drop_path, self.dropout, self.elementwise = place, drop_path, dropout, elementwise
        self.gamma: nn.Parameter | None = None
        if layer_scale is not None:
            gamma = torch.full((config.hidden_size,), layer_scale, dtype=config.params_dtype)
            self.gamma = nn.Parameter(gamma.to(parameter_device(config)))
            mark_sequence_parallel(self.gamma, config.sequence_parallel)

    def forward(
        self,
        branch_with_bias: tuple[Tensor, Tensor | None],
        residual: Tensor,
        norm: nn.Module | None,
        segments: Segments,
        start: int,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream behind the branch, and its norm (None without one).

        Args:
            branch_with_bias: [t, 1, h] of the last matmul and its bias, which is yet to be added.
            residual: [t, 1, h].
            norm: what follows.
            segments: with the masks of this forward, in training.
            start: first of the t positions among all of `segments`.
        """
        (branch, bias), shape = branch_with_bias, residual.shape
        residual, branch = residual.view(-1, shape[-1]), branch.view(-1, shape[-1])
        options: dict[str, Any] = {}
        if self.training and self.drop_path > 0.0:
            first, last = (edge // segments.lengths[0] for edge in (start, start + len(residual)))
            options["row_scale"] = segments.masks[self.place][first:last]
        if self.training and self.dropout > 0.0:
            options["dropout"] = segments.masks[self.place][start : start + len(residual)], self.dropout
        add = partial(residual_branch, residual, branch, bias=bias, gain=self.gamma, impl=self.elementwise, **options)
        total, normed = add() if norm is None else norm(add)
        return total.view(shape), None if normed is None else normed.view(shape)


def draw_masks(blocks: TransformerBlock, segments: Segments) -> None:
    """Masks of all residual branches of a tower in a few launches, for one forward in training.

    They depend on identities, place and step alone: every layout has the same, activation recompute and the second
    pass of GradCache as well. Drop path is drawn whole, [n] fp32 factors 0 or 1/(1 - p); of dropout the rows' keys,
    [t] int64, from which kernels draw the rest.
    """
    branches = [branch for layer in blocks.layers for branch in (layer.self_attn_bda, layer.mlp_bda)]

    def seeds(dropping: list[ResidualBranch]) -> Tensor:
        return send(torch.tensor([key63(segments.seed, b.place) for b in dropping]), segments.cu_seqlens_q.device)

    dropping = [branch for branch in branches if branch.drop_path > 0.0]
    if dropping:
        assert segments.keys is not None
        drawn = uniform(segments.keys, seeds(dropping)[:, None])
        for branch, row in zip(dropping, drawn, strict=True):
            segments.masks[branch.place] = (row >= branch.drop_path) / (1.0 - branch.drop_path)
    dropping = [branch for branch in branches if branch.dropout > 0.0]
    if dropping:
        keys = sequence_row_keys(segments, seeds(dropping))
        segments.masks |= {branch.place: row for branch, row in zip(dropping, keys, strict=True)}


def sequence_row_keys(segments: Segments, seeds: Tensor) -> Tensor:
    """Keys [p, t] of all positions of the packed sequences, for seeds [p]."""
    length = sum(segments.lengths) // len(segments.sequence_keys)
    return row_keys(send(torch.tensor(segments.sequence_keys), seeds.device), seeds, length)


class LclTransformerLayer(TransformerLayer):
    """megatron's layer, its element-wise work fused: each residual branch makes the norm of what follows it.

    The description of the tokens arrives with each call, so activation recompute, which calls again later, sees the
    same one.

    Under selective recompute the MLP, too, computes its wide activations again instead of keeping them.
    megatron's own switch for this returns the bias from an autograd function, which makes that parameter
    lose its gradient.
    """

    def __init__(self, config: TransformerConfig, *args: Any, elementwise: FusedImpl, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.elementwise = elementwise
        for linear in (self.self_attention.linear_proj, self.mlp.linear_fc1, self.mlp.linear_fc2):
            linear.hands_out_bias = elementwise == "triton"
        self.following: tuple[nn.Module, ...] = ()  # the next layer's first norm, which is not this one's child

    def forward(
        self, hidden_states: Tensor, *, packed_seq_params: Segments, context: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output and, where `following` is set, its norm, which arrives there as `context`."""
        segments, local = packed_seq_params, hidden_states.shape[0]
        start = self.tp_group.rank() * local if self.config.sequence_parallel else 0
        normed = self.input_layernorm(hidden_states) if context is None else context
        branch = self.self_attention(normed, attention_mask=None, packed_seq_params=segments)
        hidden_states, normed = self.self_attn_bda(branch, hidden_states, self.pre_mlp_layernorm, segments, start)
        branch = self._recomputed(normed) if self.config.recompute_granularity == "selective" else self._mlp(normed)
        following = self.following[0] if self.following else None
        hidden_states, normed = self.mlp_bda(branch, hidden_states, following, segments, start)
        # Pipeline schedules free what they have sent, which a view does not allow.
        return make_viewless_tensor(hidden_states, hidden_states.requires_grad, keep_graph=True), normed

    def _mlp(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        wide, bias = self.mlp.linear_fc1(x)
        kind: Activation = "relu" if self.config.activation_func is F.relu else "gelu"
        y = bias_activation(wide.view(-1, wide.shape[-1]), bias, kind, impl=self.elementwise)
        result: tuple[Tensor, Tensor | None] = self.mlp.linear_fc2(y.view(wide.shape))
        return result

    def _recomputed(self, x: Tensor) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return self._mlp(x)
        return checkpoint(self._mlp, x, use_reentrant=False, preserve_rng_state=False)


def transformer_block(
    config: TransformerConfig, layers: list[ModuleSpec], groups: ProcessGroupCollection
) -> TransformerBlock:
    """The blocks of one tower on this rank, without a final norm."""
    submodules = TransformerBlockSubmodules(layer_specs=layers, layer_norm=None)
    blocks = TransformerBlock(config, submodules, post_layer_norm=False, pg_collection=groups)
    if config.recompute_granularity != "full":  # which would keep each layer's norm beside its input
        for layer, after in pairwise(blocks.layers):
            layer.following = (after.input_layernorm,)
    return blocks


@dataclass(frozen=True)
class LayerBackend:
    """Which implementation each part of a transformer layer uses, chosen by `models.backends`."""

    column_linear: type
    row_linear: type
    norm: type
    core_attention: ModuleSpec | type
    elementwise: FusedImpl = "auto"


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
            "elementwise": backend.elementwise,
        }
        return ModuleSpec(module=ResidualBranch, params=options)

    return ModuleSpec(
        module=LclTransformerLayer,
        params={"elementwise": backend.elementwise},
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
