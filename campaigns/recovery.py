#!/usr/bin/env python
"""Kill ranks of a training job one after the other; how long until that is noticed, and until it trains again.

    python campaigns/recovery.py --kills 20 --ranks 2

torchrun restarts the job in place. Times are seconds after each SIGKILL: "noticed" is the first message of a
survivor that names the dead rank; "ready" is the new ranks' start-up summary (imports, rendezvous, model, checkpoint
verified and loaded); "training" is the end of their first step. An undisturbed run follows, whose losses, gradient
norms and documents must be bitwise the same. Writes campaigns/recovery.json; exit code 1 beyond 2 s to notice or
30 s to train again, if a restart lost more than what followed the newest complete checkpoint, or if a number differs.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from jobs import HERE, arguments_of, end_all, facts, make_corpus, quantiles, start, workers, write

from lcl_mcore.checkpoint.store import complete_checkpoints, step_of
from lcl_mcore.fault_tolerance.events import EVENTS

NOTICED, TRAINING = 2.0, 30.0
PATIENCE = 300.0
PHASES = ("noticed", "ready", "training")


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


def kill_one(job: subprocess.Popen[str], output: Output, rng: random.Random, run: Path) -> dict[str, float]:
    """Kill one rank at a random moment a few steps after a start.

    Returns:
        Seconds until the phases of `PHASES`, the newest complete checkpoint then, and the step continued from.
    """
    for _ in range(rng.randint(4, 9)):
        output.wait_for(r"^step ")
    time.sleep(rng.uniform(0.0, 0.3))
    ranks = workers(job)
    old = {process.pid for process in ranks}
    complete = max((step_of(path.name) or 0 for path in complete_checkpoints(run / "checkpoints")), default=0)
    killed = time.time()
    rng.choice(ranks).kill()
    moments = {"noticed": output.wait_for(r"error: .*is gone: it was killed")[0]}
    end = time.monotonic() + PATIENCE
    while sum(p.pid not in old for p in workers(job)) < len(old):
        if time.monotonic() > end:
            raise RuntimeError("torchrun did not start the ranks again")
        time.sleep(0.02)
    moments["ready"] = output.wait_for(r"^lcl_mcore  recipe")[0]
    moments["training"] = output.wait_for(r"^step ")[0]
    starts = [json.loads(line) for line in (run / EVENTS).read_text().splitlines()]
    begun = [event["step"] for event in starts if event["event"] == "start"][-1]
    times = {phase: round(moments[phase] - killed, 2) for phase in PHASES}
    return times | {"complete": complete, "continued_from": begun}


def numbers(run: Path) -> dict[int, list[Any]]:
    """What must be the same, by step; a line that a kill cut short is skipped."""
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    read = [json.loads(line) for line in lines]
    return {line["step"]: [line[name] for name in ("loss", "grad_norm", "order_hash")] for line in read}


def measure(kills: int, ranks: int, seed: int, folder: Path) -> tuple[list[dict[str, float]], dict[str, int]]:
    """One job of which a rank is killed `kills` times, and its steps beside those of an undisturbed one."""
    corpus = make_corpus(folder / "corpus")
    faulted, undisturbed = folder / "faulted", folder / "undisturbed"

    def flags(run: Path) -> list[str]:
        words = arguments_of(corpus, run, f"dp{ranks}")
        words[words.index("--steps") + 1] = "100000"
        return words

    job = start(ranks, flags(faulted), subprocess.PIPE, restarts=kills, text=True)
    try:
        output, rng = Output(job), random.Random(seed)
        times = [kill_one(job, output, rng, faulted) for _ in range(kills)]
    finally:
        end_all(job)
    left = numbers(faulted)
    job = start(ranks, flags(undisturbed), subprocess.PIPE, text=True)
    try:
        Output(job).wait_for(rf"^step +{max(left)}/")
    finally:
        end_all(job)
    right = numbers(undisturbed)
    different = [step for step, values in left.items() if right.get(step) != values]
    return times, {"steps": len(left), "not_bitwise_equal": len(different)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, default=HERE / "recovery.json")
    options = parser.parse_args()
    about = facts(f"python campaigns/recovery.py --kills {options.kills} --ranks {options.ranks} --seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="detection-") as folder:
        times, compared = measure(options.kills, options.ranks, options.seed, Path(folder))
    summary: dict[str, Any] = {phase: quantiles([t[phase] for t in times]) for phase in PHASES}
    lost = sum(t["continued_from"] < t["complete"] for t in times)
    fast = summary["noticed"]["largest"] <= NOTICED and summary["training"]["largest"] <= TRAINING
    holds = fast and not lost and not compared["not_bitwise_equal"]
    report = about | {
        "seconds_after_a_kill": summary,
        "kills": times,
        "restarts_that_lost_a_complete_checkpoint": lost,
        "beside_an_undisturbed_run": compared,
        "bounds": {"noticed": NOTICED, "training": TRAINING},
        "holds": holds,
    }
    write(options.report, report)
    print(json.dumps(report, indent=1))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
