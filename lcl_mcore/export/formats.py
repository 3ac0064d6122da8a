"""Writes an encoder for each package, and reads it back through that package alone.

Every `write_*` fills a folder; every `features_*` loads that folder the plain way of its package, without a network,
prepares images as the package does, and returns the encoder's output: patch tokens after the last norm, without class
token. Images of another side than the encoder's are given the plain way, too.

Shape legend
    n  images;  S  side in pixels;  P  patches;  h  width
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lcl_mcore.config.schema import VisionConfig
from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.interop.vit_formats import CLIP_VISION, OPEN_CLIP, SIGLIP_VISION, TIMM, VIT, Naming, to_format
from lcl_mcore.models.vision import PIXEL_MEAN, PIXEL_STD

ARCHITECTURE = "vit_base_patch16_clip_224"  # timm's ViT with epsilon 1e-5; every size is overridden
TIMM_EPS = 1e-5


@dataclass(frozen=True)
class ExportFormat:
    """How one package gets the encoder.

    Attributes:
        refuses: why it cannot hold a shape exactly; None if it can.
        write: encoder state dict, shape, folder.
        features: shape, folder, uint8 images [n, 3, S, S] of any side S -> fp32 [n, P, h].
        usage: lines of Python for the model card; FOLDER stands for the folder.
        antialias: whether it interpolates a shape's positions with antialiasing.
    """

    refuses: Callable[[VisionConfig], str | None]
    write: Callable[[Mapping[str, Tensor], VisionConfig, Path], None]
    features: Callable[[VisionConfig, Path, Tensor], Tensor]
    usage: Callable[[VisionConfig], str]
    antialias: Callable[[VisionConfig], bool]


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    save_file(dict(state), path, {"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _pil(images: Tensor) -> list[Image.Image]:
    """uint8 [n, 3, S, S] as a package's users have them."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def _ratio(shape: VisionConfig) -> float:
    """MLP width over width, such that the packages' `int(width * ratio)` is the MLP width."""
    ratio = shape.mlp_width / shape.width
    return ratio if int(shape.width * ratio) == shape.mlp_width else (shape.mlp_width + 0.5) / shape.width


# --- timm


def _timm_config(shape: VisionConfig) -> dict[str, Any]:
    side = shape.image_size
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": shape.width,
        "global_pool": "avg",
        "model_args": {
            "img_size": side,
            "patch_size": shape.patch_size,
            "embed_dim": shape.width,
            "depth": shape.layers,
            "num_heads": shape.heads,
            "mlp_ratio": _ratio(shape),
            "class_token": shape.class_token,
            "pre_norm": shape.pre_norm,
            "init_values": shape.layer_scale,
            "global_pool": "avg",
            "fc_norm": False,
            "dynamic_img_size": True,
        },
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(PIXEL_MEAN),
            "std": list(PIXEL_STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _timm_refuses(shape: VisionConfig) -> str | None:
    if shape.norm_eps != TIMM_EPS:
        return f"its configuration files cannot state an epsilon of {shape.norm_eps}, only {TIMM_EPS}"
    return None


def _write_timm(state: Mapping[str, Tensor], shape: VisionConfig, folder: Path) -> None:
    _save(to_format(state, shape, TIMM), folder / "model.safetensors")
    _write_json(folder / "config.json", _timm_config(shape))


def _features_timm(shape: VisionConfig, folder: Path, images: Tensor) -> Tensor:
    import timm

    side = images.shape[-1]
    other: dict[str, Any] = {"img_size": side} if side != shape.image_size else {}
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, **other).eval()
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model, other))
    pixels = torch.stack([transform(image) for image in _pil(images)])
    return model.forward_features(pixels)[:, shape.tokens - shape.patches :]


def _use_timm(shape: VisionConfig) -> str:
    return (
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # img_size=SIDE for another size\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "pixels = torch.stack([transform(image) for image in images])\n"
        f"tokens = model.forward_features(pixels)[:, {shape.tokens - shape.patches}:]\n"
        "mean = model(pixels)"
    )


# --- open_clip


