"""What the soak test counts, compares and writes."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lcl_mcore.distributed.device import cpu_name
from lcl_mcore.optional_packages import megatron_version
from runs import records
from soak_jobs import ROOT


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
    return {
        "steps": len(left),
        "different": different,
        "largest_relative_difference": worst,
        "holds": not different and worst <= 1e-5,
    }


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
            "largest_relative_difference": max(
                (r["largest_relative_difference"] for r in changed), default=0.0
            ),
        },
        "steps_lost_beyond_last_checkpoint": sum("continued at" in p for p in tally.problems),
        "most_steps_done_again": max(tally.redone, default=0),
        "seconds_from_strike_to_end_of_job": quantiles(tally.ended_after),
        "seconds_from_start_to_first_step": quantiles(tally.training_after),
        "problems": tally.problems,
    }


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
        "# Soak test",
        "",
        f"`python tests/soak.py`, seed {report['seed']}, {report['minutes']} minutes on {report['machine']}; "
        f"commit {report['commit']}.",
        "",
        "| | |",
        "|---|---|",
        f"| strikes | {report['strikes_total']}: "
        + ", ".join(f"{v} {k}" for k, v in report["strikes"].items())
        + " |",
        f"| rounds, starts, restarts | {report['rounds']}, {report['starts']}, {report['restarts']} |",
        "| layouts (starts) | "
        + ", ".join(f"{k} ({v})" for k, v in report["starts_by_layout"].items())
        + " |",
        f"| same layout: SIGKILLs, steps compared, not bitwise equal | {same['kills']}, {same['steps_compared']}, "
        f"{same['steps_not_bitwise_equal']} |",
        f"| changing layout: SIGKILLs, steps compared, other documents | {changed['kills']}, "
        f"{changed['steps_compared']}, "
        f"{changed['steps_with_other_documents']} |",
        f"| changing layout: largest relative difference of a loss | {changed['largest_relative_difference']:.1e} |",
        f"| restarts that lost steps beyond the last complete checkpoint | "
        f"{report['steps_lost_beyond_last_checkpoint']} |",
        f"| most steps done again after a strike | {report['most_steps_done_again']} |",
        f"| seconds from strike to the end of the job (timeout left out) | "
        f"{report['seconds_from_strike_to_end_of_job']} |",
        f"| seconds from start to the first step | {report['seconds_from_start_to_first_step']} |",
        f"| problems | {'; '.join(report['problems']) or 'none'} |",
        "",
    ]
    return "\n".join(lines)
