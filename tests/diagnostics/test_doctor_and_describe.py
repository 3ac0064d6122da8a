"""`tools/describe.py` and `tools/doctor.py` as a user starts them."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch import run_script, torchrun
from lcl_mcore import optional_packages as probe
from lcl_mcore.config.recipes import RECIPES, load_recipe
from lcl_mcore.diagnostics import health, preflight
from lcl_mcore.models.flops import parameter_counts
from lcl_mcore.startup_summary import _losses

TOOLS = Path(__file__).parents[2] / "tools"


def test_describe_prints_the_released_sizes() -> None:
    done = run_script("tools/describe.py", "--recipe", "released-b32-mmc4", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["parameters"]["total"] == 178_642_945
    assert report["tokens_per_image"] == {"encoder": 50, "language_model": 49, "with_markers": 51}
    text = run_script("tools/describe.py", "--recipe", "released-b32-mmc4").stdout
    assert "178,642,945" in text
    assert "tokens per sequence    2048" in text


def test_describe_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['describe.py', '--recipe', 'demo']\n"
        f"try:\n    runpy.run_path({str(TOOLS / 'describe.py')!r}, run_name='__main__')\n"
        "except SystemExit:\n    pass\nprint([m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_describe_answers_a_wrong_name_with_the_right_one() -> None:
    done = run_script("tools/describe.py", "--recipe", "paper-l15")
    assert done.returncode == 2
    assert "Did you mean paper-l14?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Installs an empty package of a name, with a version, for the duration of a test."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, module: str, version: str) -> None:
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").touch()
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        importlib.invalidate_caches()

    return install


def test_doctor_reports_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_script("tools/doctor.py", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["healthy"] is True
    parts = [line["name"] for line in report["parts"] if line["name"]]
    assert parts == ["layers", "attention", "residual", "optimizer", "wgrad", "loss", "decode"]
    required = {line["name"]: line for line in report["required"]}
    assert required["megatron-core"]["found"] == importlib.metadata.version("megatron-core")
    assert all(line["reason"] for line in report["optional"] if not line["ok"])
    if not report["optional"][0]["ok"]:
        assert "transformer-engine" in report["parts"][0]["reason"]


def test_doctor_refuses_fp8_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(probe.transformer_engine(), usable=False, reason="it is not installed")
    monkeypatch.setattr(probe, "transformer_engine", lambda: missing)
    layers = health.choose_parts("fp8")[0]
    assert not layers.ok
    assert layers.reason.startswith("fp8 needs Transformer Engine: ")
    report = health.Report(parts=[layers], errors=[f"layers: {layers.reason}"])
    assert not report.healthy
    assert health.format_report(report).endswith("not ready to train")


def doctor_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_doctor_warns_of_packages_under_a_wrong_name(fake_package: Callable[[str, str, str], None]) -> None:
    if doctor_module("apex"):
        pytest.skip("an apex is installed")
    before = health.find_impostors()
    fake_package("apex", "apex", "0.9.10.dev0")
    new = [text for text in health.find_impostors() if text not in before]
    sys.modules.pop("apex", None)
    assert len(new) == 1
    assert new[0].startswith("apex 0.9.10.dev0: ")
    assert "https://github.com/NVIDIA/apex" in new[0]


def test_doctor_names_versions_that_do_not_fit() -> None:
    lines = health.check_requirements(
        ["torch>=99", "no-such-package>=1", "numpy", "flash-attn>=2.8; extra == 'flash-attn'"], "Do this."
    )
    assert [(line.name, line.ok) for line in lines] == [("torch", False), ("no-such-package", False), ("numpy", True)]
    assert lines[0].reason == "torch>=99 is required. Do this."
    assert lines[1].found == "missing"


def test_doctor_survives_a_broken_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "IMPORTS", ("no_such_binary",))
    report = health.examine()
    assert not report.healthy
    assert report.parts == []
    text = health.format_report(report)
    assert "ERROR no_such_binary: broken. does not import: ModuleNotFoundError" in text
    assert text.endswith("not ready to train")


MISSING = "Could not find shared object file for Transformer Engine torch lib."
HALF_INSTALLED = {
    "no torch extension": (f"raise FileNotFoundError({MISSING!r})", f"FileNotFoundError: {MISSING}"),
    "a library that does not load": ("import ctypes; ctypes.CDLL('/no.so')", "OSError: /no.so: cannot open shared"),
    "made for another torch": ("import torch; torch.no_such_name", "AttributeError: module 'torch' has no attribute"),
    "its metadata is gone": (
        "from importlib.metadata import version; version('transformer-engine')",
        "PackageNotFoundError: No package metadata was found for transformer-engine",
    ),
}


@pytest.fixture
def half_installed(tmp_path: Path) -> Callable[[str], Path]:
    """A folder with a Transformer Engine that says this when it is imported."""

    def make(code: str) -> Path:
        package = tmp_path / "transformer_engine"
        package.mkdir()
        (package / "__init__.py").write_text(code + "\n")
        return tmp_path

    return make


@pytest.mark.parametrize("kind", HALF_INSTALLED)
def test_a_half_installed_package_is_named_with_its_remedy(
    kind: str, half_installed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if doctor_module("transformer_engine"):
        pytest.skip("a Transformer Engine is installed")
    code, said = HALF_INSTALLED[kind]
    monkeypatch.syspath_prepend(half_installed(code))
    why = probe.why_not_imported("transformer_engine")
    assert why.startswith(f"transformer_engine is there but does not load ({said}")
    assert why.endswith("). Install it whole, or delete the folder transformer_engine.")


def test_other_errors_name_no_optional_package() -> None:
    assert probe.why_not_imported("no_such_package") == "ModuleNotFoundError: No module named 'no_such_package'"
    assert probe.half_installed(FileNotFoundError("a file of the user's")) == ""


@pytest.mark.slow
@pytest.mark.parametrize("command", [("doctor",), ("plan", "--recipe", "demo", "--gpus", "1")], ids=lambda c: c[0])
def test_every_command_says_in_one_line_what_keeps_megatron_core_from_importing(
    command: tuple[str, ...], half_installed: Callable[[str], Path]
) -> None:
    if doctor_module("transformer_engine"):
        pytest.skip("a Transformer Engine is installed")
    code, said = HALF_INSTALLED["no torch extension"]
    path = os.pathsep.join([str(half_installed(code)), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lcl_mcore", *command],
        cwd=TOOLS.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    error = f"transformer_engine is there but does not load ({said}). "
    error += "Install it whole, or delete the folder transformer_engine."
    assert "Traceback" not in done.stdout + done.stderr
    if command[0] == "doctor":
        assert done.returncode == 1
        assert f"ERROR megatron.core: broken. {error}" in done.stdout
    else:
        assert (done.returncode, done.stderr) == (2, f"error: {error}\n")


@pytest.mark.distributed
def test_doctor_checks_links_clocks_and_the_run_folder_over_the_processes_of_torchrun(tmp_path: Path) -> None:
    done = torchrun(2, "tools/doctor.py", "--json", "--folder", str(tmp_path / "run"), "--megabytes", "4")
    found = json.loads(done.stdout)["preflight"]
    ranks = found["ranks"]
    assert [(r["rank"], r["total"]) for r in ranks] == [(0, 3.0), (1, 3.0)]
    assert all(r["small_ms"] > 0 and r["large_ms"] > 0 for r in ranks)
    for rank in ranks:  # 2 (n - 1) / n = 1: bytes over seconds
        assert rank["bus_gb_per_s"] == pytest.approx(4e6 / (1e6 * rank["large_ms"]))
    assert found["clock_seconds"] < 1
    assert len(found["storage"]) == 1  # one node
    assert found["storage"][0]["write_mb_per_s"] > 0
    assert found["storage"][0]["read_mb_per_s"] > 0
    assert list((tmp_path / "run").iterdir()) == []  # nothing is left behind


def test_preflight_names_the_nodes_that_differ() -> None:
    same = {"torch": "2.13.0", "nccl": "2.28"}
    nodes = ["n1", "n1", "n2", "n3"]
    assert preflight.compare_facts(nodes, [same] * 4) == []
    assert preflight.compare_facts(nodes, [same, same, {**same, "nccl": "2.27"}, {"torch": "2.13.0"}]) == [
        "nccl is 2.27 on n2, 2.28 elsewhere",
        "nccl is none on n3, 2.28 elsewhere",
    ]


def test_preflight_tells_shared_storage_from_two_folders(tmp_path: Path) -> None:
    payload = b"x" * 1000
    written = preflight._guard(lambda: preflight._write(tmp_path / "a" / "0", payload))
    assert written["problem"] == ""
    assert preflight._read(tmp_path / "a" / "0", payload, "n1").keys() == {"read"}
    assert "other bytes than n1 wrote" in preflight._read(tmp_path / "a" / "0", b"y" * 1000, "n1")["problem"]
    (tmp_path / "file").write_text("no folder")
    broken = preflight._guard(lambda: preflight._write(tmp_path / "file" / "0", payload))
    assert "must be writable storage of all nodes" in broken["problem"]


def test_preflight_says_when_the_nodes_do_not_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 11.0, 12.0])
    monkeypatch.setattr(preflight.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(preflight.time, "sleep", lambda seconds: None)
    assert "do not share this folder" in preflight._read(tmp_path / "gone", b"x", "n2")["problem"]


def test_the_documented_sizes_are_those_of_the_recipes() -> None:
    text = (TOOLS.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 7 and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = cells[3:]
    assert rows.keys() == RECIPES.keys()
    for name, (parameters, tokens, length, batch) in rows.items():
        config = load_recipe(name)
        number, unit = parameters.split()
        total = sum(parameter_counts(config.model).values())
        assert float(number) == pytest.approx(total / {"M": 1e6, "B": 1e9}[unit], rel=5e-4), name
        sizes = (config.model.vision.patches, config.data.sequence_length, config.train.global_batch_size)
        assert (int(tokens), int(length), int(batch)) == sizes, name


@pytest.mark.parametrize(("gpu", "engine"), [(False, "tiled"), (True, "triton")])
def test_what_serves_the_losses_has_its_name_in_summary_and_doctor(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, engine: str
) -> None:
    monkeypatch.setattr(importlib.import_module("lcl_kernels.infonce"), "_triton_runs", lambda like: gpu)
    context = SimpleNamespace(device=SimpleNamespace(device=torch.device("cpu")))
    model = SimpleNamespace(language=SimpleNamespace(elementwise="triton" if gpu else "plain"))
    shown = _losses(load_recipe("demo"), context, model)  # type: ignore[arg-type]
    assert shown == f"{engine} contrastive, {'triton' if gpu else 'chunked'} cross-entropy"
    lines = {line.name: line.found for line in health.choose_parts("fp32")}
    assert lines["loss"] == engine
