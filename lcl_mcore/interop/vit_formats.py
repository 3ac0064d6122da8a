"""The vision encoder under the names of timm, open_clip and transformers, to and from ours.

An encoder state dict is the `vision.*` part of a consolidated one (`checkpoint.weights_file`), in fp32. Nothing here
needs those packages. What a format lacks is folded into what it has, exactly: layer scale into the branch's last
matrix, a patch bias into the positions, other pixel statistics into the patches.

Shape legend
    h  width;  p  patch side;  T  tokens (patches, and the class token in front)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lcl_mcore.checkpoint.weights_file import misfit
from lcl_mcore.config.schema import VisionConfig
from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.models.vision import PIXEL_MEAN, PIXEL_STD

OTHER_SHAPE = "Choose a model of the same shape, or set model.vision.* to fit it."
Pixels = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of red, green and blue in [0, 1] that pixels are normalised with."""


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


def interpolate_positions(positions: Tensor, grid: int, antialias: bool = True) -> Tensor:
    """Positions of `grid` x `grid` patches, bicubic, from those of another square.

    Args:
        positions: [T, h]; what is more than a square, the class token's, is kept.
        antialias: as timm and open_clip do, and this package; transformers' own models do not.
    """
    leading = _class_positions(len(positions))
    if (old := math.isqrt(len(positions) - leading)) == grid:
        return positions
    square = positions[leading:].float().unflatten(0, (old, old)).permute(2, 0, 1)[None]  # [1, h, rows, columns]
    square = F.interpolate(square, (grid, grid), mode="bicubic", antialias=antialias, align_corners=False)
    return torch.cat((positions[:leading], square[0].permute(1, 2, 0).flatten(0, 1)))


def _class_positions(tokens: int) -> int:
    """0 for the positions of a square of patches, 1 for a class token's before them."""
    return int(math.isqrt(tokens) ** 2 != tokens)


def fit_positions(positions: Tensor, shape: VisionConfig) -> tuple[Tensor, str]:
    """Positions for an encoder's image size, and what was done, for the log.

    Raises:
        CheckpointError: they are not those of a square of patches.
    """
    patches = len(positions) - _class_positions(len(positions))
    old, new = math.isqrt(patches), shape.image_size // shape.patch_size
    if old**2 != patches:
        rule = "are not those of a square of patches with at most a class token"
        raise CheckpointError(explain(f"{len(positions)} positions", rule, OTHER_SHAPE))
    done = f"; positions interpolated from {old} x {old} to {new} x {new} patches" if old != new else ""
    return interpolate_positions(positions, new), done


def _fold_pixels(patches: Tensor, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Patch weights [h, 3, p, p] for this package's pixels, and a bias [h], of weights for other pixels."""
    (mean, std), ours = torch.tensor(pixels, dtype=torch.float64), torch.tensor((PIXEL_MEAN, PIXEL_STD)).double()
    bias = torch.einsum("hcij,c->h", patches.double(), (ours[0] - mean) / std)
    return (patches.double() * (ours[1] / std)[:, None, None]).float(), bias.float()


# Beside the trunk: heads, projections, pools, and tensors that training alone uses.
_NO_TRUNK = re.compile(r"(head|fc_norm|attn_pool|proj|pooler|classifier|embeddings\.(position_ids|mask_token))\b")


def from_format(
    state: Mapping[str, Tensor], shape: VisionConfig, naming: Naming, prefix: str, pixels: Pixels | None = None
) -> tuple[dict[str, Tensor], str]:
    """Encoder state dict of a file's tensors; heads, projections and text towers in the file are ignored.

    Args:
        pixels: statistics that the file's model normalises pixels with; None: this package's.

    Returns:
        The state dict, and what was changed on the way, for the log.

    Raises:
        CheckpointError: tensors are missing or have another shape, or the file has parts this model lacks.
    """
    h, p, layers, problems = shape.width, shape.patch_size, shape.layers, list[str]()
    used = set[str]()

    def take(name: str, *size: int) -> Tensor:
        key = prefix + name
        if key not in state:
            problems.append(f"missing: {key}")
            return torch.zeros(size)
        used.add(key)
        tensor = state[key].detach().float()
        if tensor.numel() != torch.Size(size).numel() or (len(size) > 1 and tensor.shape[-1] != size[-1]):
            problems.append(f"shape: {key} is {tuple(tensor.shape)}, the model has {size}")
            return torch.zeros(size)
        return tensor.reshape(size)

    stored = state.get(f"{prefix}{naming.patches}.weight")
    if stored is not None and stored.dim() == 4 and stored.shape[-1] != p:
        rule = f"this encoder has {p}, and patches are not resized, only positions"
        remedy = f"Set model.vision.patch_size={stored.shape[-1]}, or choose another model."
        raise CheckpointError(explain(f"patch size {stored.shape[-1]} of the {naming.format} weights", rule, remedy))
    patches, done = take(f"{naming.patches}.weight", h, 3, p, p), ""
    bias = take(f"{naming.patches}.bias", h) if f"{prefix}{naming.patches}.bias" in state else torch.zeros(h)
    if pixels not in (None, (PIXEL_MEAN, PIXEL_STD)):
        patches, shift = _fold_pixels(patches, pixels)
        bias, done = bias + shift, f"; pixels of mean {pixels[0]} and deviation {pixels[1]} folded into the patches"
    result = {"vision.patch_embedding": patches.reshape(h, -1)}
    stored = state.get(prefix + naming.positions, torch.zeros(shape.tokens, h))
    same_width = stored.shape[-1] == h
    positions = take(naming.positions, stored.numel() // h if same_width else shape.tokens, h)
    positions, interpolated = fit_positions(positions, shape)
    if len(positions) == shape.patches:
        positions = torch.cat((torch.zeros(shape.tokens - shape.patches, h), positions))  # a class token without one
    if bias.any():
        positions = torch.cat((positions[: -shape.patches], positions[-shape.patches :] + bias))
    result["vision.position_embedding"] = positions
    if shape.class_token:
        result["vision.class_token"] = take(naming.class_token or "(no class token)", h)
    sizes = {"linear_proj": (h, h), "linear_fc1": (shape.mlp_width, h), "linear_fc2": (h, shape.mlp_width)}
    modules = [("vision.norm_post", naming.norm_post)]
    if shape.pre_norm:
        modules.append(("vision.norm_pre", naming.norm_pre or "(no norm before the blocks)"))
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
            gamma = take(theirs, h) if theirs and prefix + theirs in state else None
            if shape.layer_scale is not None:
                result[ours] = torch.ones(h) if gamma is None else gamma
            elif gamma is not None:
                result[f"{last}.weight"] = result[f"{last}.weight"] * gamma[:, None]
                result[f"{last}.bias"] = result[f"{last}.bias"] * gamma
    trunk = (key for key in state if key.startswith(prefix) and not _NO_TRUNK.match(key, len(prefix)))
    problems += [f"unexpected: {key}" for key in sorted(trunk) if key not in used]
    if problems:
        raise misfit(f"{naming.format} weights", problems, OTHER_SHAPE)
    return result, interpolated + done
