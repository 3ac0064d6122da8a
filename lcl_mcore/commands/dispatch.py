"""The installed command `lcl`: `lcl pretrain ...` is `python tools/pretrain_lcl.py ...`, and so on."""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path

from lcl_mcore import __version__
from lcl_mcore.commands.entry import run_main
from lcl_mcore.errors import ConfigError, explain

MODULES = {
    "pretrain": "pretrain",
    "prepare": "prepare",
    "inspect": "inspect",
    "describe": "describe",
    "plan": "plan",
    "evaluate": "evaluate",
    "export": "export",
    "import": "import_released",
    "checkpoint": "checkpoint",
    "doctor": "doctor",
    "fetch": "fetch_corpora",
}
"""Name of a command -> its module in this package."""


def main() -> int:
    """Carry out the command that the first word names, with the words behind it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"lcl_mcore {__version__}")
        return 0
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"The commands are {', '.join(MODULES)}."
        raise ConfigError(explain(f"lcl {name}", "there is no such command", remedy))
    module = importlib.import_module(f"{__package__}.{MODULES[name]}")
    sys.argv[:2] = [f"lcl {name}"]  # the name that its --help shows
    code: int = module.main()
    return code


def help_text() -> str:
    """Every command with what it does."""
    lines = [f"  {name:<12}{_summary(module)}" for name, module in MODULES.items()]
    return "\n".join(
        [
            "usage: lcl COMMAND ... ; lcl COMMAND --help shows its flags.",
            "",
            *lines,
            "",
            "Several processes: torchrun --nproc-per-node N -m lcl_mcore.commands.pretrain ...",
        ]
    )


def _summary(module: str) -> str:
    """First line of a module's text, which is not imported for it."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return text.splitlines()[0].partition(" (`")[0].rstrip(".")


def run() -> None:
    """Entry point of the installed script."""
    run_main(main)
