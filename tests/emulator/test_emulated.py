"""Every line that only a GPU reaches, run on one that computes nothing; `make emulate`.

What may not grow is in counters.json: launches, products, copies, fills and collectives of a step, by case and rank.
Fewer is progress: EMULATOR_WRITE=1 writes what was found.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emulated_cases import CASES
from lcl_mcore.optional_packages import installed

HERE = Path(__file__).resolve().parent
COUNTERS = HERE / "counters.json"
WRITE = bool(os.environ.get("EMULATOR_WRITE"))
PEAK_TOLERANCE = 0.05
"""Of the planner's peak against the allocator's, in models so small that torch's rounding is a part of it."""
TE = installed("transformer-engine", "transformer_engine", "transformer-engine")
pytestmark = [pytest.mark.emulated, pytest.mark.timeout(1800)]


def needs(case: str) -> None:
    """Skip what Transformer Engine serves where it is not."""
    if CASES[case].te and not TE.usable:
        pytest.skip("Transformer Engine is not there: its torch extension is built from source (docs/contributing.md)")


@pytest.mark.parametrize("case", CASES)
def test_a_step_makes_the_host_wait_for_nothing(case: str, steps: Callable[[str], list[dict[str, Any]]]) -> None:
    needs(case)
    for rank in steps(case):
        assert rank["counts"].waits == {}, f"rank {rank['rank']}"


@pytest.mark.parametrize("case", CASES)
def test_a_step_launches_no_more_than_before(
    case: str, steps: Callable[[str], list[dict[str, Any]]], report: dict[str, Any]
) -> None:
    needs(case)
    known = json.loads(COUNTERS.read_text(encoding="utf-8"))
    found = [dict(sorted(rank["counts"].numbers.items())) for rank in steps(case)]
    for rank, counts in zip(steps(case), found, strict=True):
        milliseconds = 1e3 * rank["host_seconds"]
        report.setdefault("steps", {}).setdefault(case, []).append(
            {
                "counts": counts,
                "bytes communicated": dict(rank["counts"].communicated),
                "operators": rank["operators"],
                "host_ms": round(milliseconds, 1),
                "host_us_per_operator": round(1e3 * milliseconds / rank["operators"], 1),
                "peak_bytes": rank["peak"],
                "backends": rank["backends"],
            }
        )
    if WRITE:
        known[case] = found
        COUNTERS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for rank, (counts, bounds) in enumerate(zip(found, known[case], strict=True)):
        grown = {name: (bounds.get(name, 0), n) for name, n in counts.items() if n > bounds.get(name, 0)}
        assert grown == {}, f"rank {rank}: {{name: (before, now)}}"


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.te])
def test_the_planner_knows_the_allocators_peak(
    case: str,
    steps: Callable[[str], list[dict[str, Any]]],
    planned: dict[tuple[str, int], dict[str, Any]],
    report: dict[str, Any],
) -> None:
    for rank in steps(case):
        ours = planned[case, rank["rank"]]
        ratio = ours["peak"] / rank["peak"]
        counts = rank["counts"].numbers
        launches = counts["launches"] + counts["products"] + counts["fills"] + counts["copies device>device"]
        report.setdefault("planner", {}).setdefault(case, []).append(
            {"peak_over_allocators": round(ratio, 4), "operators_over_launches": round(ours["operators"] / launches, 3)}
        )
        assert ratio == pytest.approx(1, abs=PEAK_TOLERANCE), f"rank {rank['rank']}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pairs/` (60 documents) and `tokenizer.json`."""
    from tiny import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "dp2": (2, ()),
    "tp2, sequence parallel": (2, ("--tp", "2", "--sequence-parallel")),
    "pp2": (2, ("--pp", "2")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_resumes_and_is_evaluated(layout: str, emulator: Any, corpus: Path, tmp_path: Path) -> None:
    """Six steps with checkpoints, three more, then held-out losses. In a step the host waits for nothing but memory,
    for batches larger than those before."""
    from tiny import MODEL

    ranks, more = LAYOUTS[layout]
    worker, run = str(HERE / "emulated_tool_worker.py"), tmp_path / "run"
    words = ["pretrain", "--recipe", "demo", "--data", str(corpus / "pairs"), "--tokenizer", str(corpus)]
    words += ["--out", str(run), "--precision", "bf16", "--micro-batch-size", "2", "--global-batch-size", "4"]
    words += ["--checkpoint-every", "3", "--log-every", "1", "--timeout", "120", *more, "--set", *MODEL]
    settings = ["model.vision.drop_path=0.2", "model.language.dropout=0.1"]
    emulator.run(tmp_path / "first", worker, *words, *settings, "train.steps=6", ranks=ranks)
    words.insert(words.index("--out"), "--resume")
    emulator.run(tmp_path / "second", worker, *words, *settings, "train.steps=9", ranks=ranks)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))
    for name in ("first", "second"):
        for rank in range(ranks):
            later = [counts for mark, counts in emulator.read(tmp_path / name, rank) if mark == "step"][2:]
            assert {wait for counts in later for wait in counts.waits} <= {"cudaMalloc", "cudaHostAlloc"}
    emulator.run(tmp_path / "third", worker, "evaluate", str(run), "--data", str(corpus / "pairs"))


