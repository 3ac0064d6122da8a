"""The GPU report on a machine without a GPU: what it reads, how it ends, and that nothing is skipped silently."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import gpu_carry
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
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory_bytes": 85_017_493_504},
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


@pytest.mark.parametrize("quick", [False, True])
def test_all_limits_together_are_the_whole_and_a_carried_package_comes_last(quick: bool) -> None:
    te = {"PYTHONPATH": "somewhere"}
    listed = list(parts(H100, quick, te))
    assert sum(part.seconds for part in listed) + gpu_report.ENVIRONMENT_SECONDS <= gpu_report.TOTAL_SECONDS
    assert [part.name for part in listed[:3]] == ["step paper-l14 bf16", "gpu tests", "contrastive 65536"]
    assert [part.name for part in listed[-3:]] == ["step paper-l14 fp8", "step released-b16-laion fp8", "gpu tests te"]
    assert [part.name for part in listed if "PYTHONPATH" in part.environment] == [part.name for part in listed[-3:]]
    assert "--micro-batch-size 24" in " ".join(listed[0].command)
    small = {**H100, "gpu": {**H100["gpu"], "memory_bytes": 40 * 2**30}}
    assert "--micro-batch-size" not in next(parts(small, quick)).command


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


def test_tests_that_ended_before_the_limit_are_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted, pytest writes what it has."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # it starts sooner
    path = tmp_path / "test_slow.py"
    path.write_text("import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(600)\n")
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path))
    part = Part("tests", (sys.executable, *words, "--junitxml", "{out}", str(path)), 20.0, read_tests)
    result = run_part(part, 500)
    assert (result["status"], result["reason"], result["passed"]) == ("failed", "ran out of its 20 s", 1)


def test_the_report_is_written_after_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [script(f"print('{{\"n\": {n}}}')") for n in range(2)]
    listed = [dataclasses.replace(part, name=f"part {n}") for n, part in enumerate(listed)]
    environment: dict[str, Any] = {"status": "ok", "gpu": None}
    monkeypatch.setattr(gpu_report, "parts", lambda *_: [Part("environment", (), 0, read_json_line), *listed])
    monkeypatch.setattr(gpu_report, "run_part", lambda part, _: {**environment, "name": part.name})
    saved: list[tuple[str, list[str]]] = []
    report = gpu_report.make_report(True, str, lambda r: saved.append((r["status"], list(r["parts"]))))
    names = ["environment", "part 0", "part 1"]
    assert saved == [*(("unfinished", names[: n + 1]) for n in range(3)), ("ok", names)]
    environment["status"] = "failed"  # nothing is known about the machine: no dry run in place of the parts
    saved.clear()
    report = gpu_report.make_report(True, str, lambda r: saved.append((r["status"], list(r["parts"]))))
    assert (report["status"], saved) == ("failed", [("failed", [])])


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


def test_what_is_carried_is_all_that_the_package_needs() -> None:
    pinned = dict(text.split("==") for text in gpu_carry.wheels({"torch", "numpy"}))
    assert {"megatron-core", "pydantic", "pydantic-core", "annotated-types", "tyro", "webdataset", "pytest"} <= set(
        pinned
    )
    assert not {"torch", "numpy", "sympy", "lcl-mcore"} & set(pinned)
    assert pinned["pydantic"] == importlib.metadata.version("pydantic")


@pytest.mark.parametrize("form", ["none", "folder", "archive"])
def test_a_bare_machine_imports_from_what_was_carried(form: str, tmp_path: Path) -> None:
    carried, there = tmp_path / "carried", tmp_path / "there"
    (carried / "wheels").mkdir(parents=True)
    there.mkdir()
    with zipfile.ZipFile(carried / "wheels" / "carried_thing-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried_thing-1.0.dist-info"
        wheel.writestr("carried_thing.py", "VALUE = 7\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    if form != "none":
        (carried / "te").mkdir()
        (carried / "te" / "transformer_engine_stand_in.py").touch()
    if form == "archive":
        with tarfile.open(carried / "te.tar.xz", "w:xz") as archive:
            archive.add(carried / "te", arcname=".")
        shutil.rmtree(carried / "te")
    plain, te = gpu_carry.unpack(carried, there, ROOT)
    code = "import carried_thing, lcl_kernels, lcl_mcore; print(lcl_mcore.__file__, lcl_kernels.__file__)"
    environment = {"PATH": os.environ["PATH"], **plain}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(ROOT / "lcl_mcore" / "__init__.py"), str(there / "site/lcl_kernels/__init__.py")]
    assert bool(te) == (form != "none")
    if te:
        code = "import carried_thing, transformer_engine_stand_in"
        subprocess.run([sys.executable, "-c", code], env=environment | te, check=True)
        assert "transformer" not in plain["PYTHONPATH"]


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
    for recipe in gpu_report.STEP_SIZES:
        measured = report["parts"][f"step {recipe} bf16"]
        assert measured["images_per_second"] > 0
        assert measured["model_flops"] > 0
        assert measured["last_step"]["contrastive"] > 0
