#!/usr/bin/env python
"""Test and measure everything that needs a GPU: `benchmarks/gpu_report.py` under the name that `make gpu-report` has.

python tools/gpu_report.py                    # on a machine with a GPU
python tools/gpu_report.py --quick            # fewer sizes; without a GPU a dry run of under a minute
python tools/gpu_report.py --carried .gpu     # on a machine without a network, from a folder of `make gpu-carry`
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]  # the package may not be installed on a bare machine
    runpy.run_path(str(ROOT / "benchmarks" / "gpu_report.py"), run_name="__main__")
