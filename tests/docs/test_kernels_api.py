"""docs/kernels.md, section API, is that of `lcl_kernels`: every public name, with its real signature."""

from __future__ import annotations

import inspect
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import lcl_kernels
import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
SECTION = DOCUMENT.read_text(encoding="utf-8").split("\n## API\n")[1].split("\n## ")[0]
INTERNAL = {"keys", "gathered", "gather_now", "engine"}
"""Methods of a step in progress that only the package calls."""


def documented() -> dict[str, inspect.Signature]:
    """Signatures in the section's blocks, by name."""
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL))
    calls = re.findall(r"^(\w[\w.]*)\(([^()]*)\)$", blocks, re.MULTILINE)
    return {name: inspect.signature(eval(f"lambda {' '.join(parameters.split())}: 0")) for name, parameters in calls}


def real(name: str) -> inspect.Signature:
    """The same from the package, without annotations and `self`."""
    value: Any = lcl_kernels
    for part in name.split("."):
        value = getattr(value, part)
    found = inspect.signature(value)
    parameters = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name != "self"]
    return inspect.Signature(parameters)


def test_every_public_name_is_there_with_its_signature() -> None:
    signatures = documented()
    assert {name.partition(".")[0] for name in signatures} == set(lcl_kernels.__all__)
    for name, signature in signatures.items():
        assert str(signature) == str(real(name)), name


def test_methods_and_parameters_are_explained() -> None:
    signatures = documented()
    for name in lcl_kernels.__all__:
        value = getattr(lcl_kernels, name)
        if inspect.isclass(value) and not is_dataclass(value):
            own = {n for n, m in vars(value).items() if inspect.isfunction(m) and not n.startswith("_")}
            assert {f"{name}.{method}" for method in own - INTERNAL} <= signatures.keys()
    explained = set(re.findall(r"`([a-z_]+)`", SECTION))
    for name, signature in signatures.items():
        assert set(signature.parameters) <= explained, name


@pytest.mark.parametrize("word", ["SUM convention", "ValueError", "RuntimeError", "IndexError", "[n, p, h]"])
def test_conventions_are_named(word: str) -> None:
    assert word in SECTION
