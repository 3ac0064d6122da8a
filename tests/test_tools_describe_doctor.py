"""`tools/describe.py` and `tools/doctor.py` as a user starts them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lcl_mcore.config.recipes import RECIPES, load_recipe
from lcl_mcore.models.count import parameter_counts
from lcl_mcore.platform import doctor

TOOLS = Path(__file__).parent.parent / "tools"


def start(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / tool), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_describe_prints_the_released_sizes() -> None:
    done = start("describe.py", "--recipe", "released-b32-mmc4", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["parameters"]["total"] == 178_642_945
    assert report["tokens_per_image"] == {"encoder": 50, "language_model": 49, "with_markers": 51}
    text = start("describe.py", "--recipe", "released-b32-mmc4").stdout
    assert "178,642,945" in text
    assert "tokens per row         2048" in text


def test_describe_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['describe.py', '--recipe', 'demo']\n"
        f"try:\n    runpy.run_path({str(TOOLS / 'describe.py')!r}, run_name='__main__')\n"
        "except SystemExit:\n    pass\nprint([m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_describe_answers_a_wrong_name_with_the_right_one() -> None:
    done = start("describe.py", "--recipe", "paper-l15")
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
    done = start("doctor.py", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["healthy"] is True
    parts = [line["name"] for line in report["parts"] if line["name"]]
    assert parts == ["layers", "attention", "norm", "optimizer", "loss", "decode"]
    required = {line["name"]: line for line in report["required"]}
    assert required["megatron-core"]["found"] == importlib.metadata.version("megatron-core")
    assert all(line["reason"] for line in report["optional"] if not line["ok"])
    if not report["optional"][0]["ok"]:
        assert "transformer-engine" in report["parts"][0]["reason"]


def test_doctor_refuses_fp8_without_transformer_engine() -> None:
    if doctor_module("transformer_engine"):
        pytest.skip("Transformer Engine is installed")
    layers = doctor.choose_parts("fp8")[0]
    assert not layers.ok
    assert layers.reason.startswith("fp8 needs Transformer Engine: ")
    report = doctor.Report(parts=[layers], errors=[f"layers: {layers.reason}"])
    assert not report.healthy
    assert doctor.format_report(report).endswith("not ready to train")


def doctor_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_doctor_warns_of_packages_under_a_wrong_name(fake_package: Callable[[str, str, str], None]) -> None:
    if doctor_module("apex"):
        pytest.skip("an apex is installed")
    before = doctor.find_impostors()
    fake_package("apex", "apex", "0.9.10.dev0")
    new = [text for text in doctor.find_impostors() if text not in before]
    sys.modules.pop("apex", None)
    assert len(new) == 1
    assert new[0].startswith("apex 0.9.10.dev0: ")
    assert "https://github.com/NVIDIA/apex" in new[0]


def test_doctor_names_versions_that_do_not_fit() -> None:
    lines = doctor.check_requirements(
        ["torch>=99", "no-such-package>=1", "numpy", "flash-attn>=2.8; extra == 'flash-attn'"], "Do this."
    )
    assert [(line.name, line.ok) for line in lines] == [
        ("torch", False), ("no-such-package", False), ("numpy", True),
    ]  # fmt: skip
    assert lines[0].reason == "torch>=99 is required. Do this."
    assert lines[1].found == "missing"


def test_doctor_survives_a_broken_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "IMPORTS", ("no_such_binary",))
    report = doctor.examine()
    assert not report.healthy
    assert report.parts == []
    text = doctor.format_report(report)
    assert "ERROR no_such_binary: broken. does not import: ModuleNotFoundError" in text
    assert text.endswith("not ready to train")


@pytest.mark.distributed
def test_doctor_sums_over_the_processes_of_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(TOOLS / "doctor.py"), "--json"],
        capture_output=True, text=True, timeout=200, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = json.loads(done.stdout)["ranks"]
    assert [(r["rank"], r["total"]) for r in ranks] == [(0, 3.0), (1, 3.0)]
    assert all(r["small_ms"] > 0 and r["large_ms"] > 0 for r in ranks)


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
