"""From a checked configuration to a model, optimizer and loader on this rank's device."""

from __future__ import annotations

from typing import Any

import torch

from lcl_mcore.config.run import RunConfig
from lcl_mcore.data.loader import StepLoader, build_loader
from lcl_mcore.data.tokenizer import Tokenizer, build_tokenizer
from lcl_mcore.distributed.device import Device
from lcl_mcore.distributed.groups import Groups
from lcl_mcore.fused_adam import choose_adam
from lcl_mcore.models.backends import Choice, choose_gradient_fusion, choose_layers
from lcl_mcore.models.init import initialize
from lcl_mcore.models.layers import LayerBackend
from lcl_mcore.models.lcl import LclModel, Temperature
from lcl_mcore.models.stages import split_stages
from lcl_mcore.models.transformer_config import Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def choose_backend(config: RunConfig) -> tuple[LayerBackend, list[Choice]]:
    """The layer implementation for this precision on this machine, and why.

    Raises:
        ConfigError: it is not available here.
    """
    requested = "te" if config.train.precision == "fp8" else config.train.backend
    return choose_layers(DTYPES[config.train.precision], requested)


def build_model(config: RunConfig, device: Device, groups: Groups) -> tuple[LclModel, list[Choice]]:
    """The model with its initial weights, and which backend serves each part."""
    dtype = DTYPES[config.train.precision]
    backend, choices = choose_backend(config)
    parallel = config.parallel
    fusion = choose_gradient_fusion(
        parallel.gradient_accumulation_fusion, choices[0].backend, dtype, device.device
    )
    choices += [choose_adam(config.optim.optimizer_backend, device.device), fusion]
    vision_data = config.resolved_vision_parallel == "data" and parallel.tensor_parallel_size > 1
    layout = Layout(
        tensor_parallel=parallel.tensor_parallel_size,
        stage_layers=split_stages(config) if parallel.pipeline_parallel_size > 1 else (),
        sequence_parallel=parallel.sequence_parallel,
        vision_data=vision_data,
        dtype=dtype,
        fp8=config.train.fp8_recipe if config.train.precision == "fp8" else None,
        device=device.device,
        fused_gradients=fusion.backend != "off",
        recompute_vision=parallel.recompute_vision,
        recompute_language=parallel.recompute_language,
    )
    vision_groups = groups.vision if vision_data else groups.megatron
    model = LclModel(config.model, layout, backend, groups.megatron, vision_groups)
    initialize(model, config.model, config.train.seed, groups.tp.rank(), groups.tp.size())
    model.to(device.device)
    if dtype != torch.float32:
        for module in model.modules():
            if not isinstance(module, Temperature):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
    return model, choices


def build_data(
    config: RunConfig, device: Device, groups: Groups, position: dict[str, Any] | None
) -> tuple[StepLoader, Tokenizer]:
    """The loader of this rank, continuing at `position`, and the tokenizer."""
    tokenizer = build_tokenizer(config.data.tokenizer)
    loader = build_loader(
        config.data,
        tokenizer=tokenizer,
        image_size=config.model.vision.image_size,
        tokens_per_image=config.model.vision.patches,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        seed=config.train.seed,
        counts_group=groups.host_counts if groups.dp.size() > 1 else None,
        model_group=groups.host_model if groups.host_model.size() > 1 else None,
        pixel_ranks=list(range(config.parallel.tensor_parallel_size)),  # the first pipeline stage has the ViT
        position=position,
        pin_memory=device.is_cuda,
    )
    return loader, tokenizer
