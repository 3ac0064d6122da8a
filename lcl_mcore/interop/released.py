"""Checkpoints of the released LCL code (OpenGVLab/LCL, a fork of OpenCLIP), to and from our names.

A "full state" maps every parameter name of `LclModel` to its whole tensor, as one tensor-parallel rank
holds it, with the vocabulary unpadded. It is what `load_full_state` slices for any layout and what the
file `model.safetensors` holds. megatron keeps a layer's query, key and value rows together head by head;
the released code stacks all queries, then all keys, then all values.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcl_mcore.config.base import require, to_dict
from lcl_mcore.config.model import LanguageConfig, ModelConfig, VisionConfig
from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.models.lcl import LclModel

FILE = "model.safetensors"
_FORMAT = "lcl_mcore full state 1"
_HEAD_WIDTH = 64  # channels per head in every tower of the released configurations
_VOCABULARY = ("language.token_embedding.weight", "language.head")

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


def full_shapes(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a full state of the released architecture."""
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


def _misfit(what: str, problems: list[str], remedy: str) -> CheckpointError:
    more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
    shown = "\n  ".join(problems[:20] + more)
    return CheckpointError(explain(what, f"does not fit this model:\n  {shown}\n", remedy))


def from_released(state: Mapping[str, Tensor], shape: ModelConfig) -> dict[str, Tensor]:
    """Full state of a released state dict.

    Raises:
        CheckpointError: keys are missing or left over, or a tensor has another shape.
    """
    _require_released(shape)
    pairs, sizes = list(_pairs(shape)), full_shapes(shape)
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
        raise _misfit("released checkpoint", problems, "Give the configuration it was trained with.")
    return result


def to_released(state: Mapping[str, Tensor], shape: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `from_released`; padding rows of the vocabulary are cut off."""
    _require_released(shape)
    result = {}
    for ours, theirs, kind in _pairs(shape):
        tensor = state[ours]
        if ours in _VOCABULARY:
            tensor = tensor[: shape.language.vocab_size]
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
    """State dict of a checkpoint file of the released code; nothing but plain data is unpickled.

    Raises:
        CheckpointError: unreadable, damaged, or not a state dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(explain(path, "there is no such file", "Check the path.")) from None
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
        for wrapper in ("module.", "_orig_mod."):
            key = str(key).removeprefix(wrapper)
        cleaned[key] = value
    return cleaned


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


@torch.no_grad()
def load_full_state(model: LclModel, state: Mapping[str, Tensor], tp_rank: int, tp_size: int) -> None:
    """Copy this rank's share of a full state into an `LclModel`, whole or one stage of a pipeline.

    Padding rows of the vocabulary become zero. Call it before the optimizer copies its master weights.

    Raises:
        CheckpointError: names or shapes differ; the model is then unchanged.
    """
    parameters = {model.canonical_name(name): p for name, p in model.named_parameters()}
    problems = [f"missing: {name}" for name in parameters if name not in state]
    if model.stage.count == 1:  # a stage of a pipeline leaves the rest to the others
        problems += [f"unexpected: {name}" for name in sorted(set(state) - set(parameters))]
    shares = {}
    for name, parameter in parameters.items():
        if name not in state:
            continue
        full, size = state[name], list(parameter.shape)
        axis = getattr(parameter, "partition_dim", 0)
        split = bool(getattr(parameter, "tensor_model_parallel", False)) and tp_size > 1
        if split:
            size[axis] *= tp_size
        if name in _VOCABULARY and full.shape[0] < size[0]:
            full = torch.cat((full, full.new_zeros(size[0] - full.shape[0], *full.shape[1:])))
        if list(full.shape) != size:
            problems.append(f"shape: {name} is {tuple(full.shape)}, the model has {tuple(size)}")
            continue
        shares[name] = full.chunk(tp_size, axis)[tp_rank] if split else full
    if problems:
        raise _misfit("weights file", problems, "Use the config.yaml beside it.")
    for name, share in shares.items():
        parameters[name].copy_(share)


def write_full_state(state: Mapping[str, Tensor], shape: ModelConfig, folder: Path) -> Path:
    """Write FOLDER/model.safetensors, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / FILE, folder / (FILE + ".partial")
    metadata = {"format": _FORMAT, "model": json.dumps(to_dict(shape))}
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial, metadata)
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            explain(path, f"cannot be written ({error})", "Free or enlarge the disk.")
        ) from None
    return path


def read_full_state(path: Path) -> dict[str, Tensor]:
    """Full state from `model.safetensors`, or from the folder that holds it.

    Raises:
        CheckpointError: missing, damaged, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    file = path / FILE if path.is_dir() else path
    try:
        with safe_open(file, "pt") as opened:
            metadata: dict[str, Any] = opened.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(
                    explain(
                        file, f"was not written as `{_FORMAT}`", "Use tools/import_released.py to make one."
                    )
                )
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            explain(file, f"cannot be read ({error})", "Check the path, or make it again.")
        ) from None
