#!/usr/bin/env python
"""The paper's Table 6, small: contrastive loss, generation loss, both, and the weight between them.

    python examples/ablation/run.py

Builds the corpus (Debian's documentation of scikit-image, scikit-learn and OpenCV, and Fashion-MNIST; all fetched
with apt-get download), trains and measures every setting with three seeds at equal budgets, two runs at a time,
and writes ablation.json, ablation.md and ablation.svg. Interrupted, it continues when started again.
"""

from __future__ import annotations

import argparse
import datetime
import os
from dataclasses import asdict, replace
from pathlib import Path

from corpus import PACKAGES, WORDS, build
from study import FULL, ROOT, SETTINGS, VOCABULARY, Study
from summary import write

from lcl_mcore.commands.fetch_corpora import fetch
from lcl_mcore.diagnostics.environment import source_commit
from lcl_mcore.distributed.device import cpu_name

FASHION = Path("usr/share/datasets/fashion-mnist")


def facts(study: Study, workers: int) -> dict[str, object]:
    """What a reader needs to judge the numbers."""
    return {
        "command": "python examples/ablation/run.py",
        "commit": source_commit()["commit"] or "unknown",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{cpu_name()}, {workers} runs at a time, one thread each",
        "budget": asdict(study.budget),
        "corpus": f"{', '.join(PACKAGES)}; the last {WORDS} words before each image; one page in ten held out",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--report", type=Path, default=Path("benchmarks/results"), help="folder of the report")
    parser.add_argument("--data", type=Path, default=Path("data/ablation"), help="folder of the corpus")
    parser.add_argument("--pages", type=Path, help="folder of HTML pages instead of the fetched packages")
    parser.add_argument("--labelled", type=Path, help="labelled images instead of Fashion-MNIST")
    parser.add_argument("--settings", nargs="*", default=[s.name for s in SETTINGS], help="some settings only")
    parser.add_argument("--steps", type=int, default=FULL.steps)
    parser.add_argument("--seeds", type=int, default=FULL.seeds)
    parser.add_argument("--probe-images", type=int, default=FULL.probe_images)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    flags = parser.parse_args()
    places = [p.resolve() for p in (flags.data, flags.out, flags.report)]
    data, out, report = places
    os.chdir(ROOT)
    pages = flags.pages.resolve() if flags.pages else data / "packages"
    if flags.pages is None:
        for package in PACKAGES:
            fetch(package, pages)
    labelled = flags.labelled or fetch("dataset-fashion-mnist", data / "labelled") / FASHION
    build(pages, data / "corpus", VOCABULARY)
    budget = replace(FULL, steps=flags.steps, seeds=flags.seeds, probe_images=flags.probe_images)
    study = Study(data / "corpus", labelled.resolve(), out, budget)
    chosen = tuple(s for s in SETTINGS if s.name in flags.settings)
    results = study.run_all(chosen, flags.workers)
    print(write(results, facts(study, flags.workers), report))
    print(f"{report / 'ablation.md'}, ablation.json, ablation.svg")


if __name__ == "__main__":
    main()
