"""Every class that a command of the package reads its command line into."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import lcl_mcore.commands
from lcl_mcore.config.base import fields_of


def command_options() -> dict[str, Any]:
    """By module and name, for example `plan.PlanOptions`."""
    found = {}
    for module in pkgutil.iter_modules(lcl_mcore.commands.__path__):
        content = importlib.import_module(f"lcl_mcore.commands.{module.name}")
        for name, value in vars(content).items():
            if isinstance(value, type) and fields_of(value) and value.__module__ == content.__name__:
                found[f"{module.name}.{name}"] = value
    return found
