"""The model card: what an exported encoder is, how to load it, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lcl_mcore.config.base import to_dict
from lcl_mcore.config.recipes import RECIPES
from lcl_mcore.config.run_folder import changes_of_recipe
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.evaluation.load import LoadedModel
from lcl_mcore.export.formats import FORMATS, use_llava
from lcl_mcore.models.vision import PIXEL_MEAN, PIXEL_STD
from lcl_mcore.storage import atomic_write
from lcl_mcore.templates import render

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
        results=[{"name": name, "numbers": numbers(content)} for name, content in results(loaded).items()],
        origin=f"the recipe `{recipe}`" if (recipe := loaded.config.recipe) in RECIPES else "the defaults",
        changes=changes_of_recipe(loaded.config),
        config=yaml.safe_dump(to_dict(loaded.config), sort_keys=False).rstrip(),
    )
    atomic_write(out / "README.md", text)


def data_fingerprints(config: RunConfig) -> dict[str, str]:
    """Fingerprint of every prepared data set of a run that is still where it was; the others are named, too."""
    found = {}
    for source in config.data.sources:
        manifest = Path(source.path) / "dataset.json"
        if manifest.is_file():
            found[source.label] = str(json.loads(manifest.read_text("utf-8")).get("fingerprint", "?"))
        else:
            found[source.label] = "not on this machine"
    return found


def results(loaded: LoadedModel) -> dict[str, Any]:
    """Results of these weights that lie beside a run: `report*.json` and `results/*.json`, by name."""
    found = {}
    for path in [*sorted(loaded.folder.glob("report*.json")), *sorted(loaded.results.glob("*.json"))]:
        content = json.loads(path.read_text(encoding="utf-8"))
        if Path(content.get("weights", "")).resolve() == loaded.weights.resolve():
            found[path.stem] = {key: value for key, value in content.items() if key not in NO_RESULTS}
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
