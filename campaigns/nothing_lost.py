#!/usr/bin/env python
"""Kill runs at random and damage their folders between starts: nothing that was saved may be lost.

    python campaigns/nothing_lost.py --kills 200

Runs of STEPS steps in random layouts are started, disturbed and started again until they are complete. While they
train: SIGKILL of a rank, of all ranks or of a rank that is writing a checkpoint, SIGTERM, a disk that is full for a
while, a second job in the same folder. Between starts, as long as an older intact checkpoint is there: one bit, the
end or a whole file of the newest checkpoint goes, it is renamed to a later step, folders and files with the names of
later checkpoints appear, metrics and events are damaged. After every start and every end must hold:

1. the newest intact checkpoint is at least the newest one that was reported complete and not damaged from outside;
2. the run goes on at exactly the newest intact checkpoint, and never at step 0 while there is one;
3. of two jobs in one folder one trains, and the other ends with a sentence.

At the end each run's losses are those of an undisturbed run in one process (1e-5, and the same documents in every
batch). Everything random comes from --seed, except how fast the machine is. Writes campaigns/nothing_lost.json and
.md; exit code 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import EVERY, HERE, LAYOUTS, ROOT, STEPS, accepted, arguments_of, facts, make_corpus, write

sys.path[:0] = [str(ROOT / "tests")]
from launch import Job, run_script  # noqa: E402
from lcl_mcore.checkpoint.store import complete_checkpoints, step_of, verify  # noqa: E402
from lcl_mcore.fault_tolerance.events import read_events  # noqa: E402
from lcl_mcore.metrics import read_steps  # noqa: E402

PATIENCE = 240.0  # seconds without what is waited for, after which the run counts as stuck
COMPLETE = re.compile(r"step-(\d{8}) complete")
KILLS = ("rank", "rank", "all ranks", "writer", "writer")
GARBAGE = b'{}\n3\nnull\n\xff\xfe\n{"step": "x"}\n{"event": 7}\n{"step": 2, "st'


@dataclass
class Tally:
    """What happened in all runs."""

    kills: Counter[str] = field(default_factory=Counter)
    disturbances: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    recomputed: list[int] = field(default_factory=list)
    lines_lost: int = 0
    worst: float = 0.0
    steps_compared: int = 0
    problems: list[str] = field(default_factory=list)


class DisturbedRun:
    """One run from its first step to its last."""

    def __init__(self, corpus: Path, out: Path, layouts: list[str], rng: random.Random, tally: Tally) -> None:
        self.corpus, self.out, self.layouts, self.rng, self.tally = corpus, out, layouts, rng, tally
        self.folder = out / "checkpoints"

    def problem(self, text: str) -> None:
        self.tally.problems.append(f"{self.out.name}: {text}")

    def intact(self) -> list[Path]:
        """Checkpoints whose every byte is right and whose name is their step, oldest first."""
        return [path for path in complete_checkpoints(self.folder) if not verify(path)] if self.out.is_dir() else []

    def newest(self) -> int:
        """Step of the newest intact checkpoint, 0 without one."""
        return max((step_of(path.name) or 0 for path in self.intact()), default=0)

    # --- between starts ---

    def damage(self) -> None:
        """Do one harm from outside that leaves an older checkpoint to go on from."""
        intact = self.intact()
        if len(intact) < 2:
            return
        newest = intact[-1]
        files = sorted(path for path in newest.iterdir() if path.is_file())
        chosen = self.rng.choice(files)
        later = self.folder / f"step-{STEPS + self.rng.randrange(1, 50):08d}"
        harm: dict[str, Callable[[], Any]] = {
            "a bit": lambda: _flip(chosen, self.rng),
            "a file's end": lambda: chosen.write_bytes(
                chosen.read_bytes()[: self.rng.randrange(chosen.stat().st_size)]
            ),
            "a file": chosen.unlink,
            "renamed to a later step": lambda: newest.rename(later),
            "an empty folder of a later step": lambda: later.mkdir(exist_ok=True),
            "a file in the place of a later step": lambda: later.exists() or later.write_bytes(b"x"),
            "a later step without a manifest": lambda: _without_manifest(newest, later),
            "an unfinished save": lambda: shutil.copytree(newest, later.with_suffix(".partial"), dirs_exist_ok=True),
            "metrics": lambda: _append(self.out / "metrics.jsonl"),
            "events": lambda: _append(self.out / "events.jsonl"),
        }
        kind = self.rng.choice(sorted(harm))
        harm[kind]()
        self.tally.damage[kind] += 1

    # --- one start ---

    def attempt(self, *, disturbed: bool) -> None:
        """Start, disturb, wait for the end, and see what is left."""
        expected = self.newest()
        layout = self.rng.choice(self.layouts)
        ranks = LAYOUTS[layout][0]
        self.tally.starts[layout] += 1
        starts = len(self.starts())
        script, full = ["tools/pretrain_lcl.py"], disturbed and self.rng.random() < 0.2
        if full:
            when, length = self.rng.uniform(0.0, 3.0), self.rng.uniform(0.2, 2.0)
            script = ["campaigns/full_disk.py", f"{when:.2f}", f"{length:.2f}", str(self.rng.choice((0, 1000, 30_000)))]
            self.tally.disturbances["full disk"] += 1
        with Job(ranks, *script, *arguments_of(self.corpus, self.out, layout), "--resume") as job:
            begun = self.wait_for_start(job, starts, full)
            if begun not in (None, expected):
                self.problem(f"went on at step {begun}, step {expected} was intact ({layout})")
            if disturbed and job.poll() is None:
                self.disturb(job, expected, layout)
            try:
                job.wait(PATIENCE)
            except subprocess.TimeoutExpired as error:
                self.problem(f"stuck in {layout}: {error}")
            printed = job.stdout
            if not disturbed and job.returncode:
                self.problem(f"ended with {job.returncode}: {job.stderr.strip()[-300:]}")
        reported = max((int(found) for found in COMPLETE.findall(printed)), default=expected)
        left = self.newest()
        if left < max(reported, expected):
            self.problem(f"step {max(reported, expected)} was complete, {left} is the newest intact one ({layout})")
        self.tally.recomputed.append(max(0, self.logged() - left))

    def starts(self) -> list[dict[str, Any]]:
        return [event for event in read_events(self.out) if event["event"] == "start"]

    def logged(self) -> int:
        """The last step of the metrics."""
        return max((record["step"] for record in read_steps(self.out / "metrics.jsonl")), default=0)

    def wait_for_start(self, job: Job, starts: int, full: bool) -> int | None:
        """The step at which this attempt begins; None if it ended before, or a full disk keeps it from saying so."""
        end = time.monotonic() + PATIENCE
        while len(found := self.starts()) == starts:
            if job.poll(0.05) is not None or (full and time.monotonic() > end - PATIENCE + 20):
                if job.returncode and not full:
                    self.problem(f"did not start: {(job.stderr or job.stdout).strip()[-300:]}")
                return None
            if time.monotonic() > end:
                self.problem(f"did not start within {PATIENCE:.0f} s")
                return None
        return int(found[-1]["step"])

    def disturb(self, job: Job, begun: int, layout: str) -> None:
        """Wait a random while, then do one thing to the job."""
        if self.rng.random() < 0.12:
            self.second_job(job)
        step = begun + self.rng.randrange(1, 2 * EVERY + 1)
        kind = self.rng.choice((*KILLS, "SIGTERM"))
        end = time.monotonic() + PATIENCE
        while job.poll(0.005) is None and time.monotonic() < end:
            saving = any(self.folder.glob("*.partial"))
            if saving if kind == "writer" else self.logged() >= step:
                break
        time.sleep(self.rng.choice((0.0, 0.0, 0.01, 0.05, 0.2)))
        if job.poll() is not None:
            return  # the run was faster
        if kind == "SIGTERM":
            self.tally.disturbances[kind] += 1
            job.signal(self.rng.randrange(len(job.pids)), signal.SIGTERM)
            return
        self.tally.kills[kind] += 1
        chosen = range(len(job.pids)) if kind == "all ranks" else [self.rng.randrange(len(job.pids))]
        for rank in chosen:
            job.signal(rank, signal.SIGKILL)

    def second_job(self, job: Job) -> None:
        """Another job in the same folder: it must end by itself with a sentence, and the first one trains on."""
        done = run_script(
            "tools/pretrain_lcl.py", *arguments_of(self.corpus, self.out, "dp1"), "--resume", timeout=PATIENCE
        )
        if job.poll() is not None:
            return  # the first one ended meanwhile: then the second one may train
        self.tally.disturbances["second job"] += 1
        if done.returncode == 0 or "Traceback" in done.stderr or "error: " not in done.stderr:
            self.problem(f"a second job ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")

    def run(self, kills: int) -> None:
        """Until the last step is there; no more than `kills` from now on."""
        limit = sum(self.tally.kills.values()) + kills
        while self.newest() < STEPS and not self.tally.problems:
            disturbed = sum(self.tally.kills.values()) < limit
            if disturbed and self.rng.random() < 0.5:
                self.damage()
            self.attempt(disturbed=disturbed)

    def compare(self, undisturbed: Path) -> None:
        """Losses and documents of every step beside the undisturbed run."""
        right = {record["step"]: record for record in read_steps(undisturbed / "metrics.jsonl")}
        mine = {record["step"]: record for record in read_steps(self.out / "metrics.jsonl")}
        self.tally.lines_lost += len(right.keys() - mine.keys())
        self.tally.steps_compared += len(mine)
        for step, record in mine.items():
            difference = abs(record["loss"] - right[step]["loss"]) / abs(right[step]["loss"])
            self.tally.worst = max(self.tally.worst, difference)
            if record["order_hash"] != right[step]["order_hash"] or not difference <= 1e-5:
                self.problem(f"step {step} differs: loss by {difference:.1e}")
                return


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _without_manifest(source: Path, copy: Path) -> None:
    if not copy.exists():
        shutil.copytree(source, copy)
        (copy / "manifest.json").unlink()


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(GARBAGE)


def campaign(folder: Path, kills: int, seed: int, ranks: int = 4) -> Tally:
    """Disturb runs until `kills` processes were killed.

    Args:
        folder: for corpus, runs and their logs.
        ranks: of the largest layout.
    """
    corpus, tally, rng = folder / "corpus", Tally(), random.Random(seed)
    make_corpus(corpus)
    layouts = accepted(corpus, folder / "none", ranks)
    undisturbed = folder / "undisturbed"
    done = run_script("tools/pretrain_lcl.py", *arguments_of(corpus, undisturbed, "dp1"))
    assert done.returncode == 0, done.stderr
    while (left := kills - sum(tally.kills.values())) > 0 and not tally.problems:
        run = DisturbedRun(corpus, folder / f"run-{seed}-{sum(tally.starts.values())}", layouts, rng, tally)
        run.run(min(left, 10))
        run.compare(undisturbed)
        print(
            f"{run.out.name}: {sum(tally.kills.values())} kills in {sum(tally.starts.values())} starts so far, "
            f"largest relative difference {tally.worst:.1e}, {len(tally.problems)} problems",
            flush=True,
        )
        if not tally.problems:
            shutil.rmtree(run.out)
    return tally


def rows(tally: Tally) -> dict[str, Any]:
    """The report's numbers."""
    return {
        "kills": dict(sorted(tally.kills.items())),
        "kills_total": sum(tally.kills.values()),
        "other_disturbances": dict(sorted(tally.disturbances.items())),
        "damage_between_starts": dict(sorted(tally.damage.items())),
        "starts_by_layout": dict(sorted(tally.starts.items())),
        "starts_total": sum(tally.starts.values()),
        "steps_compared": tally.steps_compared,
        "largest_relative_difference_of_a_loss": tally.worst,
        "steps_lost_beyond_the_newest_intact_checkpoint": sum("went on at" in text for text in tally.problems),
        "mean_steps_recomputed_after_an_end": round(sum(tally.recomputed) / max(len(tally.recomputed), 1), 2),
        "metrics_lines_lost_with_a_kill_on_a_full_disk": tally.lines_lost,
        "problems": tally.problems,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
        if isinstance(value, list):
            return "; ".join(value) or "none"
        return f"{value:.1e}" if isinstance(value, float) and 0 < value < 1e-2 else str(value)

    about = f"`{report['command']}` on {report['machine']}; commit {report['commit']}, {report['date']}."
    names = [name for name in report if name in rows(Tally()) or name in ("minutes", "seed")]
    lines = [f"| {name.replace('_', ' ')} | {cell(report[name])} |" for name in names]
    return "\n".join(["# Nothing lost", "", about, "", "| | |", "|---|---|", *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=4, help="of the largest layout")
    parser.add_argument("--report", type=Path, default=HERE / "nothing_lost.json")
    options = parser.parse_args()
    about = facts(f"python campaigns/nothing_lost.py --kills {options.kills} --seed {options.seed}")
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="nothing-lost-"))
    tally = campaign(folder, options.kills, options.seed, options.ranks)
    report = about | {"minutes": round((time.monotonic() - began) / 60, 1), "seed": options.seed} | rows(tally)
    write(options.report, report)
    options.report.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    if tally.problems:
        print(f"runs and logs: {folder}")
        return 1
    with suppress(OSError):
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
