"""Checkpoints of the released LCL code (OpenGVLab/LCL, a fork of OpenCLIP), to and from our names.

Our side is a consolidated state dict (`checkpoint.weights_file`). megatron keeps a layer's query, key and value rows
together head by head; the released code stacks all queries, then all keys, then all values.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcl_mcore.checkpoint.tensor_files import require_sound_pt
from lcl_mcore.checkpoint.weights_file import misfit, without_vocabulary_padding
from lcl_mcore.config.base import require
from lcl_mcore.config.schema import LanguageConfig, ModelConfig, VisionConfig
from lcl_mcore.errors import CheckpointError, explain

_HEAD_WIDTH = 64  # channels per head in every tower of the released configurations

_LAYER = (
    ("input_layernorm", "ln_1"),
    ("self_attention.linear_proj", "attn.out_proj"),
    ("pre_mlp_layernorm", "ln_2"),
    ("mlp.linear_fc1", "mlp.c_fc"),
    ("mlp.linear_fc2", "mlp.c_proj"),
)
_POOLER = "pool_project.pooler"


def _pairs(shape: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """(our name, released name, what differs: "", "patches", "scalar", or the tower of stacked q, k, v)."""

    def both(ours: str, theirs: str) -> Iterator[tuple[str, str, str]]:
        for leaf in ("weight", "bias"):
            yield f"{ours}.{leaf}", f"{theirs}.{leaf}", ""

    yield "vision.patch_embedding", "visual.conv1.weight", "patches"
    yield "vision.class_token", "visual.class_embedding", ""
    yield "vision.position_embedding", "visual.positional_embedding", ""
    yield from both("vision.norm_pre", "visual.ln_pre")
    yield from both("vision.norm_post", "visual.ln_post")
    yield "pool.query", "pool_project.query_token", ""
    for x in "qkv":
        yield from both(f"pool.norm_{x}", f"{_POOLER}.norm1_{x}")
        yield f"pool.linear_{x}.weight", f"{_POOLER}.cross_attn.{x}.weight", ""
        yield f"pool.linear_{x}.bias", f"{_POOLER}.cross_attn.{x}_bias", ""
    yield "pool.linear_out.weight", f"{_POOLER}.cross_attn.proj.weight", ""
    yield "language.token_embedding.weight", "text.token_embedding.weight", ""
    yield "language.position_embedding", "text.positional_embedding", ""
    yield from both("language.norm_final", "text.ln_final")
    yield "language.context_projection", "text.text_projection", ""
    yield from both("language.norm_head", "lm_head.0")
    yield "language.head", "lm_head.1.weight", ""
    yield "temperature.log_scale", "logit_scale", "scalar"
    for ours, theirs, layers in (
        ("vision", "visual", shape.vision.layers),
        ("language", "text", shape.language.layers),
    ):
        for i in range(layers):
            block, resblock = f"{ours}.blocks.layers.{i}", f"{theirs}.transformer.resblocks.{i}"
            for leaf in ("weight", "bias"):
                qkv = f"{block}.self_attention.linear_qkv.{leaf}"
                yield qkv, f"{resblock}.attn.in_proj_{leaf}", ours
            for name, released in _LAYER:
                yield from both(f"{block}.{name}", f"{resblock}.{released}")


def consolidated_shapes(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a consolidated state dict of the released architecture."""
    vision, language = shape.vision, shape.language
    h, d, v = vision.width, language.width, language.vocab_size
    sizes: dict[str, tuple[int, ...]] = {
        "vision.patch_embedding": (h, 3 * vision.patch_size**2),
        "vision.position_embedding": (vision.tokens, h),
        "pool.query": (1, 1, h),
        "pool.linear_out.weight": (d, d),
        "language.token_embedding.weight": (v, d),
        "language.head": (v, d),
        "language.position_embedding": (language.max_positions, d),
        "language.context_projection": (d, d),
        "temperature.log_scale": (1,),
    }
    for ours, _, _ in _pairs(shape):
        tower = vision if ours.startswith(("vision", "pool")) else language
        w, m, bias = tower.width, tower.mlp_width, ours.endswith("bias")
        if ours in sizes:
            continue
        if ours.startswith("pool.linear"):
            sizes[ours] = (d,) if bias else (d, h)
        elif "linear_qkv" in ours:
            sizes[ours] = (3 * w,) if bias else (3 * w, w)
        elif "linear_fc1" in ours:
            sizes[ours] = (m,) if bias else (m, w)
        elif "linear_fc2" in ours:
            sizes[ours] = (w,) if bias else (w, m)
        elif "linear_proj" in ours:
            sizes[ours] = (w,) if bias else (w, w)
        else:  # norms and the class token
            sizes[ours] = (w,)
    return sizes


def _require_released(shape: ModelConfig) -> None:
    vision, language = shape.vision, shape.language
    differences = [
        name
        for name, differs in (
            ("vision.class_token = False", not vision.class_token),
            ("vision.pre_norm = False", not vision.pre_norm),
            ("vision.layer_scale", vision.layer_scale is not None),
            ("language.tied_head = True", language.tied_head),
            ("language.separate_norms = False", not language.separate_norms),
            ("language.activation = relu", language.activation != "gelu"),
            ("language.position_offset", language.position_offset != 0),
        )
        if differs
    ]
    require(
        not differences,
        ", ".join(differences),
        "the released code has no such model",
        "Only models shaped like the released-* recipes can be exchanged with it.",
    )


