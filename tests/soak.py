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
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training"), str(ROOT / "tests" / "data")]

from corpora import make_dataset, small_tokenizer  # noqa: E402
from lcl_mcore.config.cli import parse_flags, resolve  # noqa: E402
from lcl_mcore.config.restart import EVENTS  # noqa: E402
from lcl_mcore.errors import ConfigError  # noqa: E402
from lcl_mcore.platform.device import cpu_name  # noqa: E402
from lcl_mcore.platform.probe import megatron_version  # noqa: E402
from runs import records  # noqa: E402

STEPS, EVERY, TIMEOUT = 40, 4, 30.0
PATIENCE = 240.0  # seconds without a new step, after which the run counts as stuck
STRIKES = ("rank", "rank", "rank", "writer", "writer", "job", "stop", "freeze")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp1": (1, ()),
    "dp2": (2, ()),
    "dp4": (4, ()),
    "tp2": (2, ("--tp", "2")),
    "tp2 sp": (2, ("--tp", "2", "--sequence-parallel")),
    "tp2 dp2": (4, ("--tp", "2")),
    "pp2": (2, ("--pp", "2")),
    "pp2 dp2": (4, ("--pp", "2")),
    "tp2 pp2": (4, ("--tp", "2", "--pp", "2")),
    "tp2 pp2 dp2": (8, ("--tp", "2", "--pp", "2")),
}
TINY = (
    "model.vision.image_size=32", "model.vision.width=32", "model.vision.layers=2", "model.vision.heads=4",
    "model.vision.mlp_width=64", "model.vision.drop_path=0", "model.language.width=32",
    "model.language.layers=2", "model.language.heads=4", "model.language.mlp_width=64",
    "model.language.dropout=0", "model.language.vocab_size=400", "model.pool_heads=4",
    "data.sequence_length=64", "data.decode_backend=cpu", "log.tensorboard=false",
)  # fmt: skip


@dataclass
class Tally:
    """What happened."""

    strikes: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    ended_after: list[float] = field(default_factory=list)
    training_after: list[float] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Round:
    """One run, from the first step to the last, however often it is struck."""

    def __init__(self, corpus: Path, out: Path, draw: random.Random, tally: Tally, deadline: float) -> None:
        self.corpus, self.out, self.draw, self.tally, self.deadline = corpus, out, draw, tally, deadline
        self.used: list[str] = []

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
        if kind == "stop" and (job.wait(PATIENCE) != 0 or self.done() != self.checkpointed()):
            self.tally.problems.append(
                f"{self.out.name}: SIGTERM: exit code {job.returncode}, {self.done()} steps, "
                f"checkpoint {self.checkpointed()}"
            )
        if kind in ("rank", "stop", "freeze"):
            job.wait(PATIENCE)
            self.tally.ended_after.append(time.monotonic() - struck - TIMEOUT * (kind == "freeze"))


def arguments_of(corpus: Path, out: Path, layout: str) -> list[str]:
    return [
        "--recipe", "demo", "--data", str(corpus / "pairs"), "--tokenizer", str(corpus), "--out", str(out),
        "--steps", str(STEPS), "--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "1e-3",
        "--checkpoint-every", str(EVERY), "--log-every", "1", "--timeout", str(TIMEOUT), "--set", *TINY,
        *LAYOUTS[layout][1],
    ]  # fmt: skip


def accepted(corpus: Path, out: Path, ranks: int) -> list[str]:
    """Layouts that the configuration accepts here."""
    found = []
    for name, (count, _) in LAYOUTS.items():
        try:
            resolve(parse_flags(arguments_of(corpus, out, name))).check_processes(count)
        except ConfigError as error:
            print(f"layout {name} left out: {error}")
            continue
        if count <= ranks:
            found.append(name)
    return found


