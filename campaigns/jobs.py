"""What the campaigns share: a small run in many layouts, its processes, and the facts that a report starts with."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training"), str(ROOT / "tests" / "data")]

from lcl_mcore.commands.pretrain import parse_options  # noqa: E402
from lcl_mcore.diagnostics.environment import source_commit  # noqa: E402
from lcl_mcore.distributed.device import cpu_name  # noqa: E402
from lcl_mcore.errors import ConfigError  # noqa: E402
from lcl_mcore.optional_packages import megatron_version  # noqa: E402
from tiny import DROPPING, MODEL, PLAIN, make_corpus  # noqa: E402
from training_runs import EXACT, records  # noqa: E402

__all__ = ["DROPPING", "EXACT", "MODEL", "make_corpus", "records"]

STEPS, EVERY, TIMEOUT = 40, 4, 30.0
"""Steps of a run, steps between checkpoints, seconds that a collective may take."""
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


def arguments_of(corpus: Path, out: Path, layout: str) -> list[str]:
    """Flags of `tools/pretrain_lcl.py` for a run without dropout, whose numbers do not depend on the layout."""
    return [
        "--recipe",
        "demo",
        "--data",
        str(corpus / "pairs"),
        "--tokenizer",
        str(corpus),
        "--out",
        str(out),
        "--steps",
        str(STEPS),
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "8",
        "--lr",
        "1e-3",
        "--checkpoint-every",
        str(EVERY),
        "--log-every",
        "1",
        "--timeout",
        str(TIMEOUT),
        "--set",
        *MODEL,
        *PLAIN,
        *LAYOUTS[layout][1],
    ]


def accepted(corpus: Path, out: Path, ranks: int) -> list[str]:
    """Layouts of at most `ranks` processes that the configuration accepts here."""
    found = []
    for name, (count, _) in LAYOUTS.items():
        try:
            parse_options(arguments_of(corpus, out, name)).run.check_processes(count)
        except ConfigError as error:
            print(f"layout {name} skipped: {error}")
            continue
        if count <= ranks:
            found.append(name)
    return found


def start(
    ranks: int, arguments: list[str], output: Any, *, restarts: int = 0, text: bool = False
) -> subprocess.Popen[Any]:
    """torchrun with that many ranks; both of its streams go to `output`, a file or `subprocess.PIPE`."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "--max-restarts",
        str(restarts),
        "tools/pretrain_lcl.py",
    ]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=output,
        stderr=subprocess.STDOUT,
        text=text,
        start_new_session=True,
    )


def workers(job: subprocess.Popen[Any]) -> list[psutil.Process]:
    """The ranks: processes that the launcher started."""
    try:
        return [p for p in psutil.Process(job.pid).children() if "tools/pretrain_lcl.py" in line_of(p)]
    except psutil.NoSuchProcess:
        return []


def children(process: psutil.Process) -> list[psutil.Process]:
    """All processes below this one."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def line_of(process: psutil.Process) -> str:
    """Command line of a process, empty if it has gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def send(process: psutil.Process, number: int) -> None:
    """Signal a process, unless it has gone."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def end_all(job: subprocess.Popen[Any]) -> None:
    """Kill the job and its ranks: nothing of an attempt may be left when the next one starts."""
    rest = workers(job)
    rest += [child for rank in rest for child in children(rank)]
    if job.poll() is None:
        job.kill()
    job.wait(30)
    for process in rest:
        send(process, signal.SIGKILL)
    psutil.wait_procs(rest, timeout=30)


def count_steps(out: Path) -> int:
    """Lines of the run's metrics."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def reference(corpus: Path, folder: Path, layout: str) -> Path:
    """An undisturbed run in this layout, made once.

    Raises:
        RuntimeError: it failed; names its log.
    """
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


def facts(command: str) -> dict[str, Any]:
    """What every report begins with: command, commit, date and machine."""
    return {
        "command": command,
        "commit": source_commit()["commit"] or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores of {cpu_name()}, {platform.machine()}, torch {torch.__version__}, "
        f"megatron-core {megatron_version()}",
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load_before": round(os.getloadavg()[0], 1),
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """The report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, largest and count; nothing for no values."""
    if not values:
        return {}
    return {"median": round(statistics.median(values), 2), "largest": round(max(values), 2), "count": len(values)}
