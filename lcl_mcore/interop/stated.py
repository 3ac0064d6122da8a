"""What the configuration beside a ViT's tensors states about their function.

The tensors do not tell activation, epsilon of the norms, number of heads or pixel statistics, and with another one of
them the same tensors give other features without an error. What is neither stated nor the package's own default is
refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, ValidationError

from lcl_mcore.config.schema import VisionConfig
from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.interop.vit_formats import CLIP_VISION, OPEN_CLIP, OTHER_SHAPE, SIGLIP_VISION, TIMM, VIT, Naming, Pixels
from lcl_mcore.models.vision import PIXEL_MEAN, PIXEL_STD
from lcl_mcore.untrusted import read_regular

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Stated:
    """None: not stated."""

    activation: str | None
    norm_eps: float | None
    heads: int | None
    pixels: Pixels | None


_Means = tuple[FiniteFloat, FiniteFloat, FiniteFloat]
_Deviation = Annotated[FiniteFloat, Field(gt=0)]
_Deviations = tuple[_Deviation, _Deviation, _Deviation]


class _Normalisation(BaseModel):
    mean: _Means | None = None
    std: _Deviations | None = None

    def pixels(self) -> Pixels | None:
        return (self.mean, self.std) if self.mean and self.std else None


# --- timm: an architecture's name stands for its code; facts from timm/models/vision_transformer.py

_TIMM_HEADS = {"tiny": 3, "xsmall": 4, "small": 6, "medium": 8, "base": 12, "large": 16} | dict.fromkeys(
    ("huge", "giant", "gigantic"), 16
)
_TIMM_NAME = re.compile(rf"(?:vit|deit3?)_({'|'.join(_TIMM_HEADS)})_patch\d+_(\d+|clip_(?:quickgelu_)?\d+)")


class _TimmConfig(_Normalisation):
    architecture: str = ""
    model_args: dict[str, Any] = {}
    pretrained_cfg: _Normalisation | None = None


def _timm(config: _TimmConfig, width: int) -> Stated:
    name, given = _TIMM_NAME.fullmatch(config.architecture), config.model_args
    known = name is not None and not given.keys() & {"act_layer", "norm_layer", "mlp_layer", "block_fn"}
    family = name[2] if name else ""
    return Stated(
        ("quick_gelu" if "quickgelu" in family else "gelu") if known else None,
        (1e-5 if "clip_" in family else 1e-6) if known else None,
        given.get("num_heads", _TIMM_HEADS[name[1]] if name else None),
        (config.pretrained_cfg or config).pixels(),
    )


# --- open_clip


class _OpenClipVision(BaseModel):
    head_width: PositiveInt = 64
    norm_kwargs: dict[str, float] = {}
    act_kwargs: dict[str, Any] | None = None


class _OpenClipModel(BaseModel):
    quick_gelu: bool = False
    vision_cfg: _OpenClipVision


class _OpenClipConfig(BaseModel):
    model_cfg: _OpenClipModel
    preprocess_cfg: _Normalisation = _Normalisation(mean=PIXEL_MEAN, std=PIXEL_STD)


def _open_clip(config: _OpenClipConfig, width: int) -> Stated:
    vision = config.model_cfg.vision_cfg
    activation = "quick_gelu" if config.model_cfg.quick_gelu else "gelu"
    return Stated(
        f"{activation} with {vision.act_kwargs}" if vision.act_kwargs else activation,
        vision.norm_kwargs.get("eps", 1e-5),
        width // vision.head_width,
        config.preprocess_cfg.pixels(),
    )


# --- transformers: a value that equals its class's default may be missing

_DEFAULTS = {CLIP_VISION.format: ("quick_gelu", 1e-5), SIGLIP_VISION.format: ("gelu_pytorch_tanh", 1e-6)}
_DEFAULTS[VIT.format] = ("gelu", 1e-12)


class _HfVision(BaseModel):
    hidden_act: str | None = None
    layer_norm_eps: float | None = None
    num_attention_heads: int = 12


class _HfConfig(_HfVision):
    vision_config: _HfVision | None = None


class _HfProcessor(BaseModel):
    image_mean: _Means | None = None
    image_std: _Deviations | None = None


def _transformers(config: _HfConfig, processor: _HfProcessor, naming: Naming) -> Stated:
    vision = config.vision_config or config
    activation, epsilon = _DEFAULTS[naming.format]
    return Stated(
        vision.hidden_act or activation,
        epsilon if vision.layer_norm_eps is None else vision.layer_norm_eps,
        vision.num_attention_heads,
        _Normalisation(mean=processor.image_mean, std=processor.image_std).pixels(),
    )


def stated_by(weights: Path, naming: Naming, width: int) -> tuple[Path, Stated]:
    """The configuration that a format keeps beside its file of weights, and what it states.

    Raises:
        CheckpointError: it is missing or cannot be understood.
    """
    folder = weights.parent
    path = folder / ("open_clip_config.json" if naming is OPEN_CLIP else "config.json")
    remedy = f"Put the {path.name} of its package beside it."
    try:
        text = read_regular(path, MAX_BYTES)
        if naming is OPEN_CLIP:
            return path, _open_clip(_OpenClipConfig.model_validate_json(text), width)
        if naming is TIMM:
            return path, _timm(_TimmConfig.model_validate_json(text), width)
        beside = folder / "preprocessor_config.json"
        processor = _HfProcessor.model_validate_json(read_regular(beside, MAX_BYTES) if beside.is_file() else b"{}")
        return path, _transformers(_HfConfig.model_validate_json(text), processor, naming)
    except FileNotFoundError:
        rule = (
            f"no {path.name} beside it states activation, epsilon of the norms and heads, which the weights do not tell"
        )
        raise CheckpointError(explain(weights, rule, remedy)) from None
    except OSError as error:
        raise CheckpointError(explain(path, f"cannot be read ({error.strerror})", remedy)) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(explain(path, f"{where}: {first['msg']}".lstrip(": "), remedy)) from None


def require_same_function(weights: Path, naming: Naming, shape: VisionConfig) -> Pixels | None:
    """Refuse weights that another function belongs to than this encoder's, or an unknown one.

    Returns:
        The pixel statistics that they were trained with, None if those are not stated.

    Raises:
        CheckpointError: another or no activation, epsilon of the norms or number of heads is stated.
    """
    path, stated = stated_by(weights, naming, shape.width)
    for what, value, ours in (
        ("activation", stated.activation, "gelu"),
        ("epsilon of the norms", stated.norm_eps, shape.norm_eps),
        ("number of heads", stated.heads, shape.heads),
    ):
        if value is None:
            rule = f"does not state the {what}, which the weights do not tell"
            raise CheckpointError(explain(path, rule, "Use another format of this model, or another model."))
        if value != ours:
            raise CheckpointError(explain(f"{path}: {what} {value}", f"this encoder has {ours}", OTHER_SHAPE))
    return stated.pixels
