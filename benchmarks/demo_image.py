"""The image of the README: losses and held-out retrieval of a finished demo.

python benchmarks/demo_image.py runs/demo benchmarks/results/demo.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

BLUE, GREEN, GREY = "#3e7cb1", "#4a9d6f", "#9aa5b1"
SMOOTHING = 25  # steps


def main() -> None:
    """Draw `RUN/report.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder with report.json")
    parser.add_argument("image", type=Path, help="SVG file to write")
    args = parser.parse_args()
    report = json.loads((args.run / "report.json").read_text(encoding="utf-8"))
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lcl", "font.size": 9}
    figure, (losses, retrieval, captions) = pyplot.subplots(1, 3, figsize=(11, 3.1), layout="constrained")
    for name, colour in (("generation", BLUE), ("contrastive", GREEN)):
        values = [record[name] for record in report["curves"]]
        smooth = [
            sum(values[max(0, i - SMOOTHING) : i + 1]) / len(values[max(0, i - SMOOTHING) : i + 1])
            for i in range(0, len(values), 5)
        ]
        losses.plot(range(1, len(values) + 1, 5), smooth, color=colour, label=name)
    losses.set_title(f"training losses, mean of {SMOOTHING} steps")
    losses.set_xlabel("step")
    losses.set_ylim(0)
    losses.legend(frameon=False)
    sides = ("chance", "untrained", "trained")
    for offset, measure in ((-0.2, "R@1"), (0.2, "R@5")):
        heights = [report["retrieval"][side][measure] for side in sides]
        bars = retrieval.bar(
            [i + offset for i in range(3)], heights, 0.38, label=measure, color=BLUE if measure == "R@5" else GREY
        )
        retrieval.bar_label(bars, fmt="%.3f", fontsize=8)
    retrieval.set_xticks(range(3), sides)
    retrieval.set_title(f"retrieval over {report['candidates']} held-out concepts")
    retrieval.legend(frameon=False)
    kinds = {"its image": "right", "another": "shuffled", "a blank": "none"}
    bars = captions.bar(
        kinds.keys(), [report["generation"][kind] for kind in kinds.values()], 0.6, color=[GREEN, GREY, GREY]
    )
    captions.bar_label(bars, fmt="%.2f", fontsize=8)
    captions.set_ylim(0)
    captions.set_title("held-out captions with ..., nats per token")
    for axis in (losses, retrieval, captions):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.image, metadata={"Date": None})


if __name__ == "__main__":
    main()
