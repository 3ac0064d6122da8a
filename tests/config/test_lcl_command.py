"""The installed command `lcl` and its equals: `python -m lcl_mcore`, `-m lcl_mcore.commands.NAME`, tools/*.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch import ROOT, run_script
from lcl_mcore.commands.dispatch import MODULES
from lcl_mcore.config.run_folder import read_config

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


def test_the_printed_configuration_is_the_runs(tmp_path: Path) -> None:
    """As YAML alone on standard output: used as a file it is the same run, and nothing is written."""
    flags = ("--recipe", "paper-l14", "--lr", "0.0001", "--tp", "2", "--out", str(tmp_path / "run"), "--print-config")
    printed = run_script("-m", "lcl_mcore", "pretrain", *flags)
    assert (printed.returncode, printed.stderr) == (0, "")
    file = tmp_path / "paper.yaml"
    file.write_text(printed.stdout)
    config = read_config(file)
    assert (config.recipe, config.optim.lr, config.parallel.tensor_parallel_size) == ("paper-l14", 0.0001, 2)
    again = run_script("-m", "lcl_mcore", "pretrain", "--config", str(file), "--print-config")
    assert again.stdout == printed.stdout
    assert list(tmp_path.iterdir()) == [file]