def _heads(shape: ModelConfig, tower: str) -> int:
    return shape.vision.heads if tower == "vision" else shape.language.heads


def from_released(state: Mapping[str, Tensor], shape: ModelConfig) -> dict[str, Tensor]:
    """Consolidated state dict of a released state dict.

    Raises:
        CheckpointError: keys are missing or unexpected, or a tensor has another shape.
    """
    _require_released(shape)
    pairs, sizes = list(_pairs(shape)), consolidated_shapes(shape)
    problems = [f"missing: {theirs}" for _, theirs, _ in pairs if theirs not in state]
    problems += [f"unexpected: {key}" for key in sorted(set(state) - {theirs for _, theirs, _ in pairs})]
    result = {}
    for ours, theirs, kind in pairs:
        if theirs not in state:
            continue
        tensor, size = state[theirs], sizes[ours]
        given = tuple(tensor.shape)
        expected = {"patches": (size[0], 3, shape.vision.patch_size, shape.vision.patch_size), "scalar": ()}
        if given != expected.get(kind, size):
            problems.append(f"shape: {theirs} is {given}, the model has {expected.get(kind, size)}")
        elif kind in ("vision", "language"):
            split = tensor.unflatten(0, (3, _heads(shape, kind), -1))
            result[ours] = split.transpose(0, 1).reshape(size)
        else:
            result[ours] = tensor.reshape(size)
    if problems:
        raise misfit("released weights", problems, "Give the configuration it was trained with.")
    return result


def to_released(state: Mapping[str, Tensor], shape: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `from_released`; padding rows of the vocabulary are cut off."""
    _require_released(shape)
    state = without_vocabulary_padding(state, shape.language.vocab_size)
    result = {}
    for ours, theirs, kind in _pairs(shape):
        tensor = state[ours]
        if kind == "patches":
            side = shape.vision.patch_size
            tensor = tensor.reshape(-1, 3, side, side)
        elif kind == "scalar":
            tensor = tensor.reshape(())
        elif kind in ("vision", "language"):
            split = tensor.unflatten(0, (_heads(shape, kind), 3, -1))
            tensor = split.transpose(0, 1).reshape(tensor.shape)
        result[theirs] = tensor.contiguous()
    return result


def read_released(path: Path) -> dict[str, Tensor]:
    """State dict, in fp32, of a checkpoint file of the released code; nothing but plain data is unpickled.

    Raises:
        CheckpointError: unreadable, damaged, or not a state dict.
    """
    require_sound_pt(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        rule = f"cannot be loaded as plain tensors ({reason})"
        remedy = "Download it again, and check that it is a released `.pt` file."
        raise CheckpointError(explain(path, rule, remedy)) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        remedy = "Give a checkpoint that the released training code wrote."
        raise CheckpointError(explain(path, "does not hold a state dict of tensors", remedy))
    cleaned = {}
    for key, value in state.items():
        _require_plain(f"{path}: {str(key)[:200]}", value)
        for wrapper in ("module.", "_orig_mod."):
            key = str(key).removeprefix(wrapper)
        cleaned[key] = value.float()
    return cleaned


def _require_plain(name: str, value: Tensor) -> None:
    """A tensor that holds all its numbers: no view of one number as a billion, nothing without content."""
    remedy = "Give a checkpoint that the released training code wrote."
    if value.layout != torch.strided or value.is_meta or not value.is_floating_point():
        rule = f"is no plain tensor of numbers ({value.layout}, {value.dtype}, {value.device})"
        raise CheckpointError(explain(name, rule, remedy))
    if value.nbytes > value.untyped_storage().nbytes():
        rule = f"has {value.nbytes} bytes, of which {value.untyped_storage().nbytes()} are stored"
        raise CheckpointError(explain(name, rule, remedy))


def shape_of_released(state: Mapping[str, Tensor]) -> ModelConfig:
    """The model that a released state dict belongs to, read off its tensors; heads have 64 channels.

    Raises:
        CheckpointError: tensors that tell the shape are missing.
    """

    def size(key: str, axes: int) -> tuple[int, ...]:
        if key not in state or state[key].dim() != axes:
            remedy = "Give a checkpoint of an LCL model, not of another OpenCLIP model."
            raise CheckpointError(explain("released checkpoint", f"has no `{key}` of {axes} axes", remedy))
        return tuple(state[key].shape)

    def layers(tower: str) -> int:
        prefix = f"{tower}.transformer.resblocks."
        return len({key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)})

    width, _, patch, _ = size("visual.conv1.weight", 4)
    grid = math.isqrt(size("visual.positional_embedding", 2)[0] - 1)
    vocabulary, d = size("text.token_embedding.weight", 2)
    vision = VisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        layers=layers("visual"),
        heads=max(width // _HEAD_WIDTH, 1),
        mlp_width=size("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
    )
    language = LanguageConfig(
        vocab_size=vocabulary,
        width=d,
        layers=layers("text"),
        heads=max(d // _HEAD_WIDTH, 1),
        mlp_width=size("text.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        activation="gelu",
        max_positions=size("text.positional_embedding", 2)[0],
        position_offset=0,
        tied_head=False,
        separate_norms=True,
        init="clip_text",
    )
    return ModelConfig(vision=vision, language=language, pool_heads=max(d // _HEAD_WIDTH, 1))
