"""megatron's `TransformerConfig` for each tower, derived from our configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lcl_mcore.config.schema import RunConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""What parameters are rounded to for computing, by `train.precision`."""


def no_init(weight: Tensor) -> Tensor:
    """Weights are drawn by `models.init`, keyed by name, once the model is built."""
    return weight


def _recompute(choice: str) -> dict[str, Any]:
    """megatron's options for activations that are recomputed in backward."""
    if choice == "none":
        return {}
    if choice == "selective":  # and the MLP, see `models.layers.LclTransformerLayer`
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if choice == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    layers = int(choice.removeprefix("block:"))
    return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}


def _common(config: RunConfig, device: torch.device, tensor_parallel_size: int, recompute: str) -> dict[str, Any]:
    """Options that both towers share."""
    dtype = DTYPES[config.train.precision]
    options: dict[str, Any] = {
        "tensor_model_parallel_size": tensor_parallel_size,
        "sequence_parallel": config.parallel.sequence_parallel and tensor_parallel_size > 1,
        "params_dtype": torch.float32,  # while they are filled; see `build.cast`
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": device.type == "cpu",
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
    if config.train.precision == "fp8":  # E4M3 forward, E5M2 backward
        recipe = config.train.fp8_recipe
        names = {"current": "tensorwise", "delayed": "delayed", "block": "blockwise"}
        options |= {"fp8": "hybrid", "fp8_recipe": names[recipe]}
        if recipe == "delayed":
            options |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
        # Transformer Engine would otherwise go on using the FP8 copies of the first step's weights.
        options |= {"disable_parameter_transpose_cache": True}
    return options | _recompute(recompute)


def vision_transformer_config(config: RunConfig, device: torch.device) -> TransformerConfig:
    """The ViT tower; it never spans pipeline stages."""
    shape = config.model.vision
    whole = config.resolved_vision_parallel == "data"
    tensor_parallel_size = 1 if whole else config.parallel.tensor_parallel_size
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.mlp_width,
        activation_func=F.gelu,
        layernorm_epsilon=shape.norm_eps,
        # Fused weight gradients need at least one token, and a rank without images has none.
        gradient_accumulation_fusion=False,
        **_common(config, device, tensor_parallel_size, config.parallel.recompute_vision),
    )


def language_transformer_config(
    config: RunConfig,
    device: torch.device,
    stage_layers: tuple[int, ...] = (),
    *,
    gradient_accumulation_fusion: bool = False,
) -> TransformerConfig:
    """The LM tower, split into pipeline stages.

    Args:
        stage_layers: LM layers on each pipeline stage; one entry or none without a pipeline.
        gradient_accumulation_fusion: matmuls add weight gradients to the fp32 buffers themselves.
    """
    shape = config.model.language
    stages: dict[str, Any] = {}
    if len(stage_layers) > 1:
        places = [["decoder"] * layers for layers in stage_layers]
        places[0].insert(0, "embedding")
        places[-1].append("loss")
        # Sequences have one length, so stages need not tell each other shapes; and no wait after each transfer.
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
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        **stages,
        **_common(config, device, config.parallel.tensor_parallel_size, config.parallel.recompute_language),
    )


def without_sequence_parallel(config: TransformerConfig) -> TransformerConfig:
    """The same configuration for a part that sees all tokens on every TP rank."""
    return dataclasses.replace(config, sequence_parallel=False) if config.sequence_parallel else config
