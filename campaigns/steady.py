#!/usr/bin/env python
"""Train 2,000 steps on 4 processes and watch memory, open files and threads of each.

    python campaigns/steady.py --steps 2000 --ranks 4

Writes campaigns/steady.json; exit code 1 if something grew: a line through resident memory after the first
fifth of the steps that rises by more than 1 MiB per 100 steps, or more open files or threads in the last quarter of
the samples than in the first (medians).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from jobs import HERE, arguments_of, count_steps, end_all, facts, make_corpus, records, start, workers, write

MIB_PER_100_STEPS = 1.0
FEWEST_SAMPLES = 8


def sample(process: psutil.Process) -> tuple[int, int, int]:
    """Resident bytes, open files (sockets too), threads."""
    with process.oneshot():
        return process.memory_info().rss, process.num_fds(), process.num_threads()


def watch(steps: int, ranks: int, folder: Path) -> dict[str, list[tuple[int, ...]]]:
    """Samples (step, bytes, files, threads) of each rank, about every 20 steps, never during a save."""
    corpus, out = folder / "corpus", folder / "run"
    make_corpus(corpus)
    arguments = arguments_of(corpus, out, f"dp{ranks}")
    for flag, value in (("--steps", steps), ("--checkpoint-every", 200), ("--log-every", 100)):
        arguments[arguments.index(flag) + 1] = str(value)
    seen: dict[str, list[tuple[int, ...]]] = {}
    with open(folder / "run.log", "w", encoding="utf-8") as log:
        job = start(ranks, arguments, log)
        try:
            last = 0
            while job.poll() is None:
                step = count_steps(out)
                if step >= last + 20 and step % 200 > 20:
                    last = step
                    for process in workers(job):
                        seen.setdefault(str(process.pid), []).append((step, *sample(process)))
                time.sleep(0.05)
        finally:
            end_all(job)
    if job.returncode:
        raise RuntimeError(f"the run ended with {job.returncode}: see {log.name}")
    return seen


def growth(samples: list[tuple[int, ...]]) -> dict[str, float | int | bool]:
    """Growth of one rank after the first fifth of the run.

    Raises:
        RuntimeError: too few samples to say.
    """
    later = [s for s in samples if s[0] > samples[-1][0] / 5]
    if len(later) < FEWEST_SAMPLES:
        raise RuntimeError(f"{len(later)} samples after the first fifth of the steps: train for longer")
    slope = statistics.linear_regression([s[0] for s in later], [s[1] for s in later]).slope
    mib = slope * 100 / 2**20
    quarter = len(later) // 4
    files, threads = (
        statistics.median(s[column] for s in later[-quarter:]) - statistics.median(s[column] for s in later[:quarter])
        for column in (2, 3)
    )
    return {
        "samples": len(later),
        "mib_per_100_steps": round(mib, 3),
        "resident_mib": round(later[-1][1] / 2**20, 1),
        "files": later[-1][2],
        "files_more": files,
        "threads": later[-1][3],
        "threads_more": threads,
        "holds": mib <= MIB_PER_100_STEPS and files <= 0 and threads <= 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=4, choices=(2, 4))
    parser.add_argument("--report", type=Path, default=HERE / "steady.json")
    options = parser.parse_args()
    about = facts(f"python campaigns/steady.py --steps {options.steps} --ranks {options.ranks}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="steady-") as folder:
        ranks = [growth(samples) for samples in watch(options.steps, options.ranks, Path(folder)).values()]
        lines = list(records(Path(folder) / "run").values())
    fifth = len(lines) // 5
    report = about | {
        "steps": len(lines),
        "bound_mib_per_100_steps": MIB_PER_100_STEPS,
        "ranks": ranks,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "median_step_seconds_second_fifth": statistics.median(r["step_seconds"] for r in lines[fifth : 2 * fifth]),
        "median_step_seconds_last_fifth": statistics.median(r["step_seconds"] for r in lines[-fifth:]),
    }
    write(options.report, report)
    print(json.dumps(report, indent=1))
    return 0 if len(ranks) == options.ranks and all(rank["holds"] for rank in ranks) else 1


if __name__ == "__main__":
    sys.exit(main())
