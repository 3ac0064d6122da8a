"""The installed command `lcl` and its equals: `python -m lcl_mcore`, `-m lcl_mcore.commands.NAME`, tools/*.py."""

from __future__ import annotations

import re

import pytest

from launch import ROOT, run_script
from lcl_mcore.commands.dispatch import MODULES

TOOLS = {
    "pretrain": "pretrain_lcl",
    "prepare": "prepare_data",
    "inspect": "inspect_data",
    "export": "export_encoder",
    "import": "import_released",
    "fetch": "fetch_corpora",
}


def test_help_names_every_command() -> None:
    done = run_script("-m", "lcl_mcore", "--help")
    assert done.returncode == 0
    assert re.findall(r"^  (\w+)", done.stdout, re.MULTILINE) == list(MODULES)
    assert max(map(len, done.stdout.splitlines())) <= 100
    modules = {path.stem for path in (ROOT / "lcl_mcore/commands").glob("*.py")} - {"__init__", "entry", "dispatch"}
    assert modules == set(MODULES.values())


@pytest.mark.parametrize("name", MODULES)
def test_help_is_that_of_the_tool(name: str) -> None:
    lcl = run_script("-m", "lcl_mcore", name, "--help")
    module = run_script("-m", f"lcl_mcore.commands.{MODULES[name]}", "--help")
    tool = run_script(f"tools/{TOOLS.get(name, name)}.py", "--help")
    assert (lcl.returncode, module.returncode, tool.returncode) == (0, 0, 0), lcl.stderr
    assert lcl.stdout.startswith(f"usage: lcl {name} ")
    first = [text.stdout.partition("\n\n")[2] for text in (lcl, module, tool)]
    assert first[0] == first[1] == first[2] != ""


def test_a_command_that_is_not_there() -> None:
    done = run_script("-m", "lcl_mcore", "evalute", "--x")
    assert (done.returncode, done.stderr) == (
        2,
        "error: lcl evalute: there is no such command. Did you mean evaluate?\n",
    )
