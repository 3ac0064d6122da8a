"""Table and plots of the ablation from its results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

MEASURES = (
    ("frozen_accuracy", "Fashion-MNIST accuracy, frozen encoder", 3),
    ("retrieval_R@5", "held-out retrieval R@5", 3),
    ("shuffle_gap", "shuffle gap, nats per token", 4),
    ("effective_rank", "effective rank of image vectors", 1),
)
UNTRAINED = "untrained"
ONLY = ("contrastive only", "generation only")


def gather(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Per setting and measure, one value per seed; the untrained encoders are a setting of their own."""
    table: dict[str, dict[str, list[float]]] = {}
    for record in results:
        rows = [(record["setting"], record["trained"])]
        if UNTRAINED in record:
            rows.append((UNTRAINED, record[UNTRAINED]))
        for name, numbers in rows:
            for measure, _, _ in MEASURES:
                table.setdefault(name, {}).setdefault(measure, []).append(numbers[measure])
    return {name: table[name] for name in sorted(table, key=lambda n: (n == UNTRAINED, n.startswith("both"), n))}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation over the seeds (0 for one seed)."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def markdown(table: dict[str, dict[str, list[float]]]) -> str:
    """The table as Markdown."""
    lines = ["| setting | " + " | ".join(title for _, title, _ in MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for name, values in table.items():
        cells = []
        for measure, _, digits in MEASURES:
            centre, deviation = spread(values[measure])
            cells.append(f"{centre:.{digits}f} ± {deviation:.{digits}f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(table: dict[str, dict[str, list[float]]], path: Path, title: str) -> None:
    """Upper row: Table 6a as bars. Lower row: Table 6b, the weight of the contrastive loss on a log axis."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(MEASURES), figsize=(4 * len(MEASURES), 7), layout="constrained")
    bars = [name for name in (UNTRAINED, *ONLY, "both, 0.1") if name in table]
    weights = {float(name.split(", ")[1]): name for name in table if name.startswith("both, ")}
    for column, (measure, label, _) in enumerate(MEASURES):
        centres, deviations = zip(*(spread(table[name][measure]) for name in bars), strict=True)
        upper = axes[0][column]
        upper.bar(bars, centres, yerr=deviations, capsize=4, color=["#9aa5b1", "#3e7cb1", "#c1666b", "#4a9d6f"])
        upper.set_title(label, fontsize=10)
        upper.tick_params(axis="x", rotation=20)
        lower = axes[1][column]
        x = sorted(weights)
        centres, deviations = zip(*(spread(table[weights[w]][measure]) for w in x), strict=True)
        lower.errorbar(x, centres, yerr=deviations, marker="o", capsize=4, color="#4a9d6f")
        lower.set_xscale("log")
        lower.minorticks_off()
        lower.set_xticks(x, [str(w) for w in x])
        lower.set_xlabel("weight of the contrastive loss")
        lower.grid(alpha=0.3)
        upper.grid(alpha=0.3, axis="y")
    figure.suptitle(title, fontsize=11)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text: a tenth of the size
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def write(results: Sequence[dict[str, Any]], facts: dict[str, Any], folder: Path) -> str:
    """`ablation.json`, `ablation.md` and `ablation.svg` in `folder`; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    table = gather(results)
    summary = {
        name: {measure: dict(zip(("mean", "std"), spread(values[measure]), strict=True)) for measure in values}
        for name, values in table.items()
    }
    content = {**facts, "summary": summary, "runs": list(results)}
    (folder / "ablation.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = markdown(table)
    about = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    (folder / "ablation.md").write_text(f"# Loss ablation\n\n{text}\n\n{about}\n", encoding="utf-8")
    plot(table, folder / "ablation.svg", "Loss ablation (mean and standard deviation over seeds)")
    return text
