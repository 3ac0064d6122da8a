"""megatron-core without torch.compile at import.

megatron-core decorates some functions with `torch.compile` while it is imported. That alone loads torch's compiler,
three seconds of processor time in every process, even where none of these functions is ever called (on a CPU). Here
each of them is compiled at its first call instead; nothing else changes.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

_PACKAGE = "megatron.core"


def later(compile: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` as a decorator whose work is done when the function is first called."""

    def decorate(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda function: decorate(function, **options)
        if not isinstance(function, types.FunctionType):
            return compile(function, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile(function, **options))
            return compiled[0](*args, **kwargs)

        return call

    return decorate


class _Loader(importlib.abc.Loader):
    """Executes a module with `torch.compile` put off."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        import torch

        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.loader  # all that the module shows is as ever
        compile = torch.compile
        torch.compile = later(compile)  # type: ignore[assignment]
        try:
            self.loader.exec_module(module)
        finally:
            torch.compile = compile


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `megatron.core`, which imports the rest of megatron-core that is decorated."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Put compilation off for a `megatron.core` that is imported from now on."""
    if _PACKAGE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
