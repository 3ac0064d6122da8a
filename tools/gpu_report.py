#!/usr/bin/env python
"""Test and measure everything that needs a GPU, and write one JSON about it. Under nine minutes, no network.

python tools/gpu_report.py                    # on a machine with a GPU
python tools/gpu_report.py --quick            # fewer sizes; without a GPU a dry run of under a minute
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lcl_mcore.benchmarking.gpu_report import default_path, make_report
from lcl_mcore.commands.entry import run_main


def main() -> int:
    """Run all parts, print a line about each, write the report; 1 if a test failed or a part broke."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/gpu-report-<gpu or cpu-dry>.json"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and steps")
    parser.add_argument("--commit", help="what to record where the folder is not a git checkout")
    args = parser.parse_args()
    report = make_report(args.quick, lambda line: print(line, flush=True))
    if report["commit"] is None and args.commit:
        report |= {"commit": args.commit, "dirty": None, "reason": "named on the command line"}
    path = args.out or default_path(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for item in report["left_out"]:
        print(f"left out: {item['part']}: {item['reason']}")
    print(f"{report['status']} in {report['seconds']} s: {path}")
    return 0 if report["status"] == "ok" else 1


if __name__ == "__main__":
    run_main(main)
