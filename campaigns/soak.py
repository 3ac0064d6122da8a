#!/usr/bin/env python
"""Train while faults are injected at random, in changing layouts, and compare with undisturbed runs.

    python campaigns/soak.py --minutes 30

A round is one run of STEPS steps, into which faults are injected again and again: SIGKILL of a rank, of one that is
writing a checkpoint (or of its writing process, where it has one), or of the whole job; SIGTERM to a rank; SIGSTOP
of a rank. Rounds alternate between keeping their layout (the numbers must then be bitwise those of an undisturbed
run) and changing tp/pp/dp at every restart (losses within 1e-5 of the undisturbed single process, the same documents
in every batch). At every restart the run must continue from the newest checkpoint that was complete at that moment:
no step before it may be lost. Rounds go on until the time is up. Everything random comes from --seed, except how
fast the machine is.

Writes campaigns/soak.json and soak.md; exit code 1 if anything did not hold.
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
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from jobs import (
    EVERY,
    HERE,
    LAYOUTS,
    STEPS,
    TIMEOUT,
    accepted,
    arguments_of,
    children,
    count_steps,
    end_all,
    facts,
    line_of,
    make_corpus,
    quantiles,
    records,
    reference,
    send,
    start,
    workers,
    write,
)

from lcl_mcore.fault_tolerance.events import EVENTS

PATIENCE = 240.0  # seconds without a new step, after which the run counts as stuck
FAULTS = ("rank", "rank", "rank", "writer", "writer", "job", "stop", "freeze")


@dataclass
class Tally:
    """What happened."""

    faults: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    ended_after: list[float] = field(default_factory=list)
    training_after: list[float] = field(default_factory=list)
    recomputed: list[int] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Round:
    """One run, from the first step to the last, through all faults."""

    def __init__(self, corpus: Path, out: Path, rng: random.Random, tally: Tally, deadline: float) -> None:
        self.corpus, self.out, self.rng, self.tally, self.deadline = corpus, out, rng, tally, deadline
        self.used: list[str] = []
        self.kills = 0

    def run(self, layouts: list[str], *, change: bool) -> None:
        """Start again and again until the last checkpoint is there."""
        layout = self.rng.choice(layouts)
        while self.checkpointed() < STEPS and not self.tally.problems:
            self.attempt(layout)
            if change:
                layout = self.rng.choice([name for name in layouts if name != layout] or layouts)

    def done(self) -> int:
        """Steps whose lines are in the metrics."""
        return count_steps(self.out)

    def checkpointed(self) -> int:
        """Step of the newest complete checkpoint."""
        found = [p for p in (self.out / "checkpoints").glob("step-*") if (p / "manifest.json").is_file()]
        return max((int(p.name.split("-")[1]) for p in found if p.suffix != ".partial"), default=0)

    def attempt(self, layout: str) -> None:
        """Start, inject one fault unless the time is up, wait for the end."""
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
                    self.tally.problems.append(f"{self.out.name}: continued at {begun}, {resumed} was complete")
                if time.monotonic() < self.deadline:
                    self.inject_fault(job)
                job.wait(PATIENCE)
            except (TimeoutError, subprocess.TimeoutExpired) as error:
                self.tally.problems.append(f"{self.out.name}: stuck in {layout}: {error}")
            finally:
                end_all(job)
        self.tally.recomputed.append(self.done() - self.checkpointed())

    def starts(self) -> list[dict[str, Any]]:
        """Start events of all attempts so far."""
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

    def inject_fault(self, job: subprocess.Popen[bytes]) -> None:
        """Wait a random while, then signal something; the time until the job has ended is recorded."""
        kind = self.rng.choice(FAULTS)
        if kind == "freeze" and len(workers(job)) == 1:
            kind = "rank"  # a stopped process that is alone has nobody to notice it
        step = min(self.done() + self.rng.randrange(1, 2 * EVERY), STEPS)
        in_save = kind == "writer" or self.rng.random() < 0.3
        end = time.monotonic() + PATIENCE
        while job.poll() is None and time.monotonic() < end:
            saving = any((self.out / "checkpoints").glob("*.partial"))
            if (saving and in_save) or (self.done() >= step and not in_save):
                break
            time.sleep(0.002)
        time.sleep(self.rng.choice((0.0, 0.0, 0.02, 0.1, 0.3)))
        ranks = workers(job)
        if not ranks:
            return  # the run was faster
        targets = [self.rng.choice(ranks)]
        writers = [child for rank in ranks for child in children(rank) if "resource_tracker" not in line_of(child)]
        if kind == "writer" and writers:
            targets = [self.rng.choice(writers)]
        elif kind == "writer":
            kind = "rank"  # the writer is a thread of the rank
        number = {"stop": signal.SIGTERM, "freeze": signal.SIGSTOP}.get(kind, signal.SIGKILL)
        if kind == "job":
            targets = [psutil.Process(job.pid), *ranks]
        injected = time.monotonic()
        for target in targets:
            send(target, number)
        self.tally.faults[kind + (" in a save" if in_save else "")] += 1
        self.kills += number == signal.SIGKILL
        if kind == "stop" and (job.wait(PATIENCE) != 0 or self.done() != self.checkpointed()):
            self.tally.problems.append(
                f"{self.out.name}: SIGTERM: exit code {job.returncode}, {self.done()} steps, "
                f"checkpoint {self.checkpointed()}"
            )
        if kind in ("rank", "stop", "freeze"):
            job.wait(PATIENCE)
            self.tally.ended_after.append(time.monotonic() - injected - TIMEOUT * (kind == "freeze"))


def compare(out: Path, undisturbed: Path, *, bitwise: bool) -> dict[str, Any]:
    """Every step's loss, gradient norm and documents against the undisturbed run."""
    left, right = records(undisturbed), records(out)
    if left.keys() != right.keys():
        return {
            "steps": len(right),
            "different": sorted(left.keys() ^ right.keys()),
            "largest_relative_difference": float("inf"),
            "holds": False,
        }
    worst = max(abs(right[s]["loss"] - left[s]["loss"]) / abs(left[s]["loss"]) for s in left)
    names = ("loss", "grad_norm", "contrastive", "generation", "order_hash") if bitwise else ("order_hash",)
    different = [s for s in left if any(left[s][name] != right[s][name] for name in names)]
    return {
        "steps": len(left),
        "different": different,
        "largest_relative_difference": worst,
        "holds": not different and worst <= 1e-5,
    }


