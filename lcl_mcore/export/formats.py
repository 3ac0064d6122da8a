"""Writes an encoder for each package, and reads it back through that package alone.

Every `write_*` fills a folder; every `features_*` loads that folder as its users would, without a network, and
returns the encoder's output for normalised pixels: patch tokens after the last norm, without class token.

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
from safetensors.torch import load_file, save_file
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
        features: shape, folder, pixels fp32 [n, 3, S, S] -> fp32 [n, P, h].
        usage: lines of Python for the model card; FOLDER stands for the folder.
    """

    refuses: Callable[[VisionConfig], str | None]
    write: Callable[[Mapping[str, Tensor], VisionConfig, Path], None]
    features: Callable[[VisionConfig, Path, Tensor], Tensor]
    usage: Callable[[VisionConfig], str]


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    save_file(dict(state), path, {"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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


def _features_timm(shape: VisionConfig, folder: Path, pixels: Tensor) -> Tensor:
    import timm

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model.forward_features(pixels)[:, shape.tokens - shape.patches :]


def _use_timm(shape: VisionConfig) -> str:
    return (
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
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
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    return {
        "model_cfg": {"embed_dim": shape.width, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {
            "mean": list(PIXEL_MEAN),
            "std": list(PIXEL_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def _open_clip_refuses(shape: VisionConfig) -> str | None:
    return None if shape.class_token else "its ViT always has a class token, this encoder has none"


def _write_open_clip(state: Mapping[str, Tensor], shape: VisionConfig, folder: Path) -> None:
    tensors = to_format(state, shape, OPEN_CLIP)
    tensors["proj"] = torch.eye(shape.width)  # the tower always has one; this leaves the features alone
    _save(tensors, folder / "visual.safetensors")
    _write_json(folder / "open_clip_config.json", _open_clip_config(shape))


def _features_open_clip(shape: VisionConfig, folder: Path, pixels: Tensor) -> Tensor:
    import open_clip

    file = folder / "visual.safetensors"
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_image_path=str(file)).eval()
    loaded, written = model.visual.state_dict(), load_file(file)
    if loaded.keys() != written.keys() or not all(torch.equal(loaded[key], written[key]) for key in written):
        raise CheckpointError(explain(file, "was not loaded whole by open_clip", "Report this with its version."))
    model.visual.output_tokens = True
    return model.visual(pixels)[1]


def _use_open_clip(shape: VisionConfig) -> str:
    return (
        'model = open_clip.create_model("local-dir:FOLDER", load_weights=False,\n'
        '                               pretrained_image_path="FOLDER/visual.safetensors").eval()\n'
        "mean = model.encode_image(pixels)  # the text tower is untrained: bring or train your own"
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
    }
    config = {
        CLIP_VISION.format: {"model_type": "clip_vision_model", **common},
        VIT.format: {"model_type": "vit", "qkv_bias": True, **common},
        SIGLIP_VISION.format: {"model_type": "siglip_vision_model", "vision_use_head": False, **common},
        TIMM.format: {"model_type": "timm_wrapper", **_timm_config(shape)},
    }[naming.format]
    prefix = naming.prefixes[0]
    tensors = {prefix + name: tensor for name, tensor in to_format(state, shape, naming).items()}
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


def _features_transformers(shape: VisionConfig, folder: Path, pixels: Tensor) -> Tensor:
    import transformers

    naming = _transformers_naming(shape)
    cls = getattr(transformers, _CLASSES[naming.format])
    options = {"add_pooling_layer": False} if naming is VIT else {}
    model, report = cls.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, dtype=torch.float32, **options
    )
    problems = {key: value for key, value in report.items() if value and key != "error_msgs"}
    if problems:
        raise CheckpointError(
            explain(folder, f"was not loaded whole by transformers: {problems}", "Report this with its version.")
        )
    tokens = model.eval()(pixel_values=pixels).last_hidden_state
    if naming is CLIP_VISION:  # it keeps its last norm for the pooled output
        tokens = getattr(model, "vision_model", model).post_layernorm(tokens)
    return tokens[:, shape.tokens - shape.patches :]


def _use_transformers(shape: VisionConfig) -> str:
    naming = _transformers_naming(shape)
    options = ", add_pooling_layer=False" if naming is VIT else ""
    lines = [
        f'model = transformers.{_CLASSES[naming.format]}.from_pretrained("FOLDER"{options}).eval()',
        f"tokens = model(pixel_values=pixels).last_hidden_state[:, {shape.tokens - shape.patches}:]",
    ]
    if naming is CLIP_VISION:
        lines.append('tokens = getattr(model, "vision_model", model).post_layernorm(tokens)')
    return "\n".join(lines)


FORMATS = {
    "timm": ExportFormat(_timm_refuses, _write_timm, _features_timm, _use_timm),
    "open_clip": ExportFormat(_open_clip_refuses, _write_open_clip, _features_open_clip, _use_open_clip),
    "transformers": ExportFormat(_transformers_refuses, _write_transformers, _features_transformers, _use_transformers),
}