def _open_clip_config(shape: VisionConfig) -> dict[str, Any]:
    vision = {
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "width": shape.width,
        "layers": shape.layers,
        "head_width": shape.width // shape.heads,
        "mlp_ratio": _ratio(shape),
        "ls_init_value": shape.layer_scale,
        "no_ln_pre": not shape.pre_norm,
        "pool_type": "avg",
        "norm_kwargs": {"eps": shape.norm_eps},
    }
    return {
        "model_cfg": {"embed_dim": shape.width, "vision_cfg": vision, "text_cfg": _NO_TEXT},
        "preprocess_cfg": {
            "mean": list(PIXEL_MEAN),
            "std": list(PIXEL_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


_NO_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
"""open_clip always builds a text tower; this one is as small as can be, and zero: it says the same of all texts."""


def _no_text(embed_dim: int) -> dict[str, Tensor]:
    width = _NO_TEXT["width"]
    block = "transformer.resblocks.0."
    sizes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (_NO_TEXT["context_length"], width),
        "text_projection": (width, embed_dim),
        "token_embedding.weight": (_NO_TEXT["vocab_size"], width),
        "logit_scale": (),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        f"{block}attn.in_proj_weight": (3 * width, width),
        f"{block}attn.in_proj_bias": (3 * width,),
    }
    for name, (rows, columns) in {"attn.out_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}.items():
        sizes[f"{block}{name}.weight"] = (rows * width, columns * width)
        sizes[f"{block}{name}.bias"] = (rows * width,)
    for name in ("ln_1", "ln_2"):
        sizes |= {f"{block}{name}.{leaf}": (width,) for leaf in ("weight", "bias")}
    return {name: torch.zeros(size) for name, size in sizes.items()}


def _open_clip_refuses(shape: VisionConfig) -> str | None:
    return None if shape.class_token else "its ViT always has a class token, this encoder has none"


def _write_open_clip(state: Mapping[str, Tensor], shape: VisionConfig, folder: Path) -> None:
    tensors = to_format(state, shape, OPEN_CLIP)
    tensors["proj"] = torch.eye(shape.width)  # the tower always has one; this leaves the features alone
    visual = {f"visual.{name}": tensor for name, tensor in tensors.items()}
    _save(visual | _no_text(shape.width), folder / "open_clip_model.safetensors")
    _write_json(folder / "open_clip_config.json", _open_clip_config(shape))


def _features_open_clip(shape: VisionConfig, folder: Path, images: Tensor) -> Tensor:
    import open_clip

    side = images.shape[-1]
    other = {"force_image_size": side} if side != shape.image_size else {}
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", **other)
    model.eval().visual.output_tokens = True
    return model.visual(torch.stack([transform(image) for image in _pil(images)]))[1]


def _use_open_clip(shape: VisionConfig) -> str:
    return (
        'model, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
        "# force_image_size=SIDE for another size\n"
        "pixels = torch.stack([transform(image) for image in images])\n"
        "model.eval().visual.output_tokens = True\n"
        "mean, tokens = model.visual(pixels)  # the text tower is a placeholder of zeros: bring your own"
    )


# --- transformers


def _transformers_naming(shape: VisionConfig) -> Naming:
    if shape.class_token:
        return CLIP_VISION if shape.pre_norm else VIT
    return TIMM if shape.pre_norm else SIGLIP_VISION


_CLASSES = {
    CLIP_VISION.format: "CLIPVisionModel",
    VIT.format: "ViTModel",
    SIGLIP_VISION.format: "SiglipVisionModel",
    TIMM.format: "TimmWrapperModel",
}


def _transformers_refuses(shape: VisionConfig) -> str | None:
    return _timm_refuses(shape) if _transformers_naming(shape) is TIMM else None


def _write_transformers(state: Mapping[str, Tensor], shape: VisionConfig, folder: Path) -> None:
    naming = _transformers_naming(shape)
    common = {
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "layer_norm_eps": shape.norm_eps,
        "hidden_act": "gelu",
        "tie_last_hidden_states": True,  # hidden_states[-1] is the class's last_hidden_state
    }
    config = {
        CLIP_VISION.format: {"model_type": "clip_vision_model", **common},
        VIT.format: {"model_type": "vit", "qkv_bias": True, "pooler_act": "linear", **common},
        SIGLIP_VISION.format: {"model_type": "siglip_vision_model", "vision_use_head": False, **common},
        TIMM.format: {"model_type": "timm_wrapper", **_timm_config(shape)},
    }[naming.format]
    prefix = naming.prefixes[0]
    tensors = {prefix + name: tensor for name, tensor in to_format(state, shape, naming).items()}
    if naming is VIT:  # which otherwise makes up a random one: this gives the class token as it is
        tensors |= {"pooler.dense.weight": torch.eye(shape.width), "pooler.dense.bias": torch.zeros(shape.width)}
    _save(tensors, folder / "model.safetensors")
    _write_json(folder / "config.json", {"architectures": [_CLASSES[naming.format]], "dtype": "float32", **config})
    side = {"height": shape.image_size, "width": shape.image_size}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": shape.image_size},
        "crop_size": side,
        "resample": 3,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
    if naming is not TIMM:
        _write_json(folder / "preprocessor_config.json", processor)


def _features_transformers(shape: VisionConfig, folder: Path, images: Tensor) -> Tensor:
    import transformers

    side = images.shape[-1]
    naming = _transformers_naming(shape)
    cls = getattr(transformers, _CLASSES[naming.format])
    model, report = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True, dtype=torch.float32)
    problems = {key: value for key, value in report.items() if value and key != "error_msgs"}
    if problems:
        raise CheckpointError(
            explain(folder, f"was not loaded whole by transformers: {problems}", "Report this with its version.")
        )
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    resize, larger = {}, {}
    if side != shape.image_size and naming is TIMM:  # which takes any size, but its processor only one
        processor = type(processor)(_timm_config(shape)["pretrained_cfg"] | {"input_size": [3, side, side]})
    elif side != shape.image_size:
        resize = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        larger = {"interpolate_pos_encoding": True}
    pixels = processor(_pil(images), return_tensors="pt", **resize)["pixel_values"]
    tokens = model.eval()(pixel_values=pixels, **larger).last_hidden_state
    if naming is CLIP_VISION:  # it keeps its last norm for the pooled output
        tokens = getattr(model, "vision_model", model).post_layernorm(tokens)
    return tokens[:, shape.tokens - shape.patches :]


def _use_transformers(shape: VisionConfig) -> str:
    naming = _transformers_naming(shape)
    lines = [
        'processor = transformers.AutoImageProcessor.from_pretrained("FOLDER")',
        'pixels = processor(images, return_tensors="pt")["pixel_values"]',
        f'model = transformers.{_CLASSES[naming.format]}.from_pretrained("FOLDER").eval()',
        f"tokens = model(pixel_values=pixels).last_hidden_state[:, {shape.tokens - shape.patches}:]",
    ]
    if naming is not TIMM:
        lines.insert(3, "# interpolate_pos_encoding=True for another size")
    if naming is CLIP_VISION:
        lines.append('tokens = getattr(model, "vision_model", model).post_layernorm(tokens)')
    return "\n".join(lines)


def use_llava(shape: VisionConfig) -> str | None:
    """Lines of Python that put the encoder into transformers' LLaVA, which then reads our features.

    None: LLaVA reads the layers of a timm model as maps and cannot use them.
    """
    naming = _transformers_naming(shape)
    if naming is TIMM:
        return None
    strategy = "default" if shape.class_token else "full"
    lines = [
        f'tower = transformers.{_CLASSES[naming.format]}.from_pretrained("FOLDER")',
        "llava = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(",
        f"    vision_config=tower.config, text_config=text_config, image_seq_length={shape.patches},",
        f'    vision_feature_layer=-1, vision_feature_select_strategy="{strategy}"))',
        "llava.model.vision_tower = tower",
    ]
    if naming is CLIP_VISION:
        lines += [
            "# This class's layers end before the last norm, which therefore stands in front of the projector.",
            'norm = copy.deepcopy(getattr(tower, "vision_model", tower).post_layernorm)',
            "llava.model.multi_modal_projector = torch.nn.Sequential(norm, llava.model.multi_modal_projector)",
        ]
    return "\n".join(lines)


def packages_of(name: str, shape: VisionConfig) -> tuple[str, ...]:
    """Packages that a format of `FORMATS` needs for a shape."""
    return ("transformers", "timm") if name == "transformers" and _transformers_naming(shape) is TIMM else (name,)


FORMATS = {
    "timm": ExportFormat(_timm_refuses, _write_timm, _features_timm, _use_timm, lambda shape: True),
    "open_clip": ExportFormat(
        _open_clip_refuses, _write_open_clip, _features_open_clip, _use_open_clip, lambda shape: True
    ),
    "transformers": ExportFormat(
        _transformers_refuses,
        _write_transformers,
        _features_transformers,
        _use_transformers,
        lambda shape: _transformers_naming(shape) is TIMM,
    ),
}
