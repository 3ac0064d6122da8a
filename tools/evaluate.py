#!/usr/bin/env python
"""Evaluate a run on held-out pairs: retrieval, generation loss, report.json and report.html.

python tools/evaluate.py runs/demo --data data/demo/heldout
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lcl_mcore.entry import run_main


def main() -> int:
    parser = argparse.ArgumentParser(description="Evaluate a run on held-out pairs.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--data", required=True, help="prepared held-out data set")
    flags = parser.parse_args()

    from lcl_mcore.evaluation.heldout import evaluate_run
    from lcl_mcore.evaluation.report import print_table, write_report
    from lcl_mcore.training.metrics import read_metrics

    result = evaluate_run(flags.run, flags.data)
    write_report(flags.run, result, read_metrics(flags.run / "metrics.jsonl"))
    print_table(result.summary)
    print(f"\nreport: {flags.run / 'report.html'}")
    return 0


if __name__ == "__main__":
    run_main(main)
