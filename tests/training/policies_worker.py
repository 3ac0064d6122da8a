"""Several runs after each other in one job: what the policies for bad numbers do, and what they must equal.

    policies_worker.py FOLDER --recipe ... (flags of a run of 18 steps on 2 ranks)

Prints one line of JSON on rank 0: per run the logged lines, and whether bad steps left all tensors bitwise unchanged.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from adam_stand_in import ApexLike
from faults_worker import spoil
from lcl_mcore import optimizer
from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.pretrain import parse_options
from lcl_mcore.config.schema import FaultConfig
from lcl_mcore.errors import NonFiniteError
from lcl_mcore.fault_tolerance.events import read_events
from lcl_mcore.fault_tolerance.lease import RunLease
from lcl_mcore.fused_adam import FusedAdam, build_adam
from lcl_mcore.trainer import Trainer

QUICK = {"spike_warmup": 3, "spike_steps": 2, "spike_margin": 2, "spike_deviations": 4.0}
NAN = [{"kind": "nan", "rank": 1, "batch": batch} for batch in (4, 9)]
JUMP = [{"kind": "jump", "batch": 12}]
RUNS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "skip": ({"nonfinite": "skip"}, NAN),
    "rollback": ({"nonfinite": "rollback"}, NAN),
    "fused": ({"nonfinite": "rollback"}, NAN),  # with a stand-in for Transformer Engine's and Apex's optimizer
    "skipped": ({"skip_batches": [[4, 4], [9, 9]]}, []),
    "spike": ({"spike": "rollback", **QUICK}, JUMP),
    "never_there": ({"spike": "rollback", **QUICK}, []),
    "stop": ({}, [{"kind": "nan", "rank": 1, "batch": 2}]),
    "limit": ({"nonfinite": "skip", "nonfinite_limit": 2}, [{"kind": "nan", "rank": 1, "batch": b} for b in (2, 3)]),
}


def tensors(trainer: Trainer) -> list[torch.Tensor]:
    if trainer.ddp.ddp_config.overlap_param_gather:
        trainer.ddp.start_param_sync(force_sync=True)
    moments = [value for state in trainer.optimizer.adam.state.values() for value in state.values()]
    return [t.detach().clone() for t in (*trainer.model.parameters(), *moments)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def watch_bad_steps(trainer: Trainer, unchanged: list[bool]) -> list[torch.Tensor]:
    """Compare all tensors before and after every refused step, at the moment it is recovered from.

    Returns:
        What they were before the newest step.
    """
    before: list[torch.Tensor] = []
    run, recover = trainer.step.run, trainer.recover

    def stepped(*args: Any, **requests: bool) -> Any:
        before[:] = tensors(trainer)
        return run(*args, **requests)

    def recovered(bad: Any, action: Any) -> None:
        if bad.stats.skipped:
            unchanged.append(same(before, tensors(trainer)))
        recover(bad, action)

    trainer.step.run = stepped  # type: ignore[method-assign]
    trainer.recover = recovered  # type: ignore[method-assign]
    return before


def main() -> int:
    folder, *arguments = sys.argv[1:]
    base = parse_options(arguments).run

    from lcl_mcore.distributed.context import start

    context = start(base, Path(folder))
    report: dict[str, Any] = {}
    for name, (settings, faults) in RUNS.items():
        if name == "never_there":  # the undisturbed twin of the run with the spike
            gone = [e["batches"] for e in read_events(Path(folder) / "spike") if e["event"] == "skip"]
            settings = {**settings, "skip_batches": gone}
        lines: list[str] = []
        config = dataclasses.replace(base, faults=FaultConfig(**settings))
        own = dataclasses.replace(context, run_folder=Path(folder) / name, log=lines.append)
        own.run_folder.mkdir(parents=True, exist_ok=True)
        optimizer.build_adam = partial(FusedAdam, ApexLike) if name == "fused" else build_adam
        trainer = Trainer(config, own, RunLease(), resume=False)
        trainer.log.info = lines.append  # type: ignore[method-assign]
        spoil(trainer, [f for f in faults if f.get("rank", context.rank) == context.rank])
        unchanged: list[bool] = []
        before = watch_bad_steps(trainer, unchanged)
        try:
            trainer.train()
        except NonFiniteError as error:
            lines.append(f"error: {error}")
            if name in ("stop", "limit"):  # nothing recovers from its last step: compared where the run ended
                unchanged.append(same(before, tensors(trainer)))
        flags = torch.tensor([len(unchanged), sum(unchanged)])
        everyone = [torch.zeros_like(flags) for _ in range(context.world_size)]
        dist.all_gather(everyone, flags, group=context.groups.host_control)
        report[name] = {"lines": lines, "unchanged": [item.tolist() for item in everyone]}
    if context.rank == 0:
        print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
