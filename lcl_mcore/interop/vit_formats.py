"""The vision encoder under the names of timm, open_clip and transformers, to and from ours.

An encoder state dict is the `vision.*` part of a consolidated one (`checkpoint.weights_file`), in fp32. Nothing here
needs those packages. What a format lacks is folded into what it has, exactly: layer scale into the branch's last
matrix, a patch bias into the positions.

Shape legend
    h  width;  p  patch side;  T  tokens (patches, and the class token in front)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lcl_mcore.checkpoint.weights_file import misfit
from lcl_mcore.config.schema import VisionConfig

OTHER_SHAPE = "Choose a model of the same shape, or set model.vision.* to fit it."


@dataclass(frozen=True)
class Naming:
    """Where a format keeps the tensors of a ViT.

    Names of a block's tensors hold `{i}`; an empty name says that the format has no such tensor.

    Attributes:
        format: for messages.
        marker: a key that only this format has.
        prefixes: what may stand before every name in a file; the first one is written.
        qkv: stacked query, key and value, or each of them; holds `{leaf}` (weight, bias).
        layer_scales: of the attention and of the MLP branch.
        leading: axes of size one in front of class token [h] and positions [T, h].
    """

    format: str
    marker: str
    prefixes: tuple[str, ...]
    class_token: str
    positions: str
    patches: str
    norm_pre: str
    norm_post: str
    qkv: tuple[str, ...]
    out: str
    norms: tuple[str, str]
    mlp: tuple[str, str]
    layer_scales: tuple[str, str] = ("", "")
    leading: int = 0


TIMM = Naming(
    "timm",
    "blocks.0.attn.qkv.weight",
    ("", "timm_model."),
    "cls_token",
    "pos_embed",
    "patch_embed.proj",
    "norm_pre",
    "norm",
    ("blocks.{i}.attn.qkv.{leaf}",),
    "blocks.{i}.attn.proj",
    ("blocks.{i}.norm1", "blocks.{i}.norm2"),
    ("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc2"),
    ("blocks.{i}.ls1.gamma", "blocks.{i}.ls2.gamma"),
    leading=1,
)
_RES = "transformer.resblocks.{i}"
OPEN_CLIP = Naming(
    "open_clip",
    "transformer.resblocks.0.attn.in_proj_weight",
    ("", "visual."),
    "class_embedding",
    "positional_embedding",
    "conv1",
    "ln_pre",
    "ln_post",
    (_RES + ".attn.in_proj_{leaf}",),
    _RES + ".attn.out_proj",
    (_RES + ".ln_1", _RES + ".ln_2"),
    (_RES + ".mlp.c_fc", _RES + ".mlp.c_proj"),
    (_RES + ".ls_1.gamma", _RES + ".ls_2.gamma"),
)
_HF = "encoder.layers.{i}"
_CLIP_LAYER = (
    tuple(f"{_HF}.self_attn.{x}_proj.{{leaf}}" for x in "qkv"),
    _HF + ".self_attn.out_proj",
    (_HF + ".layer_norm1", _HF + ".layer_norm2"),
    (_HF + ".mlp.fc1", _HF + ".mlp.fc2"),
)
CLIP_VISION = Naming(
    "transformers CLIPVisionModel",
    "pre_layrnorm.weight",
    ("vision_model.", ""),
    "embeddings.class_embedding",
    "embeddings.position_embedding.weight",
    "embeddings.patch_embedding",
    "pre_layrnorm",
    "post_layernorm",
    *_CLIP_LAYER,
)
SIGLIP_VISION = Naming(
    "transformers SiglipVisionModel",
    "embeddings.patch_embedding.bias",
    ("vision_model.", ""),
    "",
    "embeddings.position_embedding.weight",
    "embeddings.patch_embedding",
    "",
    "post_layernorm",
    *_CLIP_LAYER,
)
_VIT = "encoder.layer.{i}"
VIT = Naming(
    "transformers ViTModel",
    "encoder.layer.0.attention.attention.query.weight",
    ("", "vit."),
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection",
    "",
    "layernorm",
    tuple(f"{_VIT}.attention.attention.{x}.{{leaf}}" for x in ("query", "key", "value")),
    _VIT + ".attention.output.dense",
    (_VIT + ".layernorm_before", _VIT + ".layernorm_after"),
    (_VIT + ".intermediate.dense", _VIT + ".output.dense"),
    leading=1,
)
NAMINGS = (TIMM, OPEN_CLIP, CLIP_VISION, SIGLIP_VISION, VIT)


def _modules(naming: Naming, i: int) -> Iterator[tuple[str, str]]:
    """(our module, their module) of a block, except query, key and value."""
    block = f"vision.blocks.layers.{i}"
    yield f"{block}.input_layernorm", naming.norms[0].format(i=i)
    yield f"{block}.pre_mlp_layernorm", naming.norms[1].format(i=i)
    yield f"{block}.self_attention.linear_proj", naming.out.format(i=i)
    yield f"{block}.mlp.linear_fc1", naming.mlp[0].format(i=i)
    yield f"{block}.mlp.linear_fc2", naming.mlp[1].format(i=i)


def _branches(naming: Naming, i: int) -> tuple[tuple[str, str, str], ...]:
    """(our layer scale, theirs, our last module of the branch) of a block's two branches."""
    block = f"vision.blocks.layers.{i}"
    attention, mlp = (name.format(i=i) for name in naming.layer_scales)
    return (
        (f"{block}.self_attn_bda.gamma", attention, f"{block}.self_attention.linear_proj"),
        (f"{block}.mlp_bda.gamma", mlp, f"{block}.mlp.linear_fc2"),
    )


