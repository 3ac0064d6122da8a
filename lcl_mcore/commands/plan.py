"""Predict memory, speed, communication, cost and goodput of a job (`tools/plan.py`)."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.base import config_dataclass
from lcl_mcore.config.cli import RunOptions, parse_run
from lcl_mcore.planning.request import PlanRequest
from lcl_mcore.storage import require_writable


@config_dataclass
class PlanOptions(PlanRequest, RunOptions):
    """Predict memory, speed, communication and cost of a job without a GPU. Training flags are those of training."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Machine-readable, on the standard output."""
    out: Path | None = None
    """Also write PATH.txt and PATH.json, with command, commit and date."""


def parse_options(arguments: Sequence[str] | None = None) -> PlanOptions:
    """Read the command line."""
    return parse_run(PlanOptions, arguments)


def main() -> int:
    """Count, predict, print; 1 if the layout does not fit or could deadlock."""
    options = parse_options()
    if options.out is not None:
        require_writable(options.out, "--out", file=True)
    options.run.check_processes(options.gpus)  # mistakes are answered before the slow imports
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # fake groups have no device to warn about

    from lcl_mcore.distributed import cpu

    cpu.install()  # before megatron-core is imported, which would load torch's compiler otherwise
    from lcl_mcore.diagnostics.environment import source_commit
    from lcl_mcore.planning.plan_text import asked_text, layouts_text
    from lcl_mcore.planning.planner import make_plan

    started = time.perf_counter()

    def log(line: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {line}", file=sys.stderr, flush=True)

    command = " ".join(["python", "tools/plan.py", *sys.argv[1:]])
    origin = {"command": command, **source_commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}

    def show(asked: dict[str, Any]) -> None:
        if not options.json:
            print(asked_text(asked), flush=True)

    plan = make_plan(options, log, show)
    print(json.dumps(origin | plan, indent=1) if options.json else layouts_text(plan))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        head = "".join(f"{name}: {value}\n" for name, value in origin.items())
        report = f"{head}\n{asked_text(plan)}\n{layouts_text(plan)}\n"
        options.out.with_suffix(".txt").write_text(report, encoding="utf-8")
        options.out.with_suffix(".json").write_text(json.dumps(origin | plan, indent=1) + "\n", encoding="utf-8")
    return 0 if plan["memory"]["fits"] and not plan["lint"]["problems"] else 1


if __name__ == "__main__":
    run_main(main)
