"""Export of one model: every wanted format written, loaded again, compared, and described in a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcl_mcore.checkpoint.weights_file import (
    consolidated_state,
    read_consolidated,
    without_vocabulary_padding,
    write_consolidated,
)
from lcl_mcore.config.run_folder import write_config
from lcl_mcore.config.schema import VisionConfig
from lcl_mcore.errors import CheckpointError, ConfigError, explain
from lcl_mcore.evaluation.load import LoadedModel, open_model, stored_weights
from lcl_mcore.export.formats import FORMATS, packages_of
from lcl_mcore.export.model_card import write_card
from lcl_mcore.export.reload import ReloadRequest, reload_features
from lcl_mcore.interop.released import from_released, read_released, to_released
from lcl_mcore.interop.vit_formats import interpolate_positions
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.optional_packages import export_packages
from lcl_mcore.storage import atomic_write

OWN = ("full", "released")
"""Formats of our own: all weights for `--init-from`, and the keys of the released code."""
RELEASED_FILE = "model.pt"
TOLERANCE = 1e-5
"""Largest difference of features, relative to our largest (or 1)."""


def random_images(side: int) -> Tensor:
    """Images for the comparison, half noise and half smooth; uint8 [4, 3, side, side]."""
    noise = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(0, 1, side)
    ramp = torch.stack((x.expand(side, side), x[:, None].expand(side, side), 0.5 * (x + x[:, None])))
    return (255 * torch.cat((noise, torch.stack((ramp, 1 - ramp))))).byte()


def another_size(shape: VisionConfig) -> int:
    """A larger side, in whole patches, at which exports are checked as well."""
    grid = shape.image_size // shape.patch_size
    return shape.patch_size * (grid + max(1, grid // 4))


@torch.no_grad()
def own_features(model: LclModel, images: Tensor, antialias: bool = True) -> Tensor:
    """Encoder output of an fp32 model: uint8 [n, 3, S, S] -> patch tokens [n, P, h].

    Args:
        antialias: in the interpolation of positions, where S is not the encoder's.
    """
    model.eval()
    trained = model.vision.position_embedding
    fitted = interpolate_positions(trained, images.shape[-1] // model.shape.vision.patch_size, antialias)
    model.vision.position_embedding = torch.nn.Parameter(fitted)
    try:
        tokens = model.vision(images, torch.arange(len(images), device=images.device), 0)
    finally:
        model.vision.position_embedding = trained
    return tokens.view(len(images), -1, tokens.shape[-1])


def deviation(ours: Tensor, theirs: Tensor, name: str) -> float:
    """Largest difference of two sets of features, relative to our largest (or 1).

    Raises:
        CheckpointError: it exceeds `TOLERANCE`.
    """
    remedy = "Do not use this export; report the package's version."
    if theirs.shape != ours.shape:
        rule = f"ours are {tuple(ours.shape)}"
        raise CheckpointError(explain(f"{name}: features {tuple(theirs.shape)}", rule, remedy))
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0))
    if not difference <= TOLERANCE:
        rule = f"at most {TOLERANCE} is allowed"
        raise CheckpointError(explain(f"{name}: features differ by {difference:.1e}", rule, remedy))
    return difference


def choose_formats(loaded: LoadedModel, wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Formats to write, and why others are skipped. An empty `wanted` takes every format that can hold the model.

    Raises:
        ConfigError: a format that was asked for cannot hold this encoder, or a package is missing.
    """
    vision, needed = loaded.config.model.vision, list[str]()
    packages = {package.name: package for package in export_packages()}
    skipped: dict[str, str] = {}
    for name in wanted or FORMATS:
        if name in OWN:
            continue
        reason = FORMATS[name].refuses(vision)
        if reason is not None:
            skipped[name] = reason
        needed += [package for package in packages_of(name, vision) if reason is None and not packages[package].usable]
    if wanted and skipped:
        text = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ConfigError(explain(f"--formats {' '.join(wanted)}", text, "Do not ask for these formats."))
    if needed:
        reasons = "; ".join(packages[name].reason for name in dict.fromkeys(needed))
        remedy = (
            "Run pip install 'lcl-mcore[export]', or name formats that need none of these, for example --formats full."
        )
        raise ConfigError(explain("export without the packages that check it", reasons, remedy))
    return [name for name in wanted or (*FORMATS, "full") if name not in skipped], skipped


@contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """A partial folder that gets its name when everything in it is written and checked; removed after an error."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _write(name: str, state: Mapping[str, Tensor], loaded: LoadedModel, folder: Path) -> None:
    model = loaded.config.model
    if name == "full":
        write_consolidated(state, model, folder)
        write_config(loaded.config, folder)
    elif name == "released":
        content = {"name": "lcl_mcore", "epoch": 0, "state_dict": to_released(state, model)}
        torch.save(content, folder / RELEASED_FILE)
    else:
        FORMATS[name].write(state, model.vision, folder)


def _check_own(loaded: LoadedModel, folders: Mapping[str, Path]) -> None:
    """Compare the formats of our own, read again, with the weights that were stored, bit by bit.

    Raises:
        CheckpointError: a tensor differs.
    """
    shape = loaded.config.model
    stored, _ = stored_weights(loaded.weights)
    stored = without_vocabulary_padding(stored, shape.language.vocab_size)
    for name in folders.keys() & set(OWN):
        if name == "full":
            written = read_consolidated(folders[name])
        else:
            written = from_released(read_released(folders[name] / RELEASED_FILE), shape)
        wrong = sorted(key for key in stored if key not in written or not torch.equal(stored[key], written[key]))
        if wrong or written.keys() != stored.keys():
            rule = f"{len(wrong)} tensors differ from those in {loaded.weights}, {wrong[0] if wrong else ''} first"
            raise CheckpointError(explain(name, rule, "Do not use this export; report it."))


def _check(loaded: LoadedModel, folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Per package: largest deviation of the reloaded features at two image sizes, and the version that loaded them."""
    shape = loaded.config.model.vision
    sides = (shape.image_size, another_size(shape))
    packages = {package.name: package for package in export_packages()}
    requests = [
        ReloadRequest(name, folder, shape, random_images(side)) for name, folder in folders.items() for side in sides
    ]
    found: dict[str, dict[str, Any]] = {
        name: {"deviation": 0.0, "image_sizes": sides, "checked_with": packages[name].version} for name in folders
    }
    for request, theirs in zip(requests, reload_features(requests) if requests else [], strict=True):
        name, side = request.format, request.images.shape[-1]
        ours = own_features(loaded.model, request.images, FORMATS[name].antialias(shape))
        worst = max(found[name]["deviation"], deviation(ours, theirs, f"{name} at {side} pixels"))
        found[name]["deviation"] = worst
    return found


def export(source: Path, out: Path, wanted: Sequence[str] = ()) -> dict[str, Any]:
    """Write the encoder of a run, a checkpoint or a folder with `model.safetensors` to `out/FORMAT`.

    The model card is `out/README.md`.

    Returns:
        The content of `out/export.json`: per format the measured deviation and package version, or why it was skipped.

    Raises:
        CheckpointError: nothing to export, or a reloaded export does not give our features.
        ConfigError: see `choose_formats`.
    """
    loaded = open_model(source)
    loaded.model.to("cpu")
    names, skipped = choose_formats(loaded, wanted)
    state = consolidated_state(loaded.model)
    with ExitStack() as stack:
        folders = {name: stack.enter_context(_complete_folder(out / name)) for name in names}
        for name, folder in folders.items():
            _write(name, state, loaded, folder)
        _check_own(loaded, folders)
        written = _check(loaded, {name: folder for name, folder in folders.items() if name in FORMATS})
    summary = {
        **loaded.facts(),
        "tolerance": TOLERANCE,
        "written": {name: written.get(name, {}) for name in names},
        "skipped": skipped,
    }
    atomic_write(out / "export.json", json.dumps(summary, indent=1) + "\n")
    write_card(loaded, summary, out)
    return summary
