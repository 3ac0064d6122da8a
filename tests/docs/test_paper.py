"""docs/paper.md: what its tables say of our recipes is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcl_mcore.commands.pretrain import parse_options
from lcl_mcore.config.base import to_dict

ROOT = Path(__file__).resolve().parents[2]
SETTING = re.compile(r"`(?:([a-z0-9-]+): )?([a-z_]+(?:\.[a-z0-9_]+)+) = ([^`]+)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> list[tuple[str, str, str]]:
    """The rows of the tables with these three columns."""
    found, inside = [], False
    for line in (ROOT / "docs" / "paper.md").read_text().splitlines():
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if cells == ("paper", "released code", "ours"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not set(line) <= set("|-"):
            paper, released, ours = cells
            found.append((paper, released, ours))
    return found


def value_of(recipe: str, path: str) -> Any:
    """A setting of a recipe's resolved configuration with one source."""
    value: Any = to_dict(parse_options(["--recipe", recipe, "--data", "a"]).run)
    for name in path.split("."):
        value = value[0][name] if isinstance(value, list) else value[name]
    return value


def stated(text: str) -> Any:
    """What the document writes as a value."""
    parts = [yaml.safe_load(re.sub(r"^(\d)e-", r"\1.0e-", part)) for part in text.split()]
    return parts if len(parts) > 1 else parts[0]


def check(column: str, recipe: str) -> int:
    settings = SETTING.findall(column)
    for other, path, text in settings:
        assert value_of(other or recipe, path) == (text if text == "off" else stated(text)), path
    return len(settings)


@pytest.mark.parametrize(("paper", "released", "ours"), rows(), ids=lambda cell: cell[:50])
def test_a_sentence_of_the_paper(paper: str, released: str, ours: str) -> None:
    """The third column is the paper's recipe, the second the released code's."""
    tests = TEST.findall(ours)
    assert check(ours, "paper-l14") + len(tests) >= 1
    check(released, "released-b32-mmc4")
    for file, name in tests:
        assert f"def {name}(" in (ROOT / file).read_text()


def test_every_table_is_read() -> None:
    assert len(rows()) == 37
    assert sum(len(SETTING.findall(ours)) for *_, ours in rows()) >= 45


@pytest.mark.parametrize("recipe", ["paper-b16", "large-h14", "large-g14"])
def test_the_other_recipes_differ_in_size_only(recipe: str) -> None:
    paper, other = (to_dict(parse_options(["--recipe", name, "--data", "a"]).run) for name in ("paper-l14", recipe))
    for section in ("data", "loss", "checkpoint", "log", "faults", "evaluation"):
        assert paper[section] == other[section], section
    assert paper["optim"] | {"lr": 0} == other["optim"] | {"lr": 0}
    for name in ("drop_path", "layer_scale", "class_token", "pre_norm", "image_size"):
        assert paper["model"]["vision"][name] == other["model"]["vision"][name]
    for name in ("activation", "tied_head", "separate_norms", "dropout", "embedding_dropout", "init", "vocab_size"):
        assert paper["model"]["language"][name] == other["model"]["language"][name]
