"""megatron's `TransformerConfig` for each tower, derived from our configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lcl_mcore.config.model import LanguageConfig, VisionConfig


@dataclass(frozen=True)
class Layout:
    """What the towers need to know about parallelism, precision and recompute."""

    tensor_parallel: int = 1
    stage_layers: tuple[int, ...] = ()
    """LM layers on each pipeline stage; empty without a pipeline."""
    sequence_parallel: bool = False
    vision_data: bool = False
    """Every tensor-parallel rank holds the whole ViT and encodes a share of the images."""
    dtype: torch.dtype = torch.float32
    fp8: str | None = None
    """Scaling recipe ("current", "delayed" or "block"), None for no FP8."""
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable
    fused_gradients: bool = False
    """The LM's linear layers add weight gradients to the fp32 buffers within the matmul. Not the ViT's and the
    pool's: theirs have no rows on a rank without images, which those kernels were not made for."""
    recompute_vision: str = "none"
    recompute_language: str = "none"
    """"none", "selective", "full" or "block:N", see `config.run.ParallelConfig`."""


def no_init(weight: Tensor) -> Tensor:
    """Weights are drawn by `models.init`, keyed by name, after the model stands."""
    return weight


def _recompute(choice: str) -> dict[str, Any]:
    """megatron's options for activations that are computed again in backward."""
    if choice == "none":
        return {}
    if choice == "selective":  # and the MLP, see `models.layers.LclTransformerLayer`
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if choice == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    layers = int(choice.removeprefix("block:"))
    return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}


def _common(layout: Layout, tensor_parallel: int, recompute: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "tensor_model_parallel_size": tensor_parallel,
        "sequence_parallel": layout.sequence_parallel and tensor_parallel > 1,
        "params_dtype": layout.dtype,
        "pipeline_dtype": layout.dtype,
        "bf16": layout.dtype == torch.bfloat16,
        "use_cpu_initialization": layout.device.type == "cpu",
        "perform_initialization": True,
        "init_method": no_init,
        "output_layer_init_method": no_init,
        "hidden_dropout": 0.0,  # our residual branch has its own
        "attention_dropout": 0.0,
        "add_bias_linear": True,
        "normalization": "LayerNorm",
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "calculate_per_token_loss": True,  # our losses carry their own global normaliser: DDP must sum
    }
    if layout.fp8:  # E4M3 forward, E5M2 backward
        names = {"current": "tensorwise", "delayed": "delayed", "block": "blockwise"}
        options |= {"fp8": "hybrid", "fp8_recipe": names[layout.fp8]}
        if layout.fp8 == "delayed":
            options |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
        # Transformer Engine would otherwise go on using the FP8 copies of the first step's weights.
        options |= {"disable_parameter_transpose_cache": True}
    return options | _recompute(recompute)


def vision_transformer_config(shape: VisionConfig, layout: Layout) -> TransformerConfig:
    """The ViT tower; it never spans pipeline stages."""
    tensor_parallel = 1 if layout.vision_data else layout.tensor_parallel
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.mlp_width,
        activation_func=F.gelu,
        layernorm_epsilon=shape.norm_eps,
        gradient_accumulation_fusion=False,
        **_common(layout, tensor_parallel, layout.recompute_vision),
    )


def language_transformer_config(shape: LanguageConfig, layout: Layout) -> TransformerConfig:
    """The LM tower, cut into pipeline stages."""
    stages: dict[str, Any] = {}
    if len(layout.stage_layers) > 1:
        places = [["decoder"] * layers for layers in layout.stage_layers]
        places[0].insert(0, "embedding")
        places[-1].append("loss")
        # Rows have one length, so stages need not tell each other shapes; and no wait after each transfer.
        stages = {
            "pipeline_model_parallel_size": len(places),
            "pipeline_model_parallel_layout": places,
            "batch_p2p_sync": False,
        }
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.mlp_width,
        activation_func=F.relu if shape.activation == "relu" else F.gelu,
        layernorm_epsilon=shape.norm_eps,
        gradient_accumulation_fusion=layout.fused_gradients,
        **stages,
        **_common(layout, layout.tensor_parallel, layout.recompute_language),
    )


def without_sequence_parallel(config: TransformerConfig) -> TransformerConfig:
    """The same configuration for a part that sees all tokens on every TP rank."""
    return dataclasses.replace(config, sequence_parallel=False) if config.sequence_parallel else config
