"""Encoders written for other packages give our features there, and come back as initial weights."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcl_mcore.checkpoint.weights_file import consolidated_state
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.schema import VisionConfig
from lcl_mcore.errors import CheckpointError, ConfigError
from lcl_mcore.export import encoder
from lcl_mcore.export.encoder import another_size, choose_formats, deviation, own_features, random_images
from lcl_mcore.export.formats import FORMATS, use_llava
from lcl_mcore.export.reload import ReloadRequest, reload_features
from lcl_mcore.interop.init_from import load_encoder, read_encoder
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.optional_packages import export_packages

Make = Callable[..., LclModel]
BASE = VisionConfig(image_size=48, patch_size=16, width=48, layers=2, heads=4, mlp_width=100)
SHAPES = {
    "class token, norm before": dataclasses.replace(BASE, layer_scale=0.3),
    "class token": dataclasses.replace(BASE, pre_norm=False, layer_scale=0.3),
    "norm before": dataclasses.replace(BASE, class_token=False),
    "neither": dataclasses.replace(BASE, class_token=False, pre_norm=False, layer_scale=0.3),
}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_features_are_equal_and_weights_come_back(make_model: Make, tmp_path: Path) -> None:
    """Every format and shape at two image sizes, loaded and prepared the plain way; all reloads in one process."""
    requests, expected = [], []
    for kind, shape in SHAPES.items():
        model = make_model(shape)
        for name, form in FORMATS.items():
            if name == "open_clip" and not shape.class_token:
                assert "class token" in str(form.refuses(shape))
                continue
            assert form.refuses(shape) is None
            folder = tmp_path / f"{name} {kind}"
            folder.mkdir()
            form.write(consolidated_state(model), shape, folder)
            for side in (BASE.image_size, another_size(shape)):
                ours = own_features(model, images := random_images(side), form.antialias(shape))
                assert ours.shape == (len(images), (side // 16) ** 2, 48)
                assert ours.std() > 0.1
                requests.append(ReloadRequest(name, folder, shape, images))
                expected.append(ours)
    assert len(requests) == 20
    assert another_size(BASE) == 64
    for request, ours, theirs in zip(requests, expected, reload_features(requests), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5, msg=f"{request.folder.name}")
        if ours.shape[1] == 9:
            other = make_model(request.shape, seed=5)
            assert (own_features(other, request.images) - ours).abs().max() > 0.1
            state, recognised = read_encoder(request.folder, request.shape)
            assert request.format in recognised or recognised == "timm"
            load_encoder(other, state, 0, 1)
            torch.testing.assert_close(own_features(other, request.images), ours, rtol=0, atol=1e-5)


def test_positions_are_interpolated_as_each_package_does(make_model: Make) -> None:
    """The two ways differ by far more than what the self-check lets pass."""
    model, images = make_model(BASE), random_images(64)
    before = model.vision.position_embedding
    smooth, sharp = own_features(model, images), own_features(model, images, antialias=False)
    assert model.vision.position_embedding is before
    assert (smooth - sharp).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_the_card_says_works(make_model: Make, tmp_path: Path) -> None:
    """Every snippet as it stands: tokens and their mean are our features; a LLaVA's projector reads the same."""
    requests, wanted = [], {}
    for kind, shape in SHAPES.items():
        model = make_model(shape)
        folder = tmp_path / kind
        for name, form in FORMATS.items():
            if form.refuses(shape) is None:
                (folder / name).mkdir(parents=True)
                form.write(consolidated_state(model), shape, folder / name)
                requests.append([kind, name, form.usage(shape).replace("FOLDER", str(folder / name))])
        if (snippet := use_llava(shape)) is not None:
            requests.append([kind, "llava", snippet.replace("FOLDER", str(folder / "transformers"))])
        wanted[kind] = own_features(model, random_images(48))
    (tmp_path / "snippets.json").write_text(json.dumps(requests))
    worker = Path(__file__).with_name("card_worker.py")
    done = subprocess.run([sys.executable, str(worker), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert sum(name.endswith("llava") for name in found) == 3
    assert len(found) == 2 * 4 + 2 * 2 + 4 + 3  # timm and open_clip with their means, transformers, LLaVA
    for name, theirs in found.items():
        ours = wanted[name.partition("/")[0]]
        ours = ours.mean(1) if name.endswith("mean") else ours
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5, msg=name)


def test_an_export_without_its_packages_is_refused(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tuple(replace(p, usable=False, reason=f"{p.name} is not installed") for p in export_packages())
    monkeypatch.setattr(encoder, "export_packages", lambda: (missing[0], *export_packages()[1:]))
    config = replace(load_recipe("demo"), model=replace(load_recipe("demo").model, vision=BASE))
    loaded: Any = SimpleNamespace(config=config)
    remedy = "Run pip install 'lcl-mcore[export]', or name formats that need none of these, for example --formats full."
    for wanted in ((), ("timm", "full")):
        with pytest.raises(ConfigError) as caught:
            choose_formats(loaded, wanted)
        assert str(caught.value) == f"export without the packages that check it: timm is not installed. {remedy}"
    assert choose_formats(loaded, ("full", "open_clip"))[0] == ["full", "open_clip"]
    plain = replace(config, model=replace(config.model, vision=SHAPES["norm before"]))
    with pytest.raises(ConfigError, match="timm is not installed"):  # in which transformers keeps this shape
        choose_formats(SimpleNamespace(config=plain), ("transformers",))


def test_a_wrong_export_is_not_accepted() -> None:
    ours = torch.randn(2, 9, 8)
    assert deviation(ours, ours + 1e-6, "timm") < 1e-5
    with pytest.raises(CheckpointError, match=r"features differ by 1\.0e-04: at most 1e-05 is allowed"):
        deviation(ours / ours.abs().max(), ours / ours.abs().max() + 1e-4, "timm")
    with pytest.raises(CheckpointError, match="features differ by nan"):
        deviation(ours, ours * torch.nan, "timm")
