"""docs/architecture.md leads through code that exists: every stop and every folder on its map is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOP = re.compile(r"`([\w./-]+\.py):([A-Za-z_][\w.]*)(?:\([^`]*\))?`")
PAGE = 60
"""Lines of a tour at most."""


def names_in(tree: ast.Module) -> set[str]:
    """Functions, classes, methods (`Class.method`), fields of classes and names assigned at module level."""
    found: set[str] = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    add(tree.body, "")
    return found


def missing_stops(text: str) -> list[str]:
    """Stops whose file or name does not exist."""
    missing = []
    for file, name in STOP.findall(text):
        path = ROOT / file
        if not path.is_file():
            missing.append(f"{file}: no such file")
        elif name not in names_in(ast.parse(path.read_text(encoding="utf-8"))):
            missing.append(f"{file}: no {name}")
    return missing


def sections(text: str, level: int) -> dict[str, str]:
    """Texts below the headings of one level, by heading."""
    parts = re.split(rf"^{'#' * level} (.+)$", text, flags=re.MULTILINE)
    bodies = [re.split(rf"^#{{1,{level - 1}}} ", part, flags=re.MULTILINE)[0] for part in parts[2::2]]
    return dict(zip(parts[1::2], bodies, strict=True))


def test_every_stop_exists() -> None:
    assert missing_stops(TEXT) == []


def test_four_tours_of_a_page_with_stops() -> None:
    tours = {name: body for name, body in sections(TEXT, 2).items() if name.startswith("Tour ")}
    assert [name.partition(":")[0] for name in tours] == ["Tour 1", "Tour 2", "Tour 3", "Tour 4"]
    for name, body in tours.items():
        assert len(STOP.findall(body)) >= 5, name
        assert len(body.strip().splitlines()) <= PAGE, name


def test_four_answers_name_file_and_function() -> None:
    rows = re.findall(r"^\| (?!to add)(\w.+?) \| (.+) \|$", sections(TEXT, 2)["Where to change what"], re.MULTILINE)
    assert len(rows) >= 4
    for question, answer in rows:
        assert STOP.findall(answer), question


def test_every_room_is_on_the_map() -> None:
    package = ROOT / "lcl_mcore"
    rooms = {f"lcl_mcore/{path.name}/" for path in package.iterdir() if (path / "__init__.py").is_file()}
    rooms |= {f"lcl_mcore/{path.name}" for path in package.glob("*.py") if path.name != "__init__.py"}
    rooms |= {"kernels/", "tools/", "examples/", "benchmarks/", "campaigns/", "tests/"}
    named = set(re.findall(r"`([\w/]+(?:/|\.py))`", sections(TEXT, 2)["Map"]))
    named = {f"lcl_mcore/{name}" if f"lcl_mcore/{name}" in rooms else name for name in named}
    assert sorted(rooms - named) == [], "not on the map"
    assert [name for name in sorted(named) if name.startswith("lcl_mcore/") and name not in rooms] == []


@pytest.mark.parametrize(
    ("stop", "problem"),
    [
        ("`lcl_mcore/errors.py:explain`", []),
        ("`lcl_mcore/errors.py:LclError`", []),
        ("`lcl_mcore/errors.py:explain(value)`", []),
        ("`lcl_mcore/errors.py:no_such_name`", ["lcl_mcore/errors.py: no no_such_name"]),
        ("`lcl_mcore/none.py:explain`", ["lcl_mcore/none.py: no such file"]),
        ("`lcl_mcore/errors.py`", []),
    ],
)
def test_a_wrong_stop_is_noticed(stop: str, problem: list[str]) -> None:
    assert missing_stops(stop) == problem
