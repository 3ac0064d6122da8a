"""Export of one model: every wanted format written, reloaded, compared, and described in a model card."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcl_mcore.config.files import write_config
from lcl_mcore.errors import CheckpointError, ConfigError, explain
from lcl_mcore.evaluation.loading import LoadedModel, full_state, open_model
from lcl_mcore.interop.export_formats import FORMATS
from lcl_mcore.interop.model_card import write_card
from lcl_mcore.interop.released import to_released, write_full_state
from lcl_mcore.interop.reload import Request, reload_features
from lcl_mcore.models.lcl import LclModel

OWN = ("full", "released")
TOLERANCE = 1e-5


def random_images(side: int) -> Tensor:
    """Images for the comparison, half noise and half smooth; uint8 [4, 3, side, side]."""
    noise = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(0, 1, side)
    ramp = torch.stack((x.expand(side, side), x[:, None].expand(side, side), 0.5 * (x + x[:, None])))
    return (255 * torch.cat((noise, torch.stack((ramp, 1 - ramp))))).byte()


@torch.no_grad()
def own_features(model: LclModel, images: Tensor) -> Tensor:
    """Encoder output of an fp32 model: uint8 [n, 3, S, S] -> patch tokens [n, P, h]."""
    model.eval()
    tokens = model.vision(images, torch.arange(len(images), device=images.device), 0)
    return tokens.view(len(images), -1, tokens.shape[-1])


def normalised(model: LclModel, images: Tensor) -> Tensor:
    """What the packages' own image transforms would hand to their models: fp32 [n, 3, S, S]."""
    return (images.float() / 255.0 - model.vision.pixel_mean) / model.vision.pixel_std


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


def choose_formats(opened: LoadedModel, wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Formats to write, and why others are left out. An empty `wanted` takes every format that can hold the model.

    Raises:
        ConfigError: a format that was asked for cannot hold this encoder, or its package is missing.
    """
    left_out: dict[str, str] = {}
    for name in wanted or FORMATS:
        if name in OWN:
            continue
        reason = FORMATS[name].refuses(opened.config.model.vision)
        if reason is None and (missing := _missing(FORMATS[name].package)):
            reason = missing
        if reason is not None:
            left_out[name] = reason
    if wanted and left_out:
        text = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ConfigError(explain(f"--formats {' '.join(wanted)}", text, "Leave these formats out."))
    return [name for name in wanted or (*FORMATS, "full") if name not in left_out], left_out


def _missing(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install 'lcl-mcore[export]'"
    return None


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder that appears with its name only when everything in it is written and checked."""
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


def _write(name: str, state: Mapping[str, Tensor], opened: LoadedModel, folder: Path) -> None:
    model = opened.config.model
    if name == "full":
        write_full_state(state, model, folder)
        write_config(opened.config, folder)
    elif name == "released":
        content = {"name": "lcl_mcore", "epoch": 0, "state_dict": to_released(state, model)}
        torch.save(content, folder / "model.pt")
    else:
        FORMATS[name].write(state, model.vision, folder)


def _check(opened: LoadedModel, folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Per package: deviation of the reloaded features, and the version that loaded them."""
    shape = opened.config.model.vision
    images = random_images(shape.image_size)
    ours = own_features(opened.model, images)
    requests = [Request(name, folder, shape) for name, folder in folders.items()]
    answers = reload_features(requests, normalised(opened.model, images)) if requests else []
    return {
        name: {"deviation": deviation(ours, theirs, name), "checked_with": _version(name)}
        for name, theirs in zip(folders, answers, strict=True)
    }


def _version(name: str) -> str:
    return importlib.metadata.version({"open_clip": "open_clip_torch"}.get(name, name))


def export(source: Path, out: Path, wanted: Sequence[str] = ()) -> dict[str, Any]:
    """Write the encoder of a run, checkpoint or full-state folder to `out/FORMAT`, with `out/README.md`.

    Returns:
        The content of `out/export.json`: per format the measured deviation, package version, or why it was left out.

    Raises:
        CheckpointError: nothing to export, or a reloaded export does not give our features.
        ConfigError: see `choose_formats`.
    """
    opened = open_model(source)
    opened.model.float().to("cpu")
    names, left_out = choose_formats(opened, wanted)
    state = full_state(opened.model)
    with ExitStack() as stack:
        folders = {name: stack.enter_context(_whole(out / name)) for name in names}
        for name, folder in folders.items():
            _write(name, state, opened, folder)
        written = _check(opened, {name: folder for name, folder in folders.items() if name in FORMATS})
    summary = {
        **opened.facts(),
        "tolerance": TOLERANCE,
        "written": {name: written.get(name, {}) for name in names},
        "left_out": left_out,
    }
    (out / "export.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    write_card(opened, summary, out)
    return summary
