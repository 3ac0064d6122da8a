"""`--init-from`: initial weights from a file, for the whole model or for its vision encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lcl_mcore.checkpoint.weights_file import (
    is_consolidated,
    load_consolidated,
    read_consolidated,
    tensor_parallel_share,
)
from lcl_mcore.config.schema import VisionConfig
from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.interop.vit_formats import OTHER_SHAPE, from_format, recognise
from lcl_mcore.models.lcl import LclModel


def start_from(model: LclModel, path: Path, tp_rank: int, tp_size: int) -> str:
    """Replace initial weights: all of them by `model.safetensors`, the encoder's by another package's file.

    Args:
        model: on this rank, whole or one pipeline stage.
        path: a file, or the folder that holds it.

    Returns:
        What was loaded, for the log.

    Raises:
        CheckpointError: unreadable, of no known format, or it does not fit the model.
    """
    if is_consolidated(path):
        load_consolidated(model, read_consolidated(path), tp_rank, tp_size)
        return str(path)
    state, kind = read_encoder(path, model.shape.vision)
    load_encoder(model, state, tp_rank, tp_size)
    return f"{path} (vision encoder only, {kind})"


def read_encoder(path: Path, shape: VisionConfig) -> tuple[dict[str, Tensor], str]:
    """Encoder state dict from a folder or `.safetensors` file of timm, open_clip or transformers, and its format.

    Raises:
        CheckpointError: unreadable, of no known format, or it does not fit `shape`.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        rule = f"holds {len(files)} safetensors files where one is needed"
        raise CheckpointError(explain(path, rule, "Give the file itself."))
    try:
        state = load_file(files[0])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(explain(files[0], f"cannot be read ({error})", "Check the path.")) from None
    found = recognise(state)
    if found is None:
        rule = "is neither a consolidated state dict of lcl_mcore nor a ViT of timm, open_clip or transformers"
        raise CheckpointError(explain(files[0], rule, "See docs/export.md for what can be read."))
    check_stated(files[0].parent, shape)
    return from_format(state, shape, *found), found[0].format


def check_stated(folder: Path, shape: VisionConfig) -> None:
    """Refuse weights whose `config.json` or `open_clip_config.json` states what this encoder does otherwise.

    Raises:
        CheckpointError: another activation or another epsilon of the norms.
    """
    for name in ("config.json", "open_clip_config.json"):
        path = folder / name
        stated: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        vision = stated.get("vision_config", stated)
        quick = "quickgelu" in str(stated.get("architecture", ""))
        quick = quick or stated.get("model_cfg", {}).get("quick_gelu")
        activation = "quick_gelu" if quick else vision.get("hidden_act", "gelu")
        epsilon = vision.get("layer_norm_eps", shape.norm_eps)
        for value, ours, what in (
            (activation, "gelu", "activation"),
            (epsilon, shape.norm_eps, "epsilon of the norms"),
        ):
            if value != ours:
                rule = f"this encoder has {ours}"
                raise CheckpointError(explain(f"{path}: {what} {value}", rule, OTHER_SHAPE))


@torch.no_grad()
def load_encoder(model: nn.Module, state: Mapping[str, Tensor], tp_rank: int, tp_size: int) -> None:
    """Copy this tensor-parallel rank's share of an encoder state dict into the `vision.*` parameters of a model."""
    for name, parameter in model.named_parameters():
        if name.startswith("vision."):
            parameter.copy_(tensor_parallel_share(state[name], parameter, tp_rank, tp_size))
