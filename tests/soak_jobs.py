"""Layouts, launches and processes of the soak test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training"), str(ROOT / "tests" / "data")]

from lcl_mcore.config.cli import parse_flags, resolve  # noqa: E402
from lcl_mcore.errors import ConfigError  # noqa: E402
from tiny import MODEL, PLAIN  # noqa: E402

STEPS, EVERY, TIMEOUT = 40, 4, 30.0
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
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        "tools/pretrain_lcl.py",
    ]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


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
