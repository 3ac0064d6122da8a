"""Say what this machine offers and which backend every part would use (`tools/doctor.py`)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import tyro
from pydantic import NonNegativeFloat, PositiveFloat

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config import arguments
from lcl_mcore.config.base import config_dataclass


@config_dataclass
class DoctorOptions:
    """Say what this machine offers, which backend every part would use, and why not a faster one.

    Under torchrun also links, clocks, equal software and storage.
    """

    precision: Literal["fp32", "bf16", "fp8"] | None = None
    """Precision of the run; by default bf16 with a GPU, else fp32."""
    folder: Path | None = None
    """Under torchrun: try this run folder from every node."""
    megabytes: PositiveFloat | None = None
    """Size of the trial all-reduce and file; by default 16, with GPUs 512."""
    min_bandwidth: NonNegativeFloat = 0.0
    """GB/s of bus bandwidth that all-reduce must reach."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Machine-readable."""


def main() -> int:
    """Parse the command line, look, and print on rank 0; 1 if something is missing."""
    options = arguments.parse(DoctorOptions)

    from lcl_mcore.diagnostics.health import examine, format_report

    report = examine(options.precision, options.folder, options.megabytes, options.min_bandwidth)
    if os.environ.get("RANK", "0") == "0" or not report.healthy:
        print(json.dumps(report.to_dict(), indent=1) if options.json else format_report(report))
    return 0 if report.healthy else 1


if __name__ == "__main__":
    run_main(main)
