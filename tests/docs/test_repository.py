"""What surrounds the code agrees with it: package list, type marker, license, citation, CI, pre-commit."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_installed_and_typed(pyproject: dict[str, Any]) -> None:
    setup = pyproject["tool"]["setuptools"]
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "lcl_mcore").rglob("__init__.py")]
    assert sorted(setup["packages"]) == sorted(["lcl_kernels", *(".".join(f.parts) for f in folders)])
    for package, folder in (("lcl_mcore", "lcl_mcore"), ("lcl_kernels", "kernels")):
        assert setup["package-data"][package] == ["py.typed"]
        assert (ROOT / folder / "py.typed").read_bytes() == b""


def test_license_and_citation(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    text = (ROOT / project["license-files"][0]).read_text(encoding="utf-8")
    assert re.search(r"Apache License\s+Version 2\.0, January 2004", text)
    assert text.rstrip().endswith("limitations under the License.")
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert citation["version"] == project["version"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_workflow_and_pre_commit_run_the_same_checks() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    linters = set(re.findall(r"^\t\$\(BIN\)/(ruff check|ruff format|mypy)", makefile, re.MULTILINE))
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {re.sub(r"^\.venv/bin/| --\S+", "", hook["entry"]) for hook in repository["hooks"]} == linters
    assert len(linters) == 3
