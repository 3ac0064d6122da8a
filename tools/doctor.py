#!/usr/bin/env python
"""Say what this machine offers, which backend every part would use, and why not a faster one.

python tools/doctor.py
torchrun --nproc-per-node 2 tools/doctor.py      # tries an all-reduce as well
"""

from __future__ import annotations

import argparse
import json
import os

from lcl_mcore.entry import run_main
from lcl_mcore.platform.doctor import examine, format_report


def main() -> int:
    """Parse the command line, look, and print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp8"), help="default: bf16 with a GPU, else fp32"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args()
    report = examine(args.precision)
    if os.environ.get("RANK", "0") == "0" or not report.healthy:
        print(json.dumps(report.to_dict(), indent=1) if args.json else format_report(report))
    return 0 if report.healthy else 1


if __name__ == "__main__":
    run_main(main)