def start(count: int, arguments: list[str], log: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
               "tools/pretrain_lcl.py"]  # fmt: skip
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def workers(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks: processes that the launcher started."""
    try:
        return [p for p in psutil.Process(job.pid).children() if "tools/pretrain_lcl.py" in line_of(p)]
    except psutil.NoSuchProcess:
        return []


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def line_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def end_all(job: subprocess.Popen[bytes]) -> None:
    """Nothing of this attempt may be left when the next one starts."""
    rest = workers(job)
    rest += [child for rank in rest for child in children(rank)]
    if job.poll() is None:
        job.kill()
    job.wait(30)
    for process in rest:
        send(process, signal.SIGKILL)
    psutil.wait_procs(rest, timeout=30)


def count_steps(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def reference(corpus: Path, folder: Path, layout: str) -> Path:
    """An undisturbed run in this layout, made once."""
    out = folder / f"undisturbed-{layout.replace(' ', '-')}"
    if not out.is_dir():
        with open(out.with_suffix(".log"), "w", encoding="utf-8") as log:
            job = start(LAYOUTS[layout][0], arguments_of(corpus, out, layout), log)
            try:
                code = job.wait(600)
            finally:
                end_all(job)
        if code:
            raise RuntimeError(f"the undisturbed run in {layout} ended with {code}: see {log.name}")
    return out


def compare(out: Path, undisturbed: Path, *, bitwise: bool) -> dict[str, Any]:
    """Every step's loss, gradient norm and documents against the undisturbed run."""
    left, right = records(undisturbed), records(out)
    if left.keys() != right.keys():
        missing = sorted(left.keys() - right.keys())
        return {
            "steps": len(right),
            "different": missing,
            "largest_relative_difference": float("inf"),
            "holds": False,
        }
    worst = max(abs(right[s]["loss"] - left[s]["loss"]) / abs(left[s]["loss"]) for s in left)
    names = ("loss", "grad_norm", "contrastive", "generation", "order_hash") if bitwise else ("order_hash",)
    different = [s for s in left if any(left[s][name] != right[s][name] for name in names)]
    return {"steps": len(left), "different": different, "largest_relative_difference": worst,
            "holds": not different and worst <= 1e-5}  # fmt: skip


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
        make_dataset(corpus / "pairs")
        small_tokenizer().save(corpus / "tokenizer.json")
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
        }
        tally.rounds.append(result)
        print(f"round {number}: {' > '.join(struck.used)}: {'holds' if result['holds'] else 'DOES NOT HOLD'}, largest "
              f"relative difference {result['largest_relative_difference']:.1e}", flush=True)  # fmt: skip
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


def summary(tally: Tally, layouts: list[str], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    same = [r for r in tally.rounds if not r["changing"]]
    changed = [r for r in tally.rounds if r["changing"]]
    return {
        "machine": machine(),
        "commit": commit(),
        "minutes": round(seconds / 60, 1),
        "seed": options.seed,
        "rounds": len(tally.rounds),
        "strikes": dict(sorted(tally.strikes.items())),
        "strikes_total": sum(tally.strikes.values()),
        "starts": sum(tally.starts.values()),
        "restarts": sum(tally.starts.values()) - len(tally.rounds),
        "layouts_offered": layouts,
        "starts_by_layout": dict(tally.starts),
        "same_layout": {
            "rounds": len(same), "steps_compared": sum(r["steps"] for r in same),
            "steps_not_bitwise_equal": sum(len(r["different"]) for r in same),
        },
        "changing_layout": {
            "rounds": len(changed), "steps_compared": sum(r["steps"] for r in changed),
            "steps_with_other_documents": sum(len(r["different"]) for r in changed),
            "largest_relative_difference": max((r["largest_relative_difference"] for r in changed), default=0.0),
        },
        "steps_lost_beyond_last_checkpoint": sum("continued at" in p for p in tally.problems),
        "most_steps_done_again": max(tally.redone, default=0),
        "seconds_from_strike_to_end_of_job": quantiles(tally.ended_after),
        "seconds_from_start_to_first_step": quantiles(tally.training_after),
        "problems": tally.problems,
    }  # fmt: skip


def machine() -> str:
    return f"{os.cpu_count()} cores of {cpu_name()}, torch {torch.__version__}, megatron-core {megatron_version()}"


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "median": round(statistics.median(values), 2),
        "largest": round(max(values), 2),
        "count": len(values),
    }


def markdown(report: dict[str, Any]) -> str:
    same, changed = report["same_layout"], report["changing_layout"]
    lines = [
        "# Soak test", "",
        f"`python tests/soak.py`, seed {report['seed']}, {report['minutes']} minutes on {report['machine']}; "
        f"commit {report['commit']}.",
        "",
        "| | |", "|---|---|",
        f"| strikes | {report['strikes_total']}: " + ", ".join(f"{v} {k}" for k, v in report["strikes"].items()) + " |",
        f"| rounds, starts, restarts | {report['rounds']}, {report['starts']}, {report['restarts']} |",
        "| layouts (starts) | " + ", ".join(f"{k} ({v})" for k, v in report["starts_by_layout"].items()) + " |",
        f"| same layout: steps compared, not bitwise equal | {same['steps_compared']}, "
        f"{same['steps_not_bitwise_equal']} |",
        f"| changing layout: steps compared, other documents | {changed['steps_compared']}, "
        f"{changed['steps_with_other_documents']} |",
        f"| changing layout: largest relative difference of a loss | {changed['largest_relative_difference']:.1e} |",
        f"| restarts that lost steps beyond the last complete checkpoint | "
        f"{report['steps_lost_beyond_last_checkpoint']} |",
        f"| most steps done again after a strike | {report['most_steps_done_again']} |",
        f"| seconds from strike to the end of the job (timeout left out) | "
        f"{report['seconds_from_strike_to_end_of_job']} |",
        f"| seconds from start to the first step | {report['seconds_from_start_to_first_step']} |",
        f"| problems | {'; '.join(report['problems']) or 'none'} |", "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