@pytest.mark.parametrize("recipe", ["paper-l14", "released-b16-laion"])
def test_the_step_benchmark(recipe: str, emulator: Any, tmp_path: Path) -> None:
    """A whole recipe's step would take minutes to draw its weights: two narrow layers take the same lines."""
    words = ["benchmarks/step.py", "--recipe", recipe, "--precision", "bf16", "--dry", "--steps", "2"]
    result = json.loads(emulator.run(tmp_path / "log", *words).splitlines()[-1])
    assert result["device"] == "NVIDIA H100 80GB HBM3"
    assert {try_["fits"] for try_ in result["tries"]} == {True}  # looked for the largest micro-batch
    assert result["peak_allocated_bytes"] > result["state_bytes"] > 0


def test_the_parts_of_the_gpu_report(emulator: Any, tmp_path: Path, report: dict[str, Any]) -> None:
    """Each part's command, but for the steps above and the GPU tests below."""
    sys.path.append(str(HERE.parents[1] / "benchmarks"))
    import gpu_report

    words = ("-m", "lcl_mcore.diagnostics.environment")
    environment = {"status": "ok", **json.loads(emulator.run(tmp_path / "log", *words).splitlines()[-1])}
    assert environment["gpu"]["name"] == "NVIDIA H100 80GB HBM3"
    for part in gpu_report.parts(environment, quick=True):
        if part.name.startswith(("step", "gpu tests")):
            continue
        out = tmp_path / part.name.replace(" ", "-")
        command = [word.replace("{out}", str(out)).replace("35", "600") for word in part.command[1:]]
        result = part.read(emulator.run(tmp_path / "log", *command), out)
        report.setdefault("gpu report", {})[part.name] = result["status"]
        assert result["status"] == "ok", (part.name, result)


GPU_TESTS = ("tests/gpu/test_training_step.py", "tests/gpu/test_segment_attention.py", "tests/kernels/test_gpu.py")


def test_gpu_tests_end_in_comparisons_of_numbers(emulator: Any, tmp_path: Path, report: dict[str, Any]) -> None:
    """They fail, since nothing is computed, but by nothing else than the numbers; host waits are counted for real."""
    out = tmp_path / "junit.xml"
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--timeout", "600", f"--junitxml={out}"]
    with pytest.raises(AssertionError, match="exit status 1\n"):
        emulator.run(tmp_path / "log", *words, *GPU_TESTS, seconds=1700)
    sys.path.append(str(HERE.parents[1] / "benchmarks"))
    import gpu_report

    result = gpu_report.read_tests("", out)
    report["gpu tests"] = {name: result[name] for name in ("tests", "passed", "failed")}
    broken = [f for f in result["failures"] if not f["message"].startswith(("AssertionError", "assert", "Failed"))]
    assert broken == []
    assert [f["test"] for f in result["failures"] if "never_waits" in f["test"]] == []
