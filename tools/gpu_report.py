#!/usr/bin/env python
"""Test and measure everything that needs a GPU: `benchmarks/gpu_report.py` under the name that `make gpu-report` has.

python tools/gpu_report.py                    # on a machine with a GPU
python tools/gpu_report.py --quick            # fewer sizes; without a GPU a dry run of under a minute
"""

from __future__ import annotations

import runpy
from pathlib import Path

if __name__ == "__main__":
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_report.py"
    runpy.run_path(str(script), run_name="__main__")
