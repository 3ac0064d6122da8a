#!/usr/bin/env python
"""The launch templates on a real SLURM of two nodes: pre-emption, time limit, crash, lost node, cancellation.

    make slurm-test        # 8 minutes on two quiet cores

One run is disturbed in every way that SLURM has; its losses and documents must then equal, bit for bit, those of a
run that was left alone. Writes a report (runs/slurm-test/slurm.json; the last one kept is campaigns/slurm.json) and
leaves with 1 if any check fails. No root, nothing is installed: see
slurm_cluster.py.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs import DROPPING, EXACT, MODEL, ROOT, count_steps, facts, make_corpus, records, write
from slurm_cluster import GRACE_SECONDS, Cluster, unpack_packages

STEPS, EVERY = 150, 20
PATIENCE = 1200.0
"""Seconds for what ends by itself: a busy machine takes minutes to start a process."""
SMALL = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=0", "--time=60")
TRAINER = r"^\S*python\S* -u tools/pretrain_lcl\.py"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Job:
    """One run under the template, watched from outside."""

    def __init__(self, slurm: Cluster, folder: Path, name: str, **environment: str) -> None:
        self.slurm, self.out, self.log = slurm, folder / name, folder / f"{name}.log"
        self.number = slurm.submit(
            *SMALL,
            f"--output={self.log}",
            "examples/slurm/8-nodes.sbatch",
            "--recipe",
            "demo",
            "--data",
            str(folder / "pairs"),
            "--tokenizer",
            str(folder),
            "--out",
            str(self.out),
            "--steps",
            str(STEPS),
            "--micro-batch-size",
            "2",
            "--global-batch-size",
            "8",
            "--checkpoint-every",
            str(EVERY),
            "--log-every",
            "10",
            "--timeout",
            "60",
            "--set",
            *MODEL,
            *DROPPING,
            cwd=ROOT,
            OMP_NUM_THREADS="1",
            LCL_PYTHON=sys.executable,
            **environment,
        )

    def steps(self) -> int:
        return count_steps(self.out)

    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    def resumes(self) -> list[int]:
        """Steps done at every resume so far, in time order."""
        logs = sorted(self.out.glob("logs/*/train-*.log"), key=lambda p: p.stat().st_mtime)
        found = [re.findall(r"resume: \S+, (\d+) steps done", p.read_text(errors="replace")) for p in logs]
        return [int(step) for steps in found for step in steps]

    def wait(self, condition: Callable[[], Any], what: str) -> float:
        return self.slurm.wait_for(condition, f"job {self.number}: {what}", PATIENCE)

    def finish(self) -> str:
        self.wait(lambda: self.state() in ENDED, "its end")
        return self.state()


class Campaign:
    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.checks: dict[str, bool] = {}
        self.events: list[dict[str, Any]] = []

    def check(self, name: str, ok: bool) -> None:
        self.checks[name] = ok
        print(f"{'ok  ' if ok else 'FAIL'} {name}", flush=True)

    @contextmanager
    def event(self, job: Job, what: str, at: int) -> Iterator[None]:
        """Disturb `job` once it is past step `at`; then wait until it has resumed and is past where it was."""
        resumed = len(job.resumes())
        job.wait(lambda: job.steps() >= at, f"step {at}")
        before, started = job.steps(), time.monotonic()
        yield
        reached = before
        while len(job.resumes()) == resumed:
            reached = max(reached, job.steps())
            if time.monotonic() - started > PATIENCE:
                raise TimeoutError(f"job {job.number} did not resume after: {what}; logs in {job.out}/logs")
            time.sleep(0.1)
        first = job.resumes()[-1]
        job.wait(lambda: job.steps() > reached, f"step {reached + 1} after {what}")
        self.events.append(
            {
                "event": what,
                "steps_before": before,
                "steps_when_ended": reached,
                "resumed_at_step": first,
                "steps_recomputed": max(0, reached - first),
                "restarts_by_slurm": int(self.slurm.job(job.number)["Restarts"]),
                "seconds_to_pass_again": round(time.monotonic() - started, 1),
            }
        )
        print(json.dumps(self.events[-1]), flush=True)

    def run(self) -> None:
        quiet = Job(self.slurm, self.folder, "undisturbed", LCL_PREFLIGHT="skip")
        self.check("undisturbed run completes", quiet.finish() == "COMPLETED")
        job = Job(self.slurm, self.folder, "disturbed", LCL_PREFLIGHT="skip")
        self.disturb(job)
        self.check("disturbed run completes", job.finish() == "COMPLETED")
        self.compare(quiet, job)
        self.cancel()
        self.refuse()

    def disturb(self, job: Job) -> None:
        call = self.slurm.call
        with self.event(job, "pre-empted by a job of higher priority", 20):
            urgent = self.slurm.submit(
                "--nodes=2", "--exclusive", "--partition=high", "--output=/dev/null", "--wrap", "sleep 3"
            )
            self.slurm.wait_for(lambda: self.slurm.job(urgent)["JobState"] == "COMPLETED", "urgent job", PATIENCE)
        self.check("pre-emption: no step recomputed", self.events[-1]["steps_recomputed"] == 0)
        with self.event(job, "SIGKILL to one trainer process", 45):
            killed = self.slurm.signal_processes(TRAINER, signal.SIGKILL, 1)
            self.check("one process was killed", len(killed) == 1)
        self.check("crash: restarted in place", self.events[-1]["restarts_by_slurm"] == 1)
        self.check("crash: back to the last checkpoint", self.events[-1]["resumed_at_step"] % EVERY == 0)
        with self.event(job, "time limit (SIGUSR2 two minutes before it)", 65):
            minutes = int(self.slurm.job(job.number)["RunTime"].split(":")[-2]) + 2
            call("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
            job.wait(lambda: self.requeued_while_held(job, "2"), "requeue at the time limit")
            call("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        self.check("time limit: no step recomputed", self.events[-1]["steps_recomputed"] == 0)
        with self.event(job, "a node lost (set DOWN)", 115):
            call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
            job.wait(lambda: self.slurm.job(job.number)["Restarts"] == "3", "requeue after the lost node")
            # Refused when the node has come back by itself.
            call("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)
        # This "lost" node lives on, so SLURM's late SIGKILL for the old attempt can hit the new one: one more requeue.
        self.check("four disturbances, three or four requeues", self.events[-1]["restarts_by_slurm"] in (3, 4))

    def requeued_while_held(self, job: Job, restarts: str) -> bool:
        """Slow the run down: SLURM looks at time limits every half minute, in which a quiet machine would finish."""
        if not list(job.out.glob(f"logs/{job.number}-1/stopped-by-request")):
            for number, seconds in ((signal.SIGSTOP, 3.0), (signal.SIGCONT, 0.1)):
                self.slurm.signal_processes(TRAINER, number, 99)
                time.sleep(seconds)
        return self.slurm.job(job.number)["Restarts"] == restarts

    def compare(self, quiet: Job, job: Job) -> None:
        left, right = records(quiet.out), records(job.out)
        self.check(f"both have {STEPS} steps", len(left) == len(right) == STEPS)
        different = [s for s in left if any(left[s][key] != right.get(s, {}).get(key) for key in EXACT)]
        self.check(f"bitwise equal at every step: {', '.join(EXACT)}", different == [])

    def cancel(self) -> None:
        job = Job(self.slurm, self.folder, "cancelled", LCL_PREFLIGHT="skip")
        job.wait(lambda: job.steps() >= EVERY + 5, "some steps")
        self.slurm.call("scancel", job.number)
        self.check("scancel ends the job", job.finish() == "CANCELLED")
        saved = sorted((job.out / "checkpoints").glob("step-*[0-9]"))[-1]
        self.check("scancel: saved where it was", int(saved.name[5:]) == job.steps() > EVERY)
        time.sleep(5)
        after = self.slurm.job(job.number)
        self.check("scancel: not queued again", (after["JobState"], after["Restarts"]) == ("CANCELLED", "0"))

    def refuse(self) -> None:
        job = Job(self.slurm, self.folder, "refused", LCL_PREFLIGHT="--min-bandwidth 100000")
        self.check("failed preflight fails the job", job.finish() == "FAILED")
        after = self.slurm.job(job.number)
        preflight = (job.out / f"logs/{job.number}-0/preflight-0.log").read_text()
        self.check("preflight tried storage from both nodes", "run folder from 2 nodes" in preflight)
        self.check("failed preflight: no training, not queued again", job.steps() == 0 and after["Restarts"] == "0")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", type=Path, default=Path("runs/slurm-test/slurm.json"))
    parser.add_argument("--packages", type=Path, default=ROOT / ".cache/slurm", help="where SLURM is unpacked")
    args = parser.parse_args()
    try:
        root = unpack_packages(args.packages)
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(f"error: no SLURM to test with: {error}", file=sys.stderr)
        return 2
    about = facts("make slurm-test")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaving stops the daemons
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, started = Path(tempfile.mkdtemp(prefix="lcl-slurm-")), time.monotonic()
    make_corpus(folder)
    with Cluster(folder / "cluster", root) as slurm:
        campaign = Campaign(slurm, folder)
        version = slurm.call("sinfo", "--version").strip()
        print(f"{version}, nodes {slurm.node_states()}, folder {folder}", flush=True)
        try:
            campaign.run()
        except (TimeoutError, RuntimeError) as error:  # the report still says what was found before
            campaign.check(str(error), False)
    report = about | {
        "nodes": "two SLURM nodes on one machine without a GPU",
        "slurm": version,
        "steps": STEPS,
        "checkpoint_every": EVERY,
        "grace_seconds": GRACE_SECONDS,
        "seconds": round(time.monotonic() - started),
        "events": campaign.events,
        "checks": campaign.checks,
        "passed": all(campaign.checks.values()),
    }
    write(args.report, report)
    print(f"{'passed' if report['passed'] else 'FAILED'}: {args.report}")
    if report["passed"]:
        shutil.rmtree(folder)
    else:
        print(f"logs are kept in {folder}")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
