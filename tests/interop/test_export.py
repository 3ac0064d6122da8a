"""Encoders written for other packages give our features there, and come back as initial weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcl_mcore.checkpoint.weights_file import consolidated_state
from lcl_mcore.config.schema import VisionConfig
from lcl_mcore.errors import CheckpointError
from lcl_mcore.export.encoder import deviation, normalised, own_features, random_images
from lcl_mcore.export.formats import FORMATS
from lcl_mcore.export.reload import ReloadRequest, reload_features
from lcl_mcore.interop.init_from import load_encoder, read_encoder
from lcl_mcore.models.lcl import LclModel

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
    """Every format and every shape; all reloads in one process."""
    requests, expected, images = [], [], random_images(BASE.image_size)
    for kind, shape in SHAPES.items():
        model = make_model(shape)
        ours = own_features(model, images)
        assert ours.shape == (len(images), 9, 48)
        assert ours.std() > 0.1
        for name, form in FORMATS.items():
            if name == "open_clip" and not shape.class_token:
                assert "class token" in str(form.refuses(shape))
                continue
            assert form.refuses(shape) is None
            folder = tmp_path / f"{name} {kind}"
            folder.mkdir()
            form.write(consolidated_state(model), shape, folder)
            requests.append(ReloadRequest(name, folder, shape))
            expected.append(ours)
    assert len(requests) == 10
    for request, ours, theirs in zip(
        requests, expected, reload_features(requests, normalised(model, images)), strict=True
    ):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5, msg=f"{request.folder.name}")
        other = make_model(request.shape, seed=5)
        assert (own_features(other, images) - ours).abs().max() > 0.1
        state, recognised = read_encoder(request.folder, request.shape)
        assert request.format in recognised or recognised == "timm"
        load_encoder(other, state, 0, 1)
        torch.testing.assert_close(own_features(other, images), ours, rtol=0, atol=1e-5)


def test_a_wrong_export_is_not_accepted() -> None:
    ours = torch.randn(2, 9, 8)
    assert deviation(ours, ours + 1e-6, "timm") < 1e-5
    with pytest.raises(CheckpointError, match=r"features differ by 1\.0e-04: at most 1e-05 is allowed"):
        deviation(ours / ours.abs().max(), ours / ours.abs().max() + 1e-4, "timm")
    with pytest.raises(CheckpointError, match="features differ by nan"):
        deviation(ours, ours * torch.nan, "timm")
