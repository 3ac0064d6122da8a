#!/usr/bin/env python
"""Kill ranks of a training job one after the other; how long until that is noticed, and until it trains again.

    python tests/training/detection.py --kills 10 --ranks 2

torchrun restarts the job in place. Times are seconds after each SIGKILL: "noticed" is the first message of a
survivor that names the dead rank; "processes" are the new ranks' start; "ready" is their announcement (imports,
rendezvous, model, checkpoint verified and loaded); "training" is the end of their first step. Writes
benchmarks/results/recovery.json; exit code 1 beyond 2 s to notice or 30 s to train again.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [
    str(Path(__file__).resolve().parents[2] / name) for name in ("", "tests", "tests/training", "tests/data")
]

from soak_jobs import ROOT, arguments_of, end_all, workers  # noqa: E402
from soak_report import commit, machine, quantiles  # noqa: E402
from tiny import make_corpus  # noqa: E402

NOTICED, TRAINING = 2.0, 30.0
PATIENCE = 300.0
PHASES = ("noticed", "processes", "ready", "training")


class Output:
    """Lines of a job, each with the moment at which it came."""

    def __init__(self, job: subprocess.Popen[str]) -> None:
        self.lines: queue.Queue[tuple[float, str]] = queue.Queue()
        self.seen: list[str] = []
        threading.Thread(target=self._read, args=(job,), daemon=True).start()

    def _read(self, job: subprocess.Popen[str]) -> None:
        assert job.stdout is not None
        for line in job.stdout:
            self.lines.put((time.time(), line))
        self.lines.put((time.time(), ""))

    def wait_for(self, pattern: str) -> tuple[float, str]:
        """Moment and text of the next line that holds the pattern.

        Raises:
            RuntimeError: the job ended, or the line did not come within `PATIENCE`.
        """
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                moment, line = self.lines.get(timeout=1.0)
            except queue.Empty:
                continue
            if not line:
                break
            self.seen.append(line)
            if re.search(pattern, line):
                return moment, line
        raise RuntimeError(f"no line with {pattern!r}; the last ones:\n{''.join(self.seen[-30:])}")


def strike(job: subprocess.Popen[str], output: Output, draw: random.Random) -> dict[str, float]:
    """Kill one rank at a random moment a few steps after a start; seconds until the phases of `PHASES`."""
    for _ in range(draw.randint(4, 9)):
        output.wait_for(r"^step ")
    time.sleep(draw.uniform(0.0, 0.3))
    ranks = workers(job)  # type: ignore[arg-type]
    old = {process.pid for process in ranks}
    struck = time.time()
    draw.choice(ranks).kill()
    moments = {"noticed": output.wait_for(r"error: .*is gone: it was killed")[0]}
    end = time.monotonic() + PATIENCE
    while len(new := [p for p in workers(job) if p.pid not in old]) < len(old):  # type: ignore[arg-type]
        if time.monotonic() > end:
            raise RuntimeError("torchrun did not start the ranks again")
        time.sleep(0.02)
    moments["processes"] = max(process.create_time() for process in new)
    moments["ready"] = output.wait_for(r"^lcl_mcore  recipe")[0]
    moments["training"] = output.wait_for(r"^step ")[0]
    return {phase: round(moments[phase] - struck, 2) for phase in PHASES}


def measure(kills: int, ranks: int, seed: int, folder: Path) -> list[dict[str, float]]:
    """One job that is struck `kills` times."""
    corpus = make_corpus(folder / "corpus")
    flags = arguments_of(corpus, folder / "run", f"dp{ranks}")
    flags[flags.index("--steps") + 1] = "100000"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               "--max-restarts", str(kills), "tools/pretrain_lcl.py", *flags]  # fmt: skip
    job = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, draw = Output(job), random.Random(seed)
        return [strike(job, output, draw) for _ in range(kills)]
    finally:
        end_all(job)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks" / "results" / "recovery.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="detection-") as folder:
        times = measure(options.kills, options.ranks, options.seed, Path(folder))
    summary: dict[str, Any] = {phase: quantiles([t[phase] for t in times]) for phase in PHASES}
    holds = summary["noticed"]["largest"] <= NOTICED and summary["training"]["largest"] <= TRAINING
    report = {
        "command": f"python tests/training/detection.py --kills {options.kills} --ranks {options.ranks} "
                   f"--seed {options.seed}",
        "machine": machine(), "memory_gib": round(psutil.virtual_memory().total / 2**30), "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "load_before": round(load, 1),
        "seconds_after_a_kill": summary, "kills": times,
        "bounds": {"noticed": NOTICED, "training": TRAINING}, "holds": holds,
    }  # fmt: skip
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
