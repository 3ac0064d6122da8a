"""Initial weights, drawn per parameter from a generator keyed by (seed, name).

The same seed gives the same weights for every tensor-, pipeline- and data-parallel size: each rank draws
the whole tensor and keeps its share. Distributions follow the released code (`transformer.py:628-649`,
`attentive.py`, torch's defaults for the ViT) and, for the OPT shape, N(0, 0.02).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lcl_mcore.config.schema import ModelConfig
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.rng import key63


def _uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    tensor.uniform_(-bound, bound, generator=generator)


def _draw_vision(name: str, tensor: Tensor, shape: ModelConfig, generator: torch.Generator) -> None:
    width = shape.vision.width
    if name in ("class_token", "position_embedding"):
        tensor.normal_(0.0, width**-0.5, generator=generator)
    elif name.endswith("linear_qkv.weight"):  # Xavier over the stacked [3 * width, width]
        _uniform(tensor, math.sqrt(6.0 / (4 * width)), generator)
    elif name.endswith(("linear_qkv.bias", "linear_proj.bias")):
        tensor.zero_()
    elif name.endswith("linear_fc2.bias"):
        _uniform(tensor, shape.vision.mlp_width**-0.5, generator)
    elif name.endswith("bias"):
        _uniform(tensor, width**-0.5, generator)
    else:  # linear weights and the patch embedding: torch's default, U(+-1 / sqrt(fan in))
        _uniform(tensor, tensor.shape[1] ** -0.5, generator)


def _draw_pool(name: str, tensor: Tensor, shape: ModelConfig, generator: torch.Generator) -> None:
    if name == "query":
        tensor.normal_(0.0, 1.0, generator=generator)
    elif name.endswith("bias"):
        tensor.zero_()
    else:
        _uniform(tensor, tensor.shape[1] ** -0.5, generator)


def _draw_language(name: str, tensor: Tensor, shape: ModelConfig, generator: torch.Generator) -> None:
    language = shape.language
    width, depth_gain = language.width, (2 * language.layers) ** -0.5
    if name == "context_projection":
        tensor.normal_(0.0, width**-0.5, generator=generator)
    elif language.init == "opt":
        tensor.zero_() if name.endswith("bias") else tensor.normal_(0.0, 0.02, generator=generator)
    elif name == "head":
        _uniform(tensor, width**-0.5, generator)
    elif name == "token_embedding.weight":
        tensor.normal_(0.0, 0.02, generator=generator)
    elif name == "position_embedding":
        tensor.normal_(0.0, 0.01, generator=generator)
    elif name.endswith(("linear_qkv.bias", "linear_proj.bias")):
        tensor.zero_()
    elif name.endswith("bias"):
        fan_in = language.mlp_width if "fc2" in name else width
        _uniform(tensor, fan_in**-0.5, generator)
    elif name.endswith("linear_qkv.weight"):
        tensor.normal_(0.0, width**-0.5, generator=generator)
    elif name.endswith("linear_fc1.weight"):
        tensor.normal_(0.0, (2 * width) ** -0.5, generator=generator)
    else:  # linear_proj and linear_fc2
        tensor.normal_(0.0, width**-0.5 * depth_gain, generator=generator)


_DRAW = {"vision": _draw_vision, "pool": _draw_pool, "language": _draw_language}


@torch.no_grad()
def initialize(model: LclModel, shape: ModelConfig, seed: int, tp_rank: int, tp_size: int) -> None:
    """Fill every parameter of an `LclModel`. Norms start as identity; layer-scale keeps its value.

    Args:
        model: any stage of a pipeline, with shares of a `tp_size`-way layout.
        seed: the run's seed.
    """
    for local, parameter in model.named_parameters():
        name = model.canonical_name(local)
        part, _, rest = name.partition(".")
        if part not in _DRAW or rest.endswith("gamma"):
            continue
        if "norm" in rest:
            parameter.fill_(1.0 if rest.endswith("weight") else 0.0)
            continue
        split = getattr(parameter, "tensor_model_parallel", False) and tp_size > 1
        size = list(parameter.shape)
        axis = getattr(parameter, "partition_dim", 0)
        if split:
            size[axis] *= tp_size
        whole = torch.empty(size)
        _DRAW[part](rest, whole, shape, torch.Generator().manual_seed(key63(seed, "init", name)))
        share = whole.chunk(tp_size, axis)[tp_rank] if split else whole
        parameter.copy_(share)
