"""The model card: what an exported encoder is, how to load it, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lcl_mcore.config.base import to_dict
from lcl_mcore.evaluation.loading import LoadedModel, data_fingerprints
from lcl_mcore.interop.export_formats import FORMATS
from lcl_mcore.models.vision import PIXEL_MEAN, PIXEL_STD

RESULTS = "results"  # folder of a run in which tools/evaluate.py leaves its JSON files


def measured(folder: Path) -> dict[str, Any]:
    """Results that lie beside the run: `report.json` and `results/*.json`, by name."""
    found = {}
    for path in [folder / "report.json", *sorted((folder / RESULTS).glob("*.json"))]:
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            found[path.stem] = {key: value for key, value in content.items() if key != "curves"}
    return found


def _numbers(content: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Every number of a nested result with its path."""
    if isinstance(content, dict):
        return [
            row
            for key, value in content.items()
            for row in _numbers(value, f"{prefix} / {key}" if prefix else key)
        ]
    if isinstance(content, bool) or not isinstance(content, int | float):
        return []
    return [(prefix, f"{content:.4g}" if isinstance(content, float) else str(content))]


def write_card(opened: LoadedModel, summary: dict[str, Any], out: Path) -> None:
    """Write `out/README.md`."""
    vision, state = opened.config.model.vision, opened.state
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-feature-extraction, lcl]",
        "---",
        "",
        f"# Vision encoder of `{opened.config.recipe}`",
        "",
        "Pre-trained by Latent Compression Learning (arXiv:2406.07543) with lcl_mcore.",
        "",
        f"ViT of {vision.layers} layers, width {vision.width}, {vision.heads} heads, patch {vision.patch_size}, "
        f"{vision.image_size} pixels. Weights: `{opened.weights}`, {state.step} steps, {state.images_seen} images, "
        f"{state.tokens_seen} tokens.",
        "",
        f"Pixels are RGB / 255, minus {list(PIXEL_MEAN)}, divided by {list(PIXEL_STD)}; resize the shorter side "
        "(bicubic), crop the centre. The features are the patch tokens after the last norm. The attention pool and "
        "the language model are in `full/` only: no other format here holds the pool exactly.",
        "",
        "## Load",
        "",
    ]
    for name, facts in summary["written"].items():
        if name not in FORMATS:
            continue
        usage = FORMATS[name].usage(vision).replace("FOLDER", name)
        lines += [
            f"`{name}/` (checked with {name} {facts['checked_with']}: features equal ours within "
            f"{facts['deviation']:.1e})",
            "",
            "```python",
            usage,
            "```",
            "",
        ]
    lines += [f"`{name}` was not written: {reason}." for name, reason in summary["left_out"].items()]
    lines += ["", "## Data", ""]
    fingerprints = data_fingerprints(opened.config)
    lines += [f"- {label}: fingerprint `{print_}`" for label, print_ in fingerprints.items()]
    lines += [] if fingerprints else ["- not recorded: imported weights"]
    if state.order_hash:
        lines.append(f"- hash of the order of all batches: `{state.order_hash}`")
    lines += ["", "## Measured", ""]
    results = measured(opened.folder)
    for name, content in results.items():
        rows = "\n".join(f"| {path} | {value} |" for path, value in _numbers(content))
        lines += [f"### {name}", "", "| | |", "|---|---|", rows, ""]
    lines += [] if results else ["Nothing: run tools/evaluate.py before exporting.", ""]
    text = yaml.safe_dump(to_dict(opened.config), sort_keys=False)
    lines += ["## Configuration", "", "```yaml", text.rstrip(), "```", ""]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")
