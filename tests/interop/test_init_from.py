"""Weights that a run may start from: fitted where that is usual, refused by name where features would differ."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcl_mcore.checkpoint.weights_file import consolidated_state, write_consolidated
from lcl_mcore.config.schema import VisionConfig
from lcl_mcore.errors import CheckpointError
from lcl_mcore.export.encoder import own_features, random_images
from lcl_mcore.export.formats import FORMATS
from lcl_mcore.interop.init_from import read_encoder, start_from
from lcl_mcore.interop.stated import require_same_function, stated_by
from lcl_mcore.interop.vit_formats import (
    NAMINGS,
    OPEN_CLIP,
    TIMM,
    Naming,
    fit_positions,
    from_format,
    interpolate_positions,
    recognise,
    to_format,
)
from lcl_mcore.models.lcl import LclModel

Make = Callable[..., LclModel]
SHAPE = VisionConfig(image_size=48, patch_size=16, width=48, layers=2, heads=4, mlp_width=100)
PLAIN = dataclasses.replace(SHAPE, pre_norm=False, layer_scale=0.3)
NEITHER = dataclasses.replace(SHAPE, class_token=False, pre_norm=False)
IMAGES = random_images(48)


def edit(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(content))


def refusal(folder: Path, shape: VisionConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_encoder(folder, shape)
    return str(caught.value).replace(str(folder), "FOLDER")


def exported(name: str, model: LclModel, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    FORMATS[name].write(consolidated_state(model), model.shape.vision, folder)
    return folder


def test_what_a_format_has_and_we_lack_is_folded_or_refused(make_model: Make, tmp_path: Path) -> None:
    model = make_model(PLAIN)
    ours = own_features(model, IMAGES)
    file = exported("timm", model, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    # A patch bias, moved out of the positions; a head; no position for the class token.
    shift = torch.randn(48)
    tensors["patch_embed.proj.bias"] = shift
    tensors["pos_embed"][:, 1:] -= shift
    tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
    tensors["pos_embed"] = tensors["pos_embed"][:, 1:].contiguous()
    tensors["head.weight"] = torch.zeros(10, 48)
    save_file(tensors, file)
    assert start_from(model, tmp_path, 0, 1) == f"{tmp_path} (vision encoder only, timm)"
    torch.testing.assert_close(own_features(model, IMAGES), ours, rtol=0, atol=1e-5)
    # Layer scale in the file, where the model has none.
    plain = make_model(dataclasses.replace(PLAIN, layer_scale=None), seed=7)
    start_from(plain, tmp_path, 0, 1)
    torch.testing.assert_close(own_features(plain, IMAGES), ours, rtol=0, atol=1e-5)

    assert "do not fit this model (missing: norm_pre.weight" in refusal(tmp_path, SHAPE)
    assert "(unexpected: blocks.1.attn.proj.bias; " in refusal(tmp_path, dataclasses.replace(PLAIN, layers=1))
    wide = dataclasses.replace(PLAIN, mlp_width=96)
    assert "shape: blocks.1.mlp.fc1.weight is (100, 48), the model has (96, 48)" in refusal(tmp_path, wide)
    assert "shape: pos_embed is (1, 9, 48)" in refusal(tmp_path, dataclasses.replace(PLAIN, width=64))
    for name in ("reg_token", "blocks.0.attn.q_norm.weight", "dist_token"):  # other functions of the same pixels
        save_file({**tensors, name: torch.zeros(1)}, file)
        assert f"do not fit this model (unexpected: {name})" in refusal(tmp_path, PLAIN)
    save_file({"weight": torch.zeros(1)}, file)
    assert "neither a consolidated state dict of lcl_mcore nor" in refusal(tmp_path, PLAIN)


def test_what_the_tensors_do_not_tell_must_be_stated(make_model: Make, tmp_path: Path) -> None:
    """Activation, epsilon and heads: the same tensors give other features with others."""
    model = make_model(SHAPE)
    timm, clip, hf = (exported(name, model, tmp_path / name) for name in ("timm", "open_clip", "transformers"))
    shape = "Choose a model of the same shape, or set model.vision.* to fit it."
    config = hf / "config.json"
    for field, value, what, ours in (
        ("hidden_act", "quick_gelu", "activation quick_gelu", "gelu"),
        ("layer_norm_eps", 1e-6, "epsilon of the norms 1e-06", "1e-05"),
        ("num_attention_heads", 6, "number of heads 6", "4"),
    ):
        before = config.read_text()
        edit(config, **{field: value})
        assert refusal(hf, SHAPE) == f"FOLDER/config.json: {what}: this encoder has {ours}. {shape}"
        config.write_text(before)
    edit(config, hidden_act=None)  # whose default is CLIP's own
    assert "activation quick_gelu" in refusal(hf, SHAPE)
    edit(config, model_type="clip", vision_config={"num_attention_heads": 4})
    assert "activation quick_gelu" in refusal(hf, SHAPE)

    other = json.loads((clip / "open_clip_config.json").read_text())["model_cfg"]
    edit(clip / "open_clip_config.json", model_cfg=other | {"quick_gelu": True})
    assert "open_clip_config.json: activation quick_gelu: this encoder has gelu" in refusal(clip, SHAPE)
    edit(clip / "open_clip_config.json", model_cfg={"vision_cfg": {}})
    assert "number of heads 0: this encoder has 4" in refusal(clip, SHAPE)  # 64 channels each

    edit(timm / "config.json", architecture="vit_base_patch16_clip_quickgelu_224")
    assert "activation quick_gelu: this encoder has gelu" in refusal(timm, SHAPE)
    edit(timm / "config.json", architecture="vit_base_patch16_224")
    assert "epsilon of the norms 1e-06: this encoder has 1e-05" in refusal(timm, SHAPE)
    edit(timm / "config.json", architecture="vit_base_patch16_siglip_gap_224")
    assert refusal(timm, SHAPE) == (
        "FOLDER/config.json: does not state the activation, which the weights do not tell. "
        "Use another format of this model, or another model."
    )
    edit(timm / "config.json", model_args=[])
    assert "config.json: model_args: Input should be an object" in refusal(timm, SHAPE)
    (timm / "config.json").unlink()
    assert refusal(timm, SHAPE) == (
        "FOLDER/model.safetensors: no config.json beside it states activation, epsilon of the norms and heads, "
        "which the weights do not tell. Put the config.json of its package beside it."
    )


FIELDS = (
    *(
        "architecture",
        "model_args",
        "num_heads",
        "pretrained_cfg",
        "mean",
        "std",
        "model_cfg",
        "quick_gelu",
        "vision_cfg",
    ),
    *(
        "head_width",
        "norm_kwargs",
        "eps",
        "act_kwargs",
        "preprocess_cfg",
        "vision_config",
        "hidden_act",
        "layer_norm_eps",
    ),
    *("num_attention_heads", "image_mean", "image_std"),
)
VALUES = (
    st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.sampled_from(["gelu", "vit_base_patch16_224"])
)
PLAUSIBLE = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@given(content=PLAUSIBLE, beside=PLAUSIBLE, naming=st.sampled_from(NAMINGS))
def test_whatever_a_configuration_says_is_understood_or_refused(content: Any, beside: Any, naming: Naming) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file, value in (("config", content), ("open_clip_config", content), ("preprocessor_config", beside)):
            Path(name, f"{file}.json").write_text(json.dumps(value))
        try:
            pixels = require_same_function(Path(name, "model.safetensors"), naming, SHAPE)
        except CheckpointError:
            return
        assert pixels is None or (torch.tensor(pixels).isfinite().all() and min(pixels[1]) > 0)


ASK_TIMM = """
import json, sys, torch
from lcl_mcore.distributed.cpu import make_torchvision_importable
held = make_torchvision_importable()
import timm
for name in sys.argv[1:]:
    with torch.device("meta"):
        model = timm.create_model(name, depth=1, weight_init="skip")
    block = model.blocks[0]
    print(json.dumps([type(block.mlp.act).__name__, block.norm1.eps, block.attn.num_heads]))