def to_format(state: Mapping[str, Tensor], shape: VisionConfig, naming: Naming) -> dict[str, Tensor]:
    """Encoder state dict under the names of a format, which must be able to hold the shape."""
    h, p = shape.width, shape.patch_size
    source = {name: tensor.detach().float() for name, tensor in state.items()}
    lead = (1,) * naming.leading
    result = {
        f"{naming.patches}.weight": source["vision.patch_embedding"].reshape(h, 3, p, p),
        naming.positions: source["vision.position_embedding"].reshape(*lead, shape.tokens, h),
    }
    if not shape.pre_norm and naming is not OPEN_CLIP:  # these formats then have a bias there
        result[f"{naming.patches}.bias"] = torch.zeros(h)
    if shape.class_token:
        result[naming.class_token] = source["vision.class_token"].reshape(*lead, *lead, h)
    modules = [("vision.norm_post", naming.norm_post)]
    if shape.pre_norm:
        modules.append(("vision.norm_pre", naming.norm_pre))
    for i in range(shape.layers):
        for ours, theirs, last in _branches(naming, i) if shape.layer_scale is not None else ():
            if theirs:
                result[theirs] = source[ours]
            else:
                source[f"{last}.weight"] = source[f"{last}.weight"] * source[ours][:, None]
                source[f"{last}.bias"] = source[f"{last}.bias"] * source[ours]
        for leaf in ("weight", "bias"):
            ours = f"vision.blocks.layers.{i}.self_attention.linear_qkv.{leaf}"
            # [heads, (q, k, v), h / heads, ...] -> [(q, k, v), h, ...]
            stacked = source[ours].unflatten(0, (shape.heads, 3, -1)).transpose(0, 1).flatten(1, 2)
            names = [name.format(i=i, leaf=leaf) for name in naming.qkv]
            tensors = stacked.unbind(0) if len(names) == 3 else (stacked.flatten(0, 1),)
            result |= dict(zip(names, tensors, strict=True))
        modules += _modules(naming, i)
    for ours, theirs in modules:
        for leaf in ("weight", "bias"):
            result[f"{theirs}.{leaf}"] = source[f"{ours}.{leaf}"]
    return {name: tensor.contiguous() for name, tensor in result.items()}


def recognise(state: Mapping[str, Tensor]) -> tuple[Naming, str] | None:
    """The format of a file's tensors and the prefix before their names; None for an unknown format."""
    for naming in NAMINGS:
        for prefix in sorted(naming.prefixes, key=len, reverse=True):
            if prefix + naming.marker in state:
                return naming, prefix
    return None


