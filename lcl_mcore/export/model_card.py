"""The model card: what an exported encoder is, how to load it, and what was measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from lcl_mcore.config.base import to_dict
from lcl_mcore.config.recipes import RECIPES
from lcl_mcore.config.run_folder import changes_of_recipe
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.format import MANIFEST, MAX_MANIFEST_BYTES, parse_manifest
from lcl_mcore.errors import DataError
from lcl_mcore.evaluation.load import LoadedModel
from lcl_mcore.export.formats import FORMATS, use_llava
from lcl_mcore.models.vision import PIXEL_MEAN, PIXEL_STD
from lcl_mcore.storage import atomic_write
from lcl_mcore.templates import render
from lcl_mcore.untrusted import MAX_JSON_BYTES, parse_object, read_regular

NO_RESULTS = ("curves", "options", "probe", "training")
"""Parts of a result that are no measurements."""


def write_card(loaded: LoadedModel, summary: dict[str, Any], out: Path) -> None:
    """Write `out/README.md`.

    Args:
        summary: the content of `export.json`, see `export.encoder.export`.
    """
    vision = loaded.config.model.vision
    text = render(
        "model_card.md.j2",
        recipe=loaded.config.recipe,
        vision=vision,
        weights=loaded.weights,
        state=loaded.state,
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
        formats=[
            {
                "name": name,
                "version": checked["checked_with"],
                "deviation": f"{checked['deviation']:.1e}",
                "sizes": " and ".join(map(str, checked["image_sizes"])),
                "usage": FORMATS[name].usage(vision).replace("FOLDER", name),
            }
            for name, checked in summary["written"].items()
            if name in FORMATS
        ],
        skipped=summary["skipped"],
        llava=(use_llava(vision) or "").replace("FOLDER", "transformers")
        if "transformers" in summary["written"]
        else "",
        fingerprints=data_fingerprints(loaded.config),
        results=results(loaded.folder, loaded.weights),
        origin=recipe if (recipe := loaded.config.recipe) in RECIPES else "",
        changes=changes_of_recipe(loaded.config),
        config=yaml.safe_dump(to_dict(loaded.config), sort_keys=False).rstrip(),
    )
    atomic_write(out / "README.md", text)


def data_fingerprints(config: RunConfig) -> dict[str, str]:
    """Fingerprint of every prepared data set of a run that is still where it was; the others are named, too."""
    found = {}
    for source in config.data.sources:
        path = Path(source.path) / MANIFEST
        try:
            found[source.label] = str(parse_manifest(str(path), read_regular(path, MAX_MANIFEST_BYTES))["fingerprint"])
        except OSError:
            found[source.label] = "not on this machine"
        except (DataError, KeyError):
            found[source.label] = "its dataset.json is damaged"
    return found


def results(folder: Path, weights: Path) -> list[dict[str, Any]]:
    """Results of these weights that lie beside a run, `report*.json` and `results/*.json`: name and numbers.

    Files that cannot be read are named, with the reason.
    """
    found = []
    for path in [*sorted(folder.glob("report*.json")), *sorted((folder / "results").glob("*.json"))]:
        result: dict[str, Any] = {"name": path.stem, "numbers": [], "problem": ""}
        try:
            content = parse_object(read_regular(path, MAX_JSON_BYTES))
            if os.path.realpath(str(content.get("weights"))) != os.path.realpath(weights):
                continue
            result["numbers"] = numbers({key: value for key, value in content.items() if key not in NO_RESULTS})
        except OSError as error:
            result["problem"] = error.strerror
        except ValueError as error:  # no JSON, or no path
            result["problem"] = str(error)
        found.append(result)
    return found


def numbers(content: Any, path: str = "") -> list[tuple[str, str]]:
    """Every number of a nested result with its path."""
    if isinstance(content, dict):
        return [
            number for key, value in content.items() for number in numbers(value, f"{path} / {key}" if path else key)
        ]
    if isinstance(content, bool) or not isinstance(content, int | float):
        return []
    return [(path, f"{content:.4g}" if isinstance(content, float) else str(content))]
