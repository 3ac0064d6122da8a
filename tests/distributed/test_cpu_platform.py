"""megatron-core's compiled functions are compiled when they are called, and not when they are imported."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from lcl_mcore.distributed.cpu import compile_at_first_call

IMPORTS = """
import sys, torch
compile = torch.compile
from lcl_mcore.distributed.device import pick_device
pick_device('cpu')
import lcl_mcore.trainer
import megatron.core
from megatron.core.fusions import fused_bias_dropout, fused_bias_gelu
assert torch.compile is compile
assert hasattr(fused_bias_gelu.bias_gelu, "__wrapped__")
print([name for name in ("torch._inductor.compile_fx", "torch._inductor.lowering") if name in sys.modules])
"""


def test_importing_the_trainer_does_not_load_the_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_function_is_compiled_once_with_its_options_at_the_first_call() -> None:
    log: list[Any] = []

    def compile(function: Any, **options: Any) -> Any:
        log.append((function.__name__, options))
        return lambda *args: function(*args) + 1

    decorate = compile_at_first_call(compile)

    @decorate
    def plain(x: int) -> int:
        return 2 * x

    @decorate(dynamic=True)
    def optional(x: int) -> int:
        return 3 * x

    assert log == []
    assert [plain(1), plain(2), optional(1)] == [3, 5, 4]
    assert log == [("plain", {}), ("optional", {"dynamic": True})]
    assert plain.__name__ == "plain"