def from_format(state: Mapping[str, Tensor], shape: VisionConfig, naming: Naming, prefix: str) -> dict[str, Tensor]:
    """Encoder state dict of a file's tensors; heads, projections and text towers in the file are ignored.

    Raises:
        CheckpointError: tensors are missing or have another shape, or the file has parts this model lacks.
    """
    h, layers, problems = shape.width, shape.layers, list[str]()

    def take(name: str, *size: int) -> Tensor:
        key = prefix + name
        if key not in state:
            problems.append(f"missing: {key}")
            return torch.zeros(size)
        tensor = state[key].detach().float()
        if tensor.numel() != torch.Size(size).numel() or (len(size) > 1 and tensor.shape[-1] != size[-1]):
            problems.append(f"shape: {key} is {tuple(tensor.shape)}, the model has {size}")
            return torch.zeros(size)
        return tensor.reshape(size)

    result = {"vision.patch_embedding": take(f"{naming.patches}.weight", h, 3, shape.patch_size, shape.patch_size)}
    result["vision.patch_embedding"] = result["vision.patch_embedding"].reshape(h, -1)
    stored = state.get(prefix + naming.positions, torch.zeros(0)).numel() // h
    if shape.class_token and stored == shape.patches:  # a class token without a position
        positions = torch.cat((torch.zeros(1, h), take(naming.positions, shape.patches, h)))
    else:
        positions = take(naming.positions, shape.tokens, h)
    if f"{prefix}{naming.patches}.bias" in state:
        positions = positions.clone()
        positions[shape.tokens - shape.patches :] += take(f"{naming.patches}.bias", h)
    result["vision.position_embedding"] = positions
    if shape.class_token:
        result["vision.class_token"] = take(naming.class_token or "(no class token)", h)
    elif naming.class_token and prefix + naming.class_token in state:
        problems.append(f"unexpected: {prefix}{naming.class_token}")
    sizes = {"linear_proj": (h, h), "linear_fc1": (shape.mlp_width, h), "linear_fc2": (h, shape.mlp_width)}
    modules = [("vision.norm_post", naming.norm_post)]
    if shape.pre_norm:
        modules.append(("vision.norm_pre", naming.norm_pre or "(no norm before the blocks)"))
    elif naming.norm_pre and f"{prefix}{naming.norm_pre}.weight" in state:
        problems.append(f"unexpected: {prefix}{naming.norm_pre}.weight")
    for i in range(layers):
        modules += _modules(naming, i)
        for leaf, columns in (("weight", (h,)), ("bias", ())):
            names = [name.format(i=i, leaf=leaf) for name in naming.qkv]
            rows = torch.cat([take(name, 3 * h // len(names), *columns) for name in names])
            split = rows.unflatten(0, (3, shape.heads, -1)).transpose(0, 1)
            result[f"vision.blocks.layers.{i}.self_attention.linear_qkv.{leaf}"] = split.reshape(rows.shape)
    for ours, theirs in modules:
        size = sizes.get(ours.rpartition(".")[2], (h,))
        result[f"{ours}.weight"] = take(f"{theirs}.weight", *size)
        result[f"{ours}.bias"] = take(f"{theirs}.bias", size[0])
    for i in range(layers):
        for ours, theirs, last in _branches(naming, i):
            gamma = take(theirs, h) if theirs and prefix + theirs in state else torch.ones(h)
            if shape.layer_scale is not None:
                result[ours] = gamma
            else:
                result[f"{last}.weight"] = result[f"{last}.weight"] * gamma[:, None]
                result[f"{last}.bias"] = result[f"{last}.bias"] * gamma
    more = re.compile(re.escape(prefix) + naming.norms[0].replace("{i}", r"(\d+)").replace(".", r"\."))
    found = {int(match[1]) for key in state if (match := more.match(key))}
    if len(found) > layers:
        problems.append(f"unexpected: {len(found)} blocks, the model has {layers}")
    if problems:
        raise misfit(f"{naming.format} weights", problems, OTHER_SHAPE)
    return result
