"""Runs one of the package's commands on the emulated GPU, with marks around each step and plausible numbers from it.

    emulated_tool_worker.py COMMAND ARGUMENT...

Kernels compute nothing, so what a step reports is whatever lay in its memory: taken literally it would end the run as
not finite. Everything else is the command as a user starts it.
"""

from __future__ import annotations

import ctypes
from typing import Any

from lcl_mcore.commands import dispatch
from lcl_mcore.distributed.device import pick_device
from lcl_mcore.optional_packages import transformer_engine


def plausible(output: Any, step: int) -> Any:
    """The numbers of a step that went well; the host still waits for the real ones."""
    from lcl_mcore.metrics import StepStats

    output.values.tolist()
    return StepStats(step, 1.0, False, 0, 0, 0, 5.0, 6.0, 14.0)


def marked(name: str, function: Any) -> Any:
    """`function` between two marks of the log."""

    def call(*arguments: Any, **named: Any) -> Any:
        runtime.emulator_mark(name.encode())
        try:
            return function(*arguments, **named)
        finally:
            runtime.emulator_mark(b"end")

    return call


runtime = ctypes.CDLL(None)
if __name__ == "__main__":
    pick_device()
    from lcl_mcore.metrics import StepOutput
    from lcl_mcore.train_step import TrainStep

    if transformer_engine().usable:
        import cudnn_stand_in

        cudnn_stand_in.install()
    StepOutput.read = plausible  # type: ignore[method-assign]
    TrainStep.run = marked("step", TrainStep.run)  # type: ignore[method-assign]
    dispatch.run()