"""


def test_what_timms_names_stand_for(tmp_path: Path) -> None:

    names = [
        "vit_tiny_patch16_224",
        "vit_large_patch16_384",
        "vit_medium_patch16_clip_224",
        "vit_giant_patch14_clip_224",
        "vit_base_patch32_clip_quickgelu_224",
        "deit3_small_patch16_224",
    ]
    done = subprocess.run([sys.executable, "-c", ASK_TIMM, *names], capture_output=True, text=True, check=True)
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
        _, stated = stated_by(tmp_path / "model.safetensors", TIMM, 0)
        activation, epsilon, heads = json.loads(line)
        assert activation == {"gelu": "GELU", "quick_gelu": "QuickGELU"}[str(stated.activation)], name
        assert (stated.norm_eps, stated.heads) == (epsilon, heads), name


def test_other_pixel_statistics_are_folded_into_the_patches(make_model: Make, tmp_path: Path) -> None:
    """An encoder that was trained on pixels in [-1, 1] gives the features that it gave there."""
    model = make_model(NEITHER)
    other = make_model(NEITHER, seed=3)
    folder = exported("transformers", model, tmp_path / "half")
    edit(folder / "preprocessor_config.json", image_mean=[0.5] * 3, image_std=[0.5, 0.25, 0.5])
    said = start_from(other, folder, 0, 1)
    assert said.endswith(
        "SiglipVisionModel; pixels of mean (0.5, 0.5, 0.5) and deviation (0.5, 0.25, 0.5) folded into the patches)"
    )
    mean, std = model.vision.pixel_mean.clone(), model.vision.pixel_std.clone()
    model.vision.pixel_mean.fill_(0.5)
    model.vision.pixel_std.copy_(torch.tensor([0.5, 0.25, 0.5])[:, None, None])
    theirs = own_features(model, IMAGES)
    torch.testing.assert_close(own_features(other, IMAGES), theirs, rtol=0, atol=1e-5)
    model.vision.pixel_mean.copy_(mean)
    model.vision.pixel_std.copy_(std)
    assert (own_features(model, IMAGES) - theirs).abs().max() > 0.1
    (folder / "preprocessor_config.json").unlink()
    assert start_from(other, folder, 0, 1).endswith("; pixel statistics not stated, taken to be CLIP's)")


def plain_bicubic(square: Tensor, grid: int) -> Tensor:
    """timm's: antialiased, on [h, rows, columns]."""
    return F.interpolate(square[None], (grid, grid), mode="bicubic", antialias=True, align_corners=False)[0]


