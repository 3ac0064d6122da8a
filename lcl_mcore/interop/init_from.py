"""`--init-from`: initial weights from a file, for the whole model or for its vision encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lcl_mcore.checkpoint.tensor_files import require_sound_safetensors
from lcl_mcore.checkpoint.weights_file import (
    is_consolidated,
    load_consolidated,
    read_consolidated,
    require_same_model,
    tensor_parallel_share,
)
from lcl_mcore.config.schema import VisionConfig
from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.interop.stated import require_same_function
from lcl_mcore.interop.vit_formats import fit_positions, from_format, recognise
from lcl_mcore.models.lcl import LclModel

POSITIONS = "vision.position_embedding"


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
    vision = model.shape.vision
    if is_consolidated(path):
        require_same_model(path, model.shape)
        whole = read_consolidated(path)
        done = ""
        if POSITIONS in whole:
            whole[POSITIONS], done = fit_positions(whole[POSITIONS], vision)
        load_consolidated(model, whole, tp_rank, tp_size)
        return f"{path}{done}"
    state, kind = read_encoder(path, vision)
    load_encoder(model, state, tp_rank, tp_size)
    return f"{path} (vision encoder only, {kind})"


def read_encoder(path: Path, shape: VisionConfig) -> tuple[dict[str, Tensor], str]:
    """Encoder state dict from a folder or `.safetensors` file of timm, open_clip or transformers.

    Returns:
        The state dict, and its format with what was changed on the way, for the log.

    Raises:
        CheckpointError: unreadable, of no known format, or it does not fit `shape`.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        rule = f"holds {len(files)} safetensors files where one is needed"
        raise CheckpointError(explain(path, rule, "Give the file itself."))
    require_sound_safetensors(files[0])
    try:
        state = load_file(files[0])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(explain(files[0], f"cannot be read ({error})", "Check the path.")) from None
    found = recognise(state)
    if found is None:
        rule = "is neither a consolidated state dict of lcl_mcore nor a ViT of timm, open_clip or transformers"
        raise CheckpointError(explain(files[0], rule, "See docs/export.md for what can be read."))
    naming, prefix = found
    pixels = require_same_function(files[0], naming, shape)
    encoder, done = from_format(state, shape, naming, prefix, pixels)
    unknown = "; pixel statistics not stated, taken to be CLIP's" if pixels is None else ""
    return encoder, naming.format + done + unknown


@torch.no_grad()
def load_encoder(model: nn.Module, state: Mapping[str, Tensor], tp_rank: int, tp_size: int) -> None:
    """Copy this tensor-parallel rank's share of an encoder state dict into the `vision.*` parameters of a model."""
    for name, parameter in model.named_parameters():
        if name.startswith("vision."):
            parameter.copy_(tensor_parallel_share(state[name], parameter, tp_rank, tp_size))
