"""One run in one job, stopped again and again by real signals to one rank, and continued each time.

    stops_worker.py ROUNDS.json --recipe ... (the flags of tools/pretrain_lcl.py)

ROUNDS.json is a list of rounds, each a list of faults as in `faults_worker`, and one kind more: "disk" lets the files
of the rank grow to 1 kB only, from the save of its step until the next save. The last line on rank 0 is JSON: per
round the logged lines, and per rank how each save ended.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults_worker import inject_signals, slow_reading
from lcl_mcore import trainer as loop
from lcl_mcore.checkpoint.manager import Checkpointer, Outcome
from lcl_mcore.checkpoint.store import TrainState
from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.pretrain import parse_options
from lcl_mcore.distributed.groups import gather_objects
from lcl_mcore.fault_tolerance.lease import RunLease
from lcl_mcore.fault_tolerance.signals import StopRequest
from lcl_mcore.trainer import Trainer


def full_disk(faults: list[dict[str, Any]]) -> None:
    """No file of this process may grow while the save of such a step is under way."""
    start = Checkpointer.start
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def started(self: Checkpointer, state: TrainState) -> None:
        full = any(fault["kind"] == "disk" and fault["step"] == state.step for fault in faults)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if full else hard, hard))
        start(self, state)

    Checkpointer.start = started  # type: ignore[method-assign]


def main() -> int:
    rounds, *arguments = sys.argv[1:]
    options = parse_options(arguments)
    config = options.run
    assert options.out is not None

    from lcl_mcore.distributed.context import start

    context = start(config, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    stop = StopRequest(print)  # one for the process: an earlier run's would take the next one's signals
    loop.StopRequest = lambda log: stop  # type: ignore[assignment, misc]
    plan = [[f for f in faults if f["rank"] == context.rank] for faults in json.loads(Path(rounds).read_text())]
    everything = [fault for faults in plan for fault in faults]
    inject_signals(everything)
    slow_reading(everything)
    full_disk(everything)
    report = []
    for number in range(len(plan)):
        stop.received = None
        lines: list[str] = []
        outcomes: list[tuple[int, str]] = []
        trainer = Trainer(config, replace(context, log=lines.append), RunLease(), resume=number > 0)
        settle = trainer.checkpoints._settle

        def settled(outcome: Outcome | None, final: bool, settle: Any = settle, outcomes: Any = outcomes) -> None:
            if outcome is not None:
                outcomes.append((outcome.step, outcome.problem))
            settle(outcome, final)

        trainer.checkpoints._settle = settled  # type: ignore[method-assign]
        trainer.log.info = lines.append  # type: ignore[method-assign]
        assert trainer.train() == 0
        saves = gather_objects(outcomes, context.groups.host_control)
        report.append({"lines": lines, "saves": saves})
    if context.rank == 0:
        print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
