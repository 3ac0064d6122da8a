"""Test and measure everything that needs a GPU, and write one JSON about it. Under nine minutes, no network.

    python tools/gpu_report.py                    # on a machine with a GPU; `make gpu-report` installs first
    python tools/gpu_report.py --quick            # fewer sizes; without a GPU a dry run of under a minute
    python tools/gpu_report.py --carried .gpu     # where only torch is installed: packages from `make gpu-carry`

Speed and memory of training steps, GPU tests, the contrastive benchmark, and the planner's memory against a real step,
in the order of what they are worth. Every part is a process of its own with a time limit, all limits together are the
whole, and the report is written after each. A part that cannot run here is in it with its reason. Without a GPU the
same parts run at toy sizes, marked "dry": a check of the report itself.

Imports nothing heavy, so that this process holds no memory of the GPU that it reports on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_carry import unpack

from lcl_mcore.commands.entry import run_main

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 525.0
"""Everything together stays below nine minutes."""
ENVIRONMENT_SECONDS = 30.0
STEP_SIZES = {"paper-l14": 24, "released-b16-laion": 256}
"""Sequences of a micro-batch that fill GPUs of 75 GiB and more; on smaller ones the largest that fits is looked for."""
LARGE_GPU = 75 * 2**30
CONTRASTIVE_SIZES = (65536, 32768, 131072)
LINEAR_MEMORY = ("triton", "inf_cl", "tiled")
"""Contenders of the contrastive benchmark that store no N x N logits."""
NAIVE_FITS = 65536
"""Up to so many pairs these run as well, after them."""
QUADRATIC_MEMORY = ("lcl", "open_clip", "naive")
GRACE_SECONDS = 5.0
"""From the interrupt at a part's limit, upon which pytest writes what it has, to the kill."""
TAIL = 2000
"""Characters of a failed part's output that the report keeps."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One process of the report.

    seconds    its time budget
    read       turns the finished process's output (and the file given as `{out}`) into a result
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    read: Callable[[str, Path], Result]
    environment: dict[str, str] = field(default_factory=dict)
    not_run: str = ""  # why it is not even started


@dataclass(frozen=True)
class Finished:
    """How a process ended; `code` is None if it ran out of time."""

    code: int | None
    output: str
    seconds: float


def run_process(command: tuple[str, ...], seconds: float, environment: dict[str, str]) -> Finished:
    """Run a command from the repository's root; at its time limit it is interrupted, then killed with its children."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        # Where this runs in the background of a script, SIGINT is ignored, and the parts would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        code = None
        os.killpg(process.pid, signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    return Finished(code, output, time.perf_counter() - started)


def run_part(part: Part, left: float) -> Result:
    """A part's result: "ok", "not run" (nothing failed, `reason`), or "failed" (`reason`, end of its output)."""
    budget = min(part.seconds, left)
    shown = " ".join("python" if word == sys.executable else word for word in part.command)
    base: Result = {"command": shown, "budget_seconds": round(budget)}
    if part.not_run:
        return base | {"status": "not run", "reason": part.not_run}
    if budget < 5:
        return base | {"status": "failed", "reason": "no time was left for this part"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = tuple(word.replace("{out}", str(out)) for word in part.command)
        done = run_process(command, budget, part.environment)
        base["seconds"] = round(done.seconds, 1)
        late = f"ran out of its {budget:.0f} s" if done.code is None else ""
        try:
            result = part.read(done.output, out)
        except (OSError, ValueError, KeyError, IndexError, ElementTree.ParseError) as error:
            reason = f"exit status {done.code}, no result: {type(error).__name__}: {error}"
            return base | _failure(late or reason, done.output)
    if late:  # what it had written until then
        return base | result | _failure(late, done.output)
    if done.code != 0 and result["status"] == "ok":
        result |= _failure(f"exit status {done.code}", done.output)
    elif result["status"] == "failed":
        result = _failure(result.get("reason", ""), done.output) | result
    return base | result


def _failure(reason: str, output: str) -> Result:
    return {"status": "failed", "reason": reason, "output_tail": output[-TAIL:]}


# --- what the parts answer ---


def read_json_line(output: str, _: Path) -> Result:
    """The last line of the output."""
    result: Result = json.loads(output.strip().splitlines()[-1])
    return {"status": "ok"} | result


def read_contrastive(_: str, out: Path) -> Result:
    """The benchmark's own report. A contender that does not fit in memory is a result, not a failure."""
    report: Result = json.loads(out.read_text(encoding="utf-8"))
    broken = [
        f"{r['contender']} at {r['n']}: {r['error']}"
        for r in report["results"]
        if "error" in r and not re.search("out ?of ?memory|MemoryError", r["error"], re.IGNORECASE)
    ]
    if broken:
        return report | {"status": "failed", "reason": "; ".join(broken)}
    return report | {"status": "ok"}


def read_tests(_: str, out: Path) -> Result:
    """Counts from pytest's JUnit file, every failure by name, and every skipped test's reason."""
    cases = [case for case in ElementTree.parse(out).iter("testcase") if case.get("name")]  # not the one interrupted
    failures: list[dict[str, str]] = []
    skipped: dict[str, list[str]] = {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        for bad in (*case.findall("failure"), *case.findall("error")):
            failures.append({"test": name, "message": (bad.get("message") or "")[:500]})
        for skip in case.findall("skipped"):
            skipped.setdefault(skip.get("message") or "no reason given", []).append(name)
    result: Result = {
        "tests": len(cases),
        "passed": len(cases) - len(failures) - sum(len(names) for names in skipped.values()),
        "failed": len(failures),
        "failures": failures,
        "skipped": skipped,
    }
    if failures:
        return result | {"status": "failed", "reason": f"{len(failures)} GPU tests failed"}
    if not result["passed"]:
        reason = "; ".join(skipped) or "no test is marked gpu"
        return result | {"status": "not run", "reason": reason}
    return result | {"status": "ok"}


# --- the parts ---


def parts(environment: Result, quick: bool, te: dict[str, str] | None = None) -> Iterator[Part]:
    """What the report consists of, most valuable first; without a GPU in `environment` a dry run of the same parts.

    Args:
        te: variables that a carried Transformer Engine needs; its parts come last and are apart from the others.
    """
    gpu = environment.get("gpu")
    # One thread on a CPU: the dry run shares its machine.
    variables = {"PYTHONWARNINGS": "ignore", **({} if gpu else {"OMP_NUM_THREADS": "1"})}

    def part(name: str, seconds: float, read: Callable[[str, Path], Result], *words: str) -> Part:
        return Part(name, (sys.executable, *words), seconds if gpu else 3 * seconds, read, variables)

    def step(recipe: str, precision: str, seconds: float) -> Part:
        words = ["--recipe", recipe, "--precision", precision]
        words += ["--steps", "5" if quick else "10"] if gpu else ["--steps", "1", "--dry"]
        if gpu and gpu["memory_bytes"] > LARGE_GPU:
            words += ["--micro-batch-size", str(STEP_SIZES[recipe])]
        done = part(f"step {recipe} {precision}", seconds, read_json_line, "benchmarks/step.py", *words)
        no_fp8 = why_no_fp8(environment) if precision == "fp8" else ""
        return replace(done, not_run=no_fp8, environment=variables | (te or {})) if precision == "fp8" else done

    def contrastive(n: int, seconds: float, *options: str) -> Part:
        words = ["benchmarks/contrastive.py", "--n", str(n), *options, "--timeout", str(seconds - 5), "--out", "{out}"]
        return part(f"contrastive {n}", seconds, read_contrastive, *words)

    sizes = [contrastive(n, 40, *options) for n, options in _contrastive_sizes(bool(gpu), quick)]
    plan = ["--recipe", "paper-l14", "--micro-batch-size", *(["4"] if gpu else ["1", "--dry"])]
    tests = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "junit_family=xunit2", "--junitxml", "{out}"]
    if gpu and importlib.util.find_spec("xdist"):  # each test is a process that hardly fills the GPU
        tests += ["-n", "8"]
    yield step("paper-l14", "bf16", 60)
    yield part("gpu tests", 110, read_tests, "-m", "pytest", *tests, *gpu_test_files())
    yield sizes[0]
    yield step("released-b16-laion", "bf16", 40)
    yield part("plan paper-l14", 45, read_json_line, "benchmarks/plan_memory.py", *plan)
    yield from sizes[1:]
    yield part("rates", 15, read_json_line, "-m", "lcl_mcore.diagnostics.environment", "--rates")
    yield step("paper-l14", "fp8", 40)
    yield step("released-b16-laion", "fp8", 30)
    if te:  # which the tests above went without
        names = ["-k", "transformer_engine or fp8 or te or fusion", *gpu_test_files()]
        yield replace(part("gpu tests te", 35, read_tests, "-m", "pytest", *tests, *names), environment=variables | te)


def gpu_test_files() -> list[str]:
    """Test files that mark something with `gpu`: collecting the others would take longer than running these."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "pytest.mark.gpu" in f.read_text(encoding="utf-8")]


def _contrastive_sizes(gpu: bool, quick: bool) -> Iterator[tuple[int, tuple[str, ...]]]:
    if not gpu:
        few = ["--contenders", "tiled"] if quick else []
        yield 256, ("--dim", "64", "--device", "cpu", "--threads", "1", *few)
        return
    for n in CONTRASTIVE_SIZES[:1] if quick else CONTRASTIVE_SIZES:
        contenders = (*LINEAR_MEMORY, *(QUADRATIC_MEMORY if n <= NAIVE_FITS else ()))
        yield n, ("--dim", "768", "--device", "cuda", "--repeats", "3", "--contenders", *contenders)


def why_no_fp8(environment: Result) -> str:
    """Why FP8 steps cannot be measured on the machine described, or nothing."""
    gpu = environment.get("gpu")
    if not gpu:
        return "FP8 needs a GPU of compute capability 8.9 or newer, and there is none"
    if tuple(map(int, gpu["capability"].split("."))) < (8, 9):
        return f"FP8 needs compute capability 8.9 or newer; {gpu['name']} has {gpu['capability']}"
    te = environment["optional"]["transformer-engine"]
    return "" if te["usable"] else f"FP8 layers come from Transformer Engine, not usable here: {te['reason']}"


def skipped_parts(gpu: bool, quick: bool) -> list[Result]:
    """What a complete report has and this one does not, with the reason."""
    sizes = ", ".join(map(str, CONTRASTIVE_SIZES if not gpu else CONTRASTIVE_SIZES[1:] if quick else ()))
    missing: list[Result] = []
    if not gpu:
        reason = "no CUDA device: the parts run at toy sizes on the CPU, marked dry"
        missing.append({"part": "every measurement", "reason": reason})
    if sizes:
        missing.append({"part": f"contrastive {sizes}", "reason": "--quick" if gpu else "no CUDA device"})
    if gpu and not quick:
        reason = "each needs several matrices of N x N fp32 numbers, 69 GB each"
        missing.append({"part": f"contrastive {CONTRASTIVE_SIZES[-1]}: naive, open_clip, lcl", "reason": reason})
    return missing


# --- the report ---


def make_report(
    quick: bool, log: Callable[[str], None], save: Callable[[Result], None], te: dict[str, str] | None = None
) -> Result:
    """Run all parts. The report's `status` is "failed" if one of them is; `save` gets it after each, "unfinished"."""
    started = time.perf_counter()
    words = (sys.executable, "-m", "lcl_mcore.diagnostics.environment")
    asked = Part("environment", words, ENVIRONMENT_SECONDS, read_json_line, {"PYTHONWARNINGS": "ignore", **(te or {})})
    environment = run_part(asked, asked.seconds)
    gpu = bool(environment.get("gpu"))
    log(f"{environment['gpu']['name'] if gpu else 'no GPU: dry run at toy sizes'}")
    report: Result = {
        "report": "gpu-report",
        "status": "unfinished",
        "dry": not gpu,
        "quick": quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment.pop("source", {"commit": None, "dirty": None, "reason": "no answer"}),
        "environment": environment,
        "skipped": skipped_parts(gpu, quick),
        "parts": {},
    }
    for part in parts(environment, quick, te) if environment["status"] == "ok" else ():
        result = run_part(part, TOTAL_SECONDS - (time.perf_counter() - started))
        report["parts"][part.name] = {"dry": not gpu} | result
        log(summary(part.name, report["parts"][part.name]))
        if result["status"] == "not run":
            report["skipped"].append({"part": part.name, "reason": result["reason"]})
        report["seconds"] = round(time.perf_counter() - started, 1)
        save(report)
    failed = any(p["status"] == "failed" for p in (environment, *report["parts"].values()))
    report["status"] = "failed" if failed else "ok"
    save(report)
    return report


def summary(name: str, result: Result) -> str:
    """One line about a part."""
    line = f"{name:<32} {result['status']:<8} {result.get('seconds', 0):>6} s  "
    if result["status"] != "ok":
        return line + str(result.get("reason", ""))
    if "step_seconds" in result:
        peak = result["peak_allocated_bytes" if "peak_allocated_bytes" in result else "peak_resident_bytes"]
        line += (
            f"{result['micro_batch_size']} sequences  {result['step_seconds'] * 1e3:.1f} ms"
            f"  {result['images_per_second']:.0f} img/s  {result['tokens_per_second']:.0f} tok/s"
            f"  MFU {result['mfu']:.1%}  {peak / 2**30:.1f} GiB"
        )
    elif "results" in result:
        line += "  ".join(
            f"{r['contender']} {r['seconds'] * 1e3:.1f} ms"
            + (f" ({r['times_floor']:.2f} x floor)" if "times_floor" in r else "")
            for r in result["results"]
            if "seconds" in r
        )
    elif "predicted_over_measured" in result:
        predicted, measured = (result[side]["peak_bytes"] / 2**30 for side in ("predicted", "measured"))
        line += f"peak {predicted:.2f} GiB predicted, {measured:.2f} GiB measured"
    elif "passed" in result:
        line += f"{result['passed']} passed, {sum(len(v) for v in result['skipped'].values())} skipped"
    elif "bf16" in result:
        line += f"bf16 {result['bf16']['flops_per_second'] / 1e12:.4g} TFLOP/s"
    return line


def default_path(report: Result) -> Path:
    """`benchmarks/results/gpu-report-<gpu or cpu-dry>.json`."""
    gpu = report["environment"].get("gpu")
    name = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-") if gpu else "cpu-dry"
    return ROOT / "benchmarks" / "results" / f"gpu-report-{name}.json"


def _print(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    """Run all parts, print a line about each, write the report after each; 1 if a test failed or a part broke."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-report-<gpu or cpu-dry>.json")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and steps")
    parser.add_argument("--carried", type=Path, help="folder of `make gpu-carry`: packages that are missing here")
    parser.add_argument("--commit", help="what to record where the folder is not a git checkout")
    args = parser.parse_args()

    def save(report: Result) -> None:
        if report["commit"] is None and args.commit:
            report |= {"commit": args.commit, "dirty": None, "reason": "named on the command line"}
        path = args.out or default_path(report)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        te: dict[str, str] = {}
        if args.carried:
            variables, te = unpack(args.carried, Path(folder), ROOT)
            os.environ.update(variables)
        report = make_report(args.quick, _print, save, te)
    for item in report["skipped"]:
        print(f"skipped: {item['part']}: {item['reason']}")
    print(f"{report['status']} in {report['seconds']} s: {args.out or default_path(report)}")
    return 0 if report["status"] == "ok" else 1


if __name__ == "__main__":
    run_main(main)
