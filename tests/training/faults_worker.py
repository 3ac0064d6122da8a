"""The training script with faults that happen for real at chosen places.

    faults_worker.py PLAN.json --recipe ... (the flags of tools/pretrain_lcl.py)

PLAN.json is a list of faults, each with "kind" and some of
    attempt  of torchrun's restarts, default 0      rank     in which it is injected
    step     1-based, as in the log                 phase    "data", "step", "save" or "evaluate"
    delay    seconds after the phase began          signal   SIGKILL, SIGSTOP, SIGTERM, SIGUSR2
kind "signal" sends the signal to the rank itself, once; "writer" kills it when its part of the checkpoint of `step`
is written, before it is verified; "sleep" makes every step of the rank longer by `delay`; "read" makes reading step
`step` last `delay` longer; "unreadable" makes it fail; "nan" spoils the rank's images in batch `batch`; "jump" trains
batch `batch` with a learning rate 100,000 times too high.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lcl_mcore.checkpoint import manager as checkpoint
from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.pretrain import parse_options
from lcl_mcore.config.run_folder import check_folder
from lcl_mcore.data.loader import StepReader
from lcl_mcore.errors import DataError
from lcl_mcore.fault_tolerance.events import is_restart
from lcl_mcore.fault_tolerance.lease import hold
from lcl_mcore.fault_tolerance.watchdog import Watchdog
from lcl_mcore.trainer import Trainer


def plan_for(path: Path, rank: int) -> list[dict[str, Any]]:
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return [f for f in json.loads(path.read_text()) if f.get("attempt", 0) == attempt and f.get("rank", rank) == rank]


def inject_signals(faults: list[dict[str, Any]]) -> None:
    """Signals sent by a timer thread when a phase of a step has begun; says when, for the reports."""
    set_phase, waiting = Watchdog.set_phase, [fault for fault in faults if fault["kind"] == "signal"]

    def observed(self: Watchdog, phase: str, step: int) -> None:
        set_phase(self, phase, step)
        for fault in list(waiting):
            if (phase, step + 1) == (fault["phase"], fault["step"]):
                waiting.remove(fault)
                number = getattr(signal, fault["signal"])

                def inject(number: int = number, phase: str = phase, step: int = step + 1) -> None:
                    print(f"INJECTED FAULT {time.time():.3f} {number} {phase} {step}", flush=True)
                    os.kill(os.getpid(), number)

                threading.Timer(fault.get("delay", 0.0), inject).start()

    Watchdog.set_phase = observed  # type: ignore[method-assign]


def kill_the_writer(faults: list[dict[str, Any]]) -> None:
    write = checkpoint.write_boxes

    def written(folder: Path, *rest: Any) -> Any:
        entries = write(folder, *rest)
        for fault in faults:
            if fault["kind"] == "writer" and f"step-{fault['step']:08d}" in folder.name:
                print(f"INJECTED FAULT {time.time():.3f} 9 writer {fault['step']}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        return entries

    checkpoint.write_boxes = written


def slow_reading(faults: list[dict[str, Any]]) -> None:
    """Reading of a step that takes longer, or that fails."""
    read = StepReader._read

    def slow(self: StepReader) -> Any:
        for fault in faults:
            if fault["kind"] == "read" and self._step + 1 == fault["step"]:
                time.sleep(fault["delay"])
            if fault["kind"] == "unreadable" and self._step + 1 == fault["step"]:
                raise DataError("shard-007.tar: is damaged. Copy it again.")
        return read(self)

    StepReader._read = slow  # type: ignore[method-assign]


def spoil(trainer: Trainer, faults: list[dict[str, Any]]) -> None:
    """Sleep, NaN and a jump of the learning rate, by the number of the batch."""
    run, encode = trainer.step.run, trainer.model.encode_images
    current = {"batch": -1}

    def spoiled_run(step: int, batch: Any, lr: float, **requests: bool) -> Any:
        current["batch"] = batch.number
        for fault in faults:
            if fault["kind"] == "sleep":
                time.sleep(fault["delay"])
            if fault["kind"] == "jump" and fault["batch"] == current["batch"]:
                lr *= 1e5
        return run(step, batch, lr, **requests)

    def spoiled_encode(*args: Any, **kwargs: Any) -> Any:
        features = encode(*args, **kwargs)
        if any(f["kind"] == "nan" and f["batch"] == current["batch"] for f in faults):
            features = type(features)(**{k: v * float("nan") for k, v in vars(features).items()})
        return features

    trainer.step.run = spoiled_run  # type: ignore[method-assign]
    trainer.model.encode_images = spoiled_encode  # type: ignore[method-assign]


def main() -> int:
    plan, *arguments = sys.argv[1:]
    options = parse_options(arguments)
    config = options.run
    assert options.out is not None
    resume = options.resume or is_restart(options.out)
    check_folder(options.out, resume)

    from lcl_mcore.distributed.context import start

    context = start(config, options.out)
    faults = plan_for(Path(plan), context.rank)
    inject_signals(faults)
    slow_reading(faults)
    kill_the_writer(faults)
    with hold(config, context) as lease:
        trainer = Trainer(config, context, lease, resume=resume)
        spoil(trainer, faults)
        dist.barrier(group=context.groups.host_control)
        return trainer.train()


if __name__ == "__main__":
    run_main(main)
