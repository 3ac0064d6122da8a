#!/usr/bin/env python
"""The numbers of one run of the ablation into RUN/measured.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.evaluation import ProbeConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--labelled", type=Path, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--epochs", type=float, required=True)
    parser.add_argument("--untrained", action="store_true", help="also the weights that the run started from")
    flags = parser.parse_args()

    from lcl_mcore.evaluation.loading import open_model, reset_weights
    from lcl_mcore.evaluation.overview import overview

    # The same images for every run; small sets want a higher rate than the paper's 8192 images a step.
    probe = ProbeConfig(
        epochs=flags.epochs, batch_size=250, lr=1e-3, train_limit=flags.images, test_limit=flags.images
    )
    opened = open_model(flags.run)
    result = {"trained": overview(opened, flags.heldout, flags.labelled, probe)}
    if flags.untrained:
        reset_weights(opened)
        result["untrained"] = overview(opened, flags.heldout, flags.labelled, probe)
    (flags.run / "measured.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
