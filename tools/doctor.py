#!/usr/bin/env python
"""Say what this machine offers, which backend every part would use, and why not a faster one.

python tools/doctor.py
torchrun --nproc-per-node 2 tools/doctor.py --folder runs/x  # also links, clocks, equal software, storage
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from lcl_mcore.commands.entry import run_main
from lcl_mcore.diagnostics.doctor import examine, format_report


def main() -> int:
    """Parse the command line, look, and print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp8"), help="default: bf16 with a GPU, else fp32"
    )
    parser.add_argument("--folder", type=Path, help="under torchrun: try this run folder from every node")
    parser.add_argument(
        "--megabytes", type=float, help="of the trial all-reduce and file (default: 16, with GPUs 512)"
    )
    parser.add_argument(
        "--min-bandwidth", type=float, default=0.0, help="GB/s of bus bandwidth that all-reduce must reach"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args()
    report = examine(args.precision, args.folder, args.megabytes, args.min_bandwidth)
    if os.environ.get("RANK", "0") == "0" or not report.healthy:
        print(json.dumps(report.to_dict(), indent=1) if args.json else format_report(report))
    return 0 if report.healthy else 1


if __name__ == "__main__":
    run_main(main)
