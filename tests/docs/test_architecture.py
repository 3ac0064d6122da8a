"""Imports go one way, file by file: the whole graph, imports inside functions included, has no circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def module_name(path: Path) -> str:
    """Dotted name of a file of the packages `lcl_mcore` and `lcl_kernels`."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts[0] = "lcl_kernels"
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for folder in ("lcl_mcore", "kernels") for p in (ROOT / folder).rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Modules of our own that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys() or {node.module}
    return found & FILES.keys()


def test_imports_have_no_circle() -> None:
    try:
        list(TopologicalSorter({name: imported(path) for name, path in FILES.items()}).static_order())
    except CycleError as error:
        pytest.fail(f"files import each other in a circle: {' -> '.join(error.args[1])}")
