"""The GPU report on a machine without a GPU: what it reads, how it ends, and that nothing is skipped silently."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu_report
import pytest
import step
import torch
from gpu_report import (
    Finished,
    Part,
    gpu_test_files,
    parts,
    read_contrastive,
    read_json_line,
    read_tests,
    run_part,
    why_no_fp8,
)

from launch import run_script

ROOT = Path(__file__).resolve().parents[2]
H100 = {
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"},
    "optional": {"transformer-engine": {"usable": False, "reason": "not installed"}},
}
BARE: dict[str, Any] = {"gpu": None}
FULL_PARTS = {
    "gpu tests",
    "rates",
    "step released-b16-laion bf16",
    "step released-b16-laion fp8",
    "step paper-l14 bf16",
    "step paper-l14 fp8",
    "plan paper-l14",
    "contrastive 32768",
    "contrastive 65536",
    "contrastive 131072",
}


def script(code: str, seconds: float = 30.0) -> Part:
    return Part("part", (sys.executable, "-c", code), seconds, read_json_line)


def test_a_full_report_has_every_part() -> None:
    listed = list(parts(H100, quick=False))
    assert {part.name for part in listed} == FULL_PARTS
    for part in listed:
        assert part.command[1] == "-m" or (ROOT / part.command[1]).is_file()
    assert "--dry" not in " ".join(word for part in listed for word in part.command)


def test_the_dry_run_has_the_same_kinds_of_parts() -> None:
    dry = {part.name.rsplit(" ", 1)[0] for part in parts(BARE, quick=True)}
    assert dry == {name.rsplit(" ", 1)[0] for name in FULL_PARTS}


def test_files_with_gpu_tests_are_found() -> None:
    assert {"tests/kernels/test_gpu.py", "tests/gpu/test_training_step.py"} <= set(gpu_test_files())


def test_fp8_says_why_not() -> None:
    assert "there is none" in why_no_fp8(BARE)
    assert "not installed" in why_no_fp8(H100)
    old = {"gpu": {"name": "NVIDIA A100", "capability": "8.0"}}
    assert "A100 has 8.0" in why_no_fp8(old)
    assert not why_no_fp8(H100 | {"optional": {"transformer-engine": {"usable": True}}})


def test_a_crash_is_a_failure_with_its_output() -> None:
    result = run_part(script("print('before'); raise SystemExit('broken')"), 30)
    assert result["status"] == "failed"
    assert "broken" in result["output_tail"]


def test_a_result_and_a_bad_exit_status_is_a_failure() -> None:
    result = run_part(script("print('{}'); raise SystemExit(3)"), 30)
    assert (result["status"], result["reason"]) == ("failed", "exit status 3")


def test_time_runs_out_for_the_part_and_its_children() -> None:
    child = f"import subprocess, sys; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    started = time.perf_counter()
    result = run_part(script(child, seconds=6.0), 500)
    assert result["status"] == "failed"
    assert "ran out of its 6 s" in result["reason"]
    assert time.perf_counter() - started < 30


def test_no_time_left_is_a_failure() -> None:
    result = run_part(script("print('{}')"), 1.0)
    assert (result["status"], result["reason"]) == ("failed", "no time was left for this part")


def test_junit(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/>'
        '<testcase classname="a" name="off"><skipped message="needs Transformer Engine"/></testcase>'
        '<testcase classname="a" name="bad"><failure message="1 != 2"/></testcase></testsuite></testsuites>'
    )
    result = read_tests("", path)
    assert (result["tests"], result["passed"], result["failed"]) == (3, 1, 1)
    assert result["skipped"] == {"needs Transformer Engine": ["a::off"]}
    assert result["failures"] == [{"test": "a::bad", "message": "1 != 2"}]
    assert result["status"] == "failed"


def test_contenders_without_memory_are_results_and_other_errors_are_not(tmp_path: Path) -> None:
    path = tmp_path / "contrastive.json"
    full = {"contender": "naive", "n": 9, "error": "torch.OutOfMemoryError: CUDA out of memory."}
    path.write_text(json.dumps({"results": [full, {"contender": "triton", "n": 9, "seconds": 1.0}]}))
    assert read_contrastive("", path)["status"] == "ok"
    path.write_text(json.dumps({"results": [full, {"contender": "triton", "n": 9, "error": "KeyError: 1"}]}))
    result = read_contrastive("", path)
    assert (result["status"], result["reason"]) == ("failed", "triton at 9: KeyError: 1")


@pytest.mark.parametrize(("state", "each", "expected"), [(20, 3, 16), (20, 60, 1), (0, 0.1, 64)])
def test_largest_micro_batch(monkeypatch: pytest.MonkeyPatch, state: int, each: float, expected: int) -> None:
    """80 units of memory, `state` of them taken by the model and `each` by every sequence."""
    from lcl_mcore.distributed.device import Device

    def peak(_: Any, size: int, *unused: Any) -> float:
        if state + each * size > 80:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return state + each * size

    monkeypatch.setattr(step, "peak_of", peak)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    device = Device("cuda", torch.device("cpu"), "nccl", "")
    groups: Any = None
    tries: list[dict[str, Any]] = []
    assert step.largest_fit(step.StepSettings("paper-l14", "bf16"), device, groups, tries) == expected
    assert tries


def test_sequences_are_full_and_shaped_like_the_recipes() -> None:
    from lcl_mcore.data.synthetic import SyntheticSequences

    for recipe, count, images, contexts in [("paper-l14", 3, 16, 13), ("released-b16-laion", 4, 4, 2)]:
        config = step.StepSettings(recipe, "bf16").config(count)
        plans = SyntheticSequences(config).plans(0, count)
        length = config.data.sequence_length
        assert all(plan.used >= length - 1 for plan in plans)
        assert sum(len(plan.images) for plan in plans) == images
        assert sum(image.has_context for plan in plans for image in plan.images) == contexts
        assert all(sum(plan.lengths) == length for plan in plans)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run needs a machine without a GPU")
@pytest.mark.timeout(600)
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make gpu-report` starts; its processes are forked."""

    def forked(command: tuple[str, ...], seconds: float, environment: dict[str, str]) -> Finished:
        assert command[0] == sys.executable
        started = time.perf_counter()
        done = run_script(*command[1:], timeout=seconds, **environment)
        return Finished(done.returncode, done.stderr + done.stdout, time.perf_counter() - started)

    out = tmp_path / "report.json"
    monkeypatch.setattr(gpu_report, "run_process", forked)
    monkeypatch.setattr(sys, "argv", ["tools/gpu_report.py", "--quick", "--out", str(out)])
    assert gpu_report.main() == 0
    report = json.loads(out.read_text())
    assert report["status"] == "ok"
    assert report["dry"]
    assert report["seconds"] < gpu_report.TOTAL_SECONDS
    assert {"commit", "dirty", "date"} <= report.keys()
    assert report["environment"]["versions"]["torch"] == torch.__version__
    named = {name.rsplit(" ", 1)[0] for name in report["parts"]}
    assert named == {name.rsplit(" ", 1)[0] for name in FULL_PARTS}
    assert all(part["dry"] for part in report["parts"].values())
    not_run = {name for name, part in report["parts"].items() if part["status"] == "not run"}
    assert not_run == {"gpu tests", "step released-b16-laion fp8", "step paper-l14 fp8"}
    assert not_run <= {item["part"] for item in report["skipped"]}
    plan = report["parts"]["plan paper-l14"]
    assert plan["predicted_over_measured"] == pytest.approx(1, abs=0.05)
    assert plan["measured"]["peak_bytes"] > 10**8
    for recipe in gpu_report.STEP_RECIPES:
        measured = report["parts"][f"step {recipe} bf16"]
        assert measured["images_per_second"] > 0
        assert measured["model_flops"] > 0
        assert measured["last_step"]["contrastive"] > 0
