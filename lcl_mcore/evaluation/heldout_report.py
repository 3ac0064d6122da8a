"""`report.json` and a self-contained `report.html` of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcl_mcore.evaluation.embedding_metrics import nearest
from lcl_mcore.evaluation.heldout import HeldoutResult
from lcl_mcore.storage import atomic_write
from lcl_mcore.templates import data_url, render

CARDS = 24
"""Images shown with the captions nearest to them."""
NEAREST = 5
CURVES = ("loss", "contrastive", "generation")
"""Metrics that are drawn over the steps."""
GENERATION = {"right": "with its image", "shuffled": "with another image", "none": "with a blank image"}


def table_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The retrieval table: what, R@1, R@5."""
    retrieval = summary["retrieval"]

    def row(name: str, values: dict[str, float], prefix: str = "") -> tuple[str, str, str]:
        return name, f"{values[f'{prefix}R@1']:.3f}", f"{values[f'{prefix}R@5']:.3f}"

    return [
        row("trained, both directions", retrieval["trained"]),
        row("  image to text", retrieval["trained"], "image_to_text_"),
        row("  text to image", retrieval["trained"], "text_to_image_"),
        row("untrained", retrieval["untrained"]),
        row("chance", retrieval["chance"]),
    ]


def print_table(summary: dict[str, Any]) -> None:
    """The result for the terminal."""
    print(f"\nHeld-out retrieval over {summary['candidates']} concepts   {'R@1':>7}{'R@5':>9}")
    for name, one, five in table_rows(summary):
        print(f"  {name:<42}{one:>9}{five:>9}")
    print("Held-out generation loss, nats per token")
    for name, label in GENERATION.items():
        print(f"  {label:<42}{summary['generation'][name]:>9.3f}")
    for reason, count in summary["skipped"].items():
        print(f"{count} of {count + summary['documents']} documents skipped: {reason}.")
    print(f"R@5 is {summary['r5_over_chance']:.1f} times chance.")


def write_report(path: Path, result: HeldoutResult, records: list[dict[str, Any]]) -> None:
    """Write a JSON file, and a page of the same name.

    Args:
        path: of the JSON file.
        records: lines of `metrics.jsonl` that have all `CURVES`.
    """
    curves = [{name: r[name] for name in ("step", *CURVES)} for r in records]
    summary = {**result.summary, "curves": curves}
    atomic_write(path, json.dumps(summary, indent=1))
    page = render(
        "report.html.j2",
        **result.summary,
        rows=table_rows(summary),
        losses=[(label, f"{summary['generation'][name]:.3f}") for name, label in GENERATION.items()],
        curves=data_url(loss_curves(records), "svg"),
        cards=cards(result),
    )
    atomic_write(path.with_suffix(".html"), page)


def cards(result: HeldoutResult) -> list[dict[str, Any]]:
    """Some images, each with the captions nearest to it and, if it is not among them, its own caption."""
    embeds, captions = result.embeds, result.captions
    found = nearest(embeds.image, embeds.text, NEAREST).tolist()
    shown = torch.linspace(0, len(found) - 1, min(CARDS, len(found))).round().int().tolist()
    return [
        {
            "image": data_url(png(embeds.images[i]), "png"),
            "captions": [(captions[j], j == i) for j in found[i]],
            "own": None if i in found[i] else captions[i],
        }
        for i in shown
    ]


def png(image: Tensor) -> bytes:
    """uint8 [3, H, W] -> a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def loss_curves(records: list[dict[str, Any]]) -> bytes:
    """Losses of the training run as an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    steps = [r["step"] for r in records]
    for axis, name in zip(axes, ("contrastive", "generation"), strict=True):
        axis.plot(steps, [r[name] for r in records], linewidth=1.2)
        axis.set(title=f"{name} loss", xlabel="step")
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    return buffer.getvalue()
