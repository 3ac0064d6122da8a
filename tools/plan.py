#!/usr/bin/env python
"""Predict memory, speed, communication, cost and uptime of a job on GPUs that you do not have yet.

python tools/plan.py --recipe paper-l14 --gpus 512 --gpu h100
python tools/plan.py --recipe large-g14 --gpus 256 --gpu a800 --tp 8 --recompute-vision full --json
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import UTC, datetime

from lcl_mcore.commands.entry import run_main


def main() -> int:
    """Count, predict, print; 1 if the layout does not fit or could deadlock."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # fake groups have no device to warn about
    from lcl_mcore.planning.request import parse, run_config

    request = parse()
    run_config(request).check_processes(request.gpus)  # mistakes are answered before the slow imports

    from lcl_mcore.diagnostics.environment import source_commit
    from lcl_mcore.planning.plan import make_plan
    from lcl_mcore.planning.report import text

    started = time.perf_counter()

    def note(line: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {line}", file=sys.stderr, flush=True)

    command = " ".join(["python", "tools/plan.py", *sys.argv[1:]])
    origin = {"command": command, **source_commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    plan = make_plan(request, note)
    report = text(plan)
    print(json.dumps(origin | plan, indent=1) if request.json else report)
    if request.out is not None:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        head = "".join(f"{name}: {value}\n" for name, value in origin.items())
        request.out.with_suffix(".txt").write_text(f"{head}\n{report}\n", encoding="utf-8")
        request.out.with_suffix(".json").write_text(
            json.dumps(origin | plan, indent=1) + "\n", encoding="utf-8"
        )
    return 0 if plan["memory"]["fits"] and not plan["lint"]["problems"] else 1


if __name__ == "__main__":
    run_main(main)