def summary(tally: Tally, layouts: list[str], seed: int, seconds: float) -> dict[str, Any]:
    """The report's numbers."""
    same = [r for r in tally.rounds if not r["changing"]]
    changed = [r for r in tally.rounds if r["changing"]]
    return {
        "minutes": round(seconds / 60, 1),
        "seed": seed,
        "rounds": len(tally.rounds),
        "injected_faults": dict(sorted(tally.faults.items())),
        "injected_faults_total": sum(tally.faults.values()),
        "starts": sum(tally.starts.values()),
        "restarts": sum(tally.starts.values()) - len(tally.rounds),
        "layouts_offered": layouts,
        "starts_by_layout": dict(tally.starts),
        "same_layout": {
            "rounds": len(same),
            "kills": sum(r["kills"] for r in same),
            "steps_compared": sum(r["steps"] for r in same),
            "steps_not_bitwise_equal": sum(len(r["different"]) for r in same),
        },
        "changing_layout": {
            "rounds": len(changed),
            "kills": sum(r["kills"] for r in changed),
            "steps_compared": sum(r["steps"] for r in changed),
            "steps_with_other_documents": sum(len(r["different"]) for r in changed),
            "largest_relative_difference": max((r["largest_relative_difference"] for r in changed), default=0.0),
        },
        "steps_lost_beyond_last_checkpoint": sum("continued at" in p for p in tally.problems),
        "most_steps_recomputed": max(tally.recomputed, default=0),
        "seconds_from_fault_to_end_of_job": quantiles(tally.ended_after),
        "seconds_from_start_to_first_step": quantiles(tally.training_after),
        "problems": tally.problems,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    same, changed = report["same_layout"], report["changing_layout"]
    faults = ", ".join(f"{count} {kind}" for kind, count in report["injected_faults"].items())
    layouts = ", ".join(f"{name} ({count})" for name, count in report["starts_by_layout"].items())
    rows = {
        "injected faults": f"{report['injected_faults_total']}: {faults}",
        "rounds, starts, restarts": f"{report['rounds']}, {report['starts']}, {report['restarts']}",
        "layouts (starts)": layouts,
        "same layout: SIGKILLs, steps compared, not bitwise equal": f"{same['kills']}, {same['steps_compared']}, "
        f"{same['steps_not_bitwise_equal']}",
        "changing layout: SIGKILLs, steps compared, other documents": f"{changed['kills']}, "
        f"{changed['steps_compared']}, {changed['steps_with_other_documents']}",
        "changing layout: largest relative difference of a loss": f"{changed['largest_relative_difference']:.1e}",
        "restarts that lost steps beyond the last complete checkpoint": report["steps_lost_beyond_last_checkpoint"],
        "most steps recomputed after a fault": report["most_steps_recomputed"],
        "seconds from a fault to the end of the job (timeout subtracted)": _quantiles(
            report["seconds_from_fault_to_end_of_job"]
        ),
        "seconds from start to the first step": _quantiles(report["seconds_from_start_to_first_step"]),
        "problems": "; ".join(report["problems"]) or "none",
    }
    return "\n".join(
        [
            "# Soak",
            "",
            f"`{report['command']}`, {report['minutes']} minutes on {report['machine']}; commit {report['commit']}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
        ]
    )


def _quantiles(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=8, help="largest layout to use")
    parser.add_argument("--report", type=Path, default=HERE / "soak.json")
    parser.add_argument("--keep", type=Path, help="folder for runs and logs (default: a temporary one)")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus"
    if not corpus.is_dir():
        make_corpus(corpus)
    about = facts(f"python campaigns/soak.py --minutes {options.minutes:g} --seed {options.seed}")
    tally, rng = Tally(), random.Random(options.seed)
    layouts = accepted(corpus, folder / "none", options.ranks)
    began = time.monotonic()
    deadline = began + 60 * options.minutes
    while time.monotonic() < deadline and not tally.problems:
        number = len(tally.rounds)
        change = number % 2 == 1
        mine = layouts if change else [rng.choice(layouts)]
        paused = time.monotonic()
        undisturbed = reference(corpus, folder, "dp1" if change else mine[0])
        deadline += time.monotonic() - paused  # only minutes with faults count
        faulted = Round(corpus, folder / f"round-{number}", rng, tally, deadline)
        faulted.run(mine, change=change)
        result = compare(faulted.out, undisturbed, bitwise=not change) | {
            "layouts": faulted.used,
            "changing": change,
            "kills": faulted.kills,
        }
        tally.rounds.append(result)
        print(
            f"round {number}: {' > '.join(faulted.used)}: {'holds' if result['holds'] else 'DOES NOT HOLD'}, largest "
            f"relative difference {result['largest_relative_difference']:.1e}",
            flush=True,
        )
        if not result["holds"]:
            tally.problems.append(f"round {number} differs at steps {result['different'][:5]}")
    report = about | summary(tally, layouts, options.seed, time.monotonic() - began)
    write(options.report, report)
    options.report.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    if options.keep is None and not tally.problems:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