def bits(*size: int, seed: int) -> Tensor:
    """Any fp32 numbers, NaN and denormal ones included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, size, generator=generator, dtype=torch.int64).int().view(torch.float32)


def encoder_of(shape: VisionConfig) -> dict[str, Tensor]:
    h, m = shape.width, shape.mlp_width
    sizes: dict[str, tuple[int, ...]] = {
        "patch_embedding": (h, 3 * shape.patch_size**2),
        "position_embedding": (shape.tokens, h),
    }
    if shape.class_token:
        sizes["class_token"] = (h,)
    modules = {"norm_post": (h,)} | ({"norm_pre": (h,)} if shape.pre_norm else {})
    for i in range(shape.layers):
        block = f"blocks.layers.{i}."
        modules |= {f"{block}{norm}": (h,) for norm in ("input_layernorm", "pre_mlp_layernorm")}
        modules |= {f"{block}self_attention.linear_qkv": (3 * h, h), f"{block}self_attention.linear_proj": (h, h)}
        modules |= {f"{block}mlp.linear_fc1": (m, h), f"{block}mlp.linear_fc2": (h, m)}
        if shape.layer_scale is not None:
            sizes |= {f"{block}{branch}.gamma": (h,) for branch in ("self_attn_bda", "mlp_bda")}
    for name, size in modules.items():
        sizes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return {f"vision.{name}": bits(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}


SHAPES = st.builds(
    lambda grid, patch, heads, channels, mlp, **more: VisionConfig(
        image_size=grid * patch, patch_size=patch, width=heads * channels, heads=heads, mlp_width=mlp, **more
    ),
    *(st.integers(1, 3) for _ in range(3)),
    channels=st.integers(1, 2),
    mlp=st.integers(1, 5),
    layers=st.integers(1, 3),
    class_token=st.booleans(),
    pre_norm=st.booleans(),
    layer_scale=st.sampled_from([None, 0.1]),
)


@given(shape=SHAPES)
def test_every_number_of_any_shape_comes_back(shape: VisionConfig) -> None:
    """In timm's names, which have a place for all of it, and in open_clip's, where there is a class token."""
    state = encoder_of(shape)
    for naming in (TIMM, OPEN_CLIP) if shape.class_token else (TIMM,):
        written = to_format(state, shape, naming)
        assert recognise(written) == (naming, "")
        back, done = from_format(written, shape, naming, "")
        assert (back.keys(), done) == (state.keys(), "")
        for name, value in state.items():
            assert torch.equal(back[name].view(torch.int32), value.view(torch.int32)), name


@given(old=st.integers(1, 6), new=st.integers(1, 6), leading=st.integers(0, 1))
def test_positions_of_any_square_are_fitted(old: int, new: int, leading: int) -> None:
    shape = VisionConfig(image_size=16 * new, patch_size=16, width=4, heads=1, class_token=bool(leading))
    # A plane over the grid keeps its values at the image's corners' centre, and its mean.
    rows = torch.arange(old, dtype=torch.float32)
    patches = (rows[:, None, None] + 10 * rows[:, None] + torch.arange(4)).reshape(-1, 4)
    positions = torch.cat((torch.full((leading, 4), 77.0), patches))
    fitted, said = fit_positions(positions, shape)
    assert len(fitted) == shape.tokens
    assert fitted[:leading].eq(77).all()
    assert (said == "") == (old == new) == torch.equal(fitted, positions)
    if old != new:
        assert said == f"; positions interpolated from {old} x {old} to {new} x {new} patches"
    torch.testing.assert_close(fitted[leading:].mean(0), patches.mean(0), rtol=0, atol=1e-3)
    wanted = plain_bicubic(patches.T.reshape(4, old, old), new).flatten(1).T
    torch.testing.assert_close(fitted[leading:], wanted)


def test_another_image_size_is_accepted_and_another_patch_size_refused(make_model: Make, tmp_path: Path) -> None:
    model, larger = make_model(PLAIN), make_model(dataclasses.replace(PLAIN, image_size=96), seed=2)
    wanted = interpolate_positions(model.vision.position_embedding.detach(), 6)
    for name in ("timm", "open_clip", "transformers"):
        folder = exported(name, model, tmp_path / name)
        said = start_from(larger, folder, 0, 1)
        assert said.endswith("; positions interpolated from 3 x 3 to 6 x 6 patches)"), said
        torch.testing.assert_close(larger.vision.position_embedding.detach(), wanted)
    assert refusal(tmp_path / "timm", dataclasses.replace(PLAIN, patch_size=8)) == (
        "patch size 16 of the timm weights: this encoder has 8, and patches are not resized, only positions. "
        "Set model.vision.patch_size=16, or choose another model."
    )
    # The whole model, too.
    write_consolidated(consolidated_state(model), model.shape, tmp_path)
    assert start_from(larger, tmp_path, 0, 1) == f"{tmp_path}; positions interpolated from 3 x 3 to 6 x 6 patches"
    assert torch.equal(larger.vision.position_embedding.detach(), wanted)


def test_a_consolidated_state_dict_starts_the_whole_model(make_model: Make, tmp_path: Path) -> None:
    model, other = make_model(NEITHER), make_model(NEITHER, seed=3)
    write_consolidated(consolidated_state(model), model.shape, tmp_path)
    assert start_from(other, tmp_path, 0, 1) == str(tmp_path)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        rows = slice(0, 300) if one.shape[0] == 384 else slice(None)
        assert torch.equal(one[rows], two[rows]), name
    for change, what in (
        ({"heads": 8}, "model.vision.heads = 4: this model has 8"),
        ({"norm_eps": 1e-6}, "model.vision.norm_eps = 1e-05: this model has 1e-06"),
        ({"patch_size": 8}, "model.vision.patch_size = 16: this model has 8"),
    ):
        with pytest.raises(CheckpointError) as caught:
            start_from(make_model(dataclasses.replace(NEITHER, **change)), tmp_path, 0, 1)
        assert str(caught.value) == f"{tmp_path}/model.safetensors: {what}. Use the config.yaml beside it."
