#!/usr/bin/env python
"""Train while things are killed at random, in changing layouts, and compare with undisturbed runs.

    python tests/soak.py --minutes 30

A round is a run of STEPS steps from the start to the end, struck again and again: SIGKILL of a rank, of one that is
writing a checkpoint (or of its writing process, where it has one), or of the whole job; SIGTERM to a rank; SIGSTOP
of a rank. Rounds alternate between keeping
their layout (the numbers must then be bitwise those of an undisturbed run) and changing tp/pp/dp at every restart
(losses within 1e-5 of the undisturbed single process, the same documents in every batch). At every restart the run
must continue from the newest checkpoint that was complete at that moment: no step before it may be lost. Rounds go on
until the time is up. Everything random comes from --seed, except how fast the machine is.

Writes benchmarks/results/soak.json and soak.md; exit code 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / name) for name in ("", "tests", "tests/training", "tests/data")
]

from lcl_mcore.fault_tolerance.restart import EVENTS  # noqa: E402
from soak_jobs import (  # noqa: E402
    EVERY,
    LAYOUTS,
    ROOT,
    STEPS,
    TIMEOUT,
    accepted,
    arguments_of,
    children,
    count_steps,
    end_all,
    line_of,
    reference,
    send,
    start,
    workers,
)
from soak_report import Tally, compare, markdown, summary  # noqa: E402
from tiny import make_corpus  # noqa: E402

PATIENCE = 240.0  # seconds without a new step, after which the run counts as stuck
STRIKES = ("rank", "rank", "rank", "writer", "writer", "job", "stop", "freeze")


class Round:
    """One run, from the first step to the last, however often it is struck."""

    def __init__(self, corpus: Path, out: Path, draw: random.Random, tally: Tally, deadline: float) -> None:
        self.corpus, self.out, self.draw, self.tally, self.deadline = corpus, out, draw, tally, deadline
        self.used: list[str] = []
        self.kills = 0

    def run(self, layouts: list[str], *, change: bool) -> None:
        layout = self.draw.choice(layouts)
        while self.checkpointed() < STEPS and not self.tally.problems:
            self.attempt(layout)
            if change:
                layout = self.draw.choice([name for name in layouts if name != layout] or layouts)

    def done(self) -> int:
        """Steps whose lines are in the metrics."""
        return count_steps(self.out)

    def checkpointed(self) -> int:
        found = [p for p in (self.out / "checkpoints").glob("step-*") if (p / "manifest.json").is_file()]
        return max((int(p.name.split("-")[1]) for p in found if p.suffix != ".partial"), default=0)

    def attempt(self, layout: str) -> None:
        """Start, strike once unless the time is up, wait for the end."""
        count, _ = LAYOUTS[layout]
        resumed = self.checkpointed()
        self.used.append(layout)
        self.tally.starts[layout] += 1
        starts = len(self.starts())
        with open(self.out.with_suffix(".log"), "a", encoding="utf-8") as log:
            launched = time.monotonic()
            job = start(count, [*arguments_of(self.corpus, self.out, layout), "--resume"], log)
            try:
                self.wait_for_step(job, resumed + 1, starts)
                self.tally.training_after.append(time.monotonic() - launched)
                begun = self.starts()[starts]["step"]
                if begun != resumed:
                    self.tally.problems.append(
                        f"{self.out.name}: continued at {begun}, {resumed} was complete"
                    )
                if time.monotonic() < self.deadline:
                    self.strike(job)
                job.wait(PATIENCE)
            except (TimeoutError, subprocess.TimeoutExpired) as error:
                self.tally.problems.append(f"{self.out.name}: stuck in {layout}: {error}")
            finally:
                end_all(job)
        self.tally.redone.append(self.done() - self.checkpointed())

    def starts(self) -> list[dict[str, Any]]:
        path = self.out / EVENTS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.startswith('{"event": "start"')]

    def wait_for_step(self, job: subprocess.Popen[bytes], step: int, starts: int) -> None:
        """Until this attempt has logged the step; its start is in the events, and later lines were dropped."""
        end = time.monotonic() + PATIENCE
        while len(self.starts()) == starts or self.done() < step:
            if job.poll() is not None:
                if job.returncode == 0:
                    return
                raise TimeoutError(f"ended with {job.returncode} before step {step}")
            if time.monotonic() > end:
                raise TimeoutError(f"no step {step} after {PATIENCE:.0f} s")
            time.sleep(0.01)

    def strike(self, job: subprocess.Popen[bytes]) -> None:
        """Wait a random while, then harm something; the time until the job has ended is noted."""
        kind = self.draw.choice(STRIKES)
        if kind == "freeze" and len(workers(job)) == 1:
            kind = "rank"  # a stopped process that is alone has nobody to notice it
        target = min(self.done() + self.draw.randrange(1, 2 * EVERY), STEPS)
        in_save = kind == "writer" or self.draw.random() < 0.3
        end = time.monotonic() + PATIENCE
        while job.poll() is None and time.monotonic() < end:
            saving = any((self.out / "checkpoints").glob("*.partial"))
            if (saving and in_save) or (self.done() >= target and not in_save):
                break
            time.sleep(0.002)
        time.sleep(self.draw.choice((0.0, 0.0, 0.02, 0.1, 0.3)))
        ranks = workers(job)
        if not ranks:
            return  # it was faster
        victims = [self.draw.choice(ranks)]
        writers = [
            child for rank in ranks for child in children(rank) if "resource_tracker" not in line_of(child)
        ]
        if kind == "writer" and writers:
            victims = [self.draw.choice(writers)]
        elif kind == "writer":
            kind = "rank"  # the writer is a thread of the rank
        number = {"stop": signal.SIGTERM, "freeze": signal.SIGSTOP}.get(kind, signal.SIGKILL)
        if kind == "job":
            victims = [psutil.Process(job.pid), *ranks]
        struck = time.monotonic()
        for victim in victims:
            send(victim, number)
        self.tally.strikes[kind + (" in a save" if in_save else "")] += 1
        self.kills += number == signal.SIGKILL
        if kind == "stop" and (job.wait(PATIENCE) != 0 or self.done() != self.checkpointed()):
            self.tally.problems.append(
                f"{self.out.name}: SIGTERM: exit code {job.returncode}, {self.done()} steps, "
                f"checkpoint {self.checkpointed()}"
            )
        if kind in ("rank", "stop", "freeze"):
            job.wait(PATIENCE)
            self.tally.ended_after.append(time.monotonic() - struck - TIMEOUT * (kind == "freeze"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=8, help="largest layout to use")
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    parser.add_argument("--keep", type=Path, help="folder for runs and logs (default: a temporary one)")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus"
    if not corpus.is_dir():
        make_corpus(corpus)
    tally, draw = Tally(), random.Random(options.seed)
    layouts = accepted(corpus, folder / "none", options.ranks)
    began = time.monotonic()
    deadline = began + 60 * options.minutes
    while time.monotonic() < deadline and not tally.problems:
        number = len(tally.rounds)
        change = number % 2 == 1
        mine = layouts if change else [draw.choice(layouts)]
        paused = time.monotonic()
        undisturbed = reference(corpus, folder, "dp1" if change else mine[0])
        deadline += time.monotonic() - paused  # the minutes are those under fire
        struck = Round(corpus, folder / f"round-{number}", draw, tally, deadline)
        struck.run(mine, change=change)
        result = compare(struck.out, undisturbed, bitwise=not change) | {
            "layouts": struck.used,
            "changing": change,
            "kills": struck.kills,
        }
        tally.rounds.append(result)
        print(
            f"round {number}: {' > '.join(struck.used)}: {'holds' if result['holds'] else 'DOES NOT HOLD'}, largest "
            f"relative difference {result['largest_relative_difference']:.1e}",
            flush=True,
        )
        if not result["holds"]:
            tally.problems.append(f"round {number} differs at steps {result['different'][:5]}")
    report = summary(tally, layouts, options, time.monotonic() - began)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    options.report.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    if options.keep is None and not tally.problems:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
