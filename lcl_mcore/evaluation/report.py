"""`report.json` and a self-contained `report.html` of a run."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcl_mcore.evaluation.heldout import HeldoutResult
from lcl_mcore.evaluation.retrieval import nearest

GRID = 24  # images shown with their retrieved captions

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .9rem; border-bottom: 1px solid #d5dbe1; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.card { border: 1px solid #d5dbe1; border-radius: 6px; padding: .6rem; font-size: .85rem; } .card img { width: 72px; }
.own { color: #0a7d33; font-weight: 600; } figure { margin: 1rem 0; } figcaption, .small { color: #5b6b7a; }
"""


def table_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The lines of the closing table: what, R@1, R@5."""
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
    generation = summary["generation"]
    print("Held-out generation loss, nats per token")
    for name, label in (
        ("right", "with its image"),
        ("shuffled", "with another image"),
        ("none", "with a blank"),
    ):
        print(f"  {label:<42}{generation[name]:>9.3f}")
    print(f"R@5 is {summary['r5_over_chance']:.1f} times chance.")


def write_report(folder: Path, result: HeldoutResult, records: list[dict[str, Any]]) -> None:
    """Write `report.json` and `report.html` into the run's folder."""
    curves = [{k: r[k] for k in ("step", "loss", "contrastive", "generation")} for r in records]
    summary = {**result.summary, "curves": curves}
    (folder / "report.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    (folder / "report.html").write_text(_page(result, records), encoding="utf-8")


def _page(result: HeldoutResult, records: list[dict[str, Any]]) -> str:
    summary = result.summary
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table_rows(summary)
    )
    generation = "".join(
        f"<tr><td>{label}</td><td>{summary['generation'][name]:.3f}</td></tr>"
        for name, label in (
            ("right", "with its image"),
            ("shuffled", "with another image"),
            ("none", "blank"),
        )
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>lcl_mcore: {html.escape(summary["run"])}</title>
<style>{_STYLE}</style>
<h1>{html.escape(summary["run"])}</h1>
<p>{summary["steps"]} steps, {summary["images_seen"]} images, on {html.escape(summary["hardware"])}.
Held-out set: {html.escape(summary["heldout"])}.</p>
<h2>Retrieval among {summary["candidates"]} held-out concepts</h2>
<table><tr><th></th><th>R@1</th><th>R@5</th></tr>{rows}</table>
<h2>Generation loss on held-out captions, nats per token</h2>
<table>{generation}</table>
<figure>{_curves(records)}<figcaption>Losses of the training run.</figcaption></figure>
<h2>Images and the captions found for them</h2>
<p class="small">The five nearest of all held-out captions, nearest first; the image's own caption in green.</p>
<div class="grid">{_cards(result)}</div></html>"""


def _cards(result: HeldoutResult) -> str:
    features = result.features
    found = nearest(features.image, features.text, 5).tolist()
    chosen = torch.linspace(0, len(found) - 1, min(GRID, len(found))).round().int().tolist()
    cards = []
    for i in chosen:
        captions = "<br>".join(
            f'<span class="{"own" if j == i else ""}">{html.escape(result.captions[j])}</span>'
            for j in found[i]
        )
        own = (
            "" if i in found[i] else f'<br><span class="small">own: {html.escape(result.captions[i])}</span>'
        )
        cards.append(
            f'<div class="card"><img alt="" src="{_data_url(features.images[i])}"><br>{captions}{own}</div>'
        )
    return "".join(cards)


def _data_url(image: Tensor) -> str:
    """uint8 [3, H, W] -> PNG in a data URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curves(records: list[dict[str, Any]]) -> str:
    """Loss curves as inline SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    steps = [r["step"] for r in records]
    for axis, name in zip(axes, ("contrastive", "generation"), strict=True):
        axis.plot(steps, [r[name] for r in records], linewidth=1.2)
        axis.set(title=f"{name} loss", xlabel="step")
        axis.grid(alpha=0.3)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
