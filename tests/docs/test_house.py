"""docs/contributing.md says which way imports go and how long files are; the tree keeps to it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"lcl_kernels": ROOT / "kernels"}


def allowed() -> dict[str, set[str]]:
    """Package -> packages it may import, from the table."""
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    section = text.split("## Which way imports go")[1].split("\n## ")[0]
    table: dict[str, set[str]] = {}
    before: set[str] = set()
    for package, cell in re.findall(r"^\| `([\w.]+)` \|(.*)\|$", section, re.MULTILINE):
        names = {name if "." in name else f"lcl_mcore.{name}" for name in re.findall(r"`([a-z_.]+)`", cell)}
        names = {name.replace("lcl_mcore.lcl_kernels", "lcl_kernels") for name in names}
        before = names | before if "the same" in cell else names
        table[package] = before
    return table


def imports(folder: Path) -> set[str]:
    """`lcl_kernels` and `lcl_mcore.PACKAGE` that the files of a folder name."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names.append(node.module)
            for name in names:
                parts = name.split(".")
                if parts[0] == "lcl_kernels":
                    found.add("lcl_kernels")
                elif parts[0] == "lcl_mcore":
                    found.add(".".join(parts[:2]))
    return found


def test_imports_go_one_way() -> None:
    table = allowed()
    packages = {f"lcl_mcore.{path.parent.name}" for path in (ROOT / "lcl_mcore").glob("*/__init__.py")}
    assert table.keys() == packages | {"lcl_kernels"}
    for package, may in table.items():
        folder = FOLDERS.get(package, ROOT / "lcl_mcore" / package.rpartition(".")[2])
        assert imports(folder) - may <= {package, "lcl_mcore.errors"}, package
    order = [name for name in table if name != "lcl_mcore.platform"]  # whose doctor asks the others
    for place, name in enumerate(order):
        assert table[name] - {"lcl_mcore.platform"} <= set(order[:place]), name


def test_files_are_short() -> None:
    for folder, limit in (("lcl_mcore", 400), ("kernels", 400), ("tools", 100)):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) < limit, path
