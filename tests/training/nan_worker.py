"""Trains a tiny run in which the pictures' values on rank 1 turn into NaN at step 3.

Prints, after the failure, whether every parameter and moment is bitwise what it was after step 2.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import torch
import torch.distributed as dist

from lcl_mcore.config.cli import parse_flags, resolve
from lcl_mcore.entry import run_main


def main() -> int:
    flags = parse_flags()
    config = resolve(flags)

    from lcl_mcore.errors import NonFiniteError
    from lcl_mcore.training.launch import start_job
    from lcl_mcore.training.trainer import Trainer

    assert flags.out is not None
    flags.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, start_job(config, flags.out), resume=False)
    poisoned = {"step": 0}
    original = trainer.model.image_side

    def image_side(batch, vectors):  # type: ignore[no-untyped-def]
        poisoned["step"] += 1
        bad = poisoned["step"] == 3 and dist.get_rank() == 1
        return original(batch, vectors * (float("nan") if bad else 1.0))

    trainer.model.image_side = image_side  # type: ignore[method-assign]
    before: list[torch.Tensor] = []
    run = trainer.train_step.run

    def snapshot(step, *rest):  # type: ignore[no-untyped-def]
        if step == 2:
            before.extend(t.clone() for t in tensors(trainer))
        return run(step, *rest)

    trainer.train_step.run = snapshot  # type: ignore[method-assign]
    try:
        trainer.run()
    except NonFiniteError as error:
        same = all(torch.equal(a, b) for a, b in zip(before, tensors(trainer), strict=True))
        print(f"rank {dist.get_rank()} unchanged {same}", flush=True)
        raise error
    return 0


def tensors(trainer) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Parameters, and this rank's moments and step counters."""
    if trainer.ddp.ddp_config.overlap_param_gather:
        trainer.ddp.start_param_sync(force_sync=True)
    moments = [value for state in trainer.optimizer.adam.state.values() for value in state.values()]
    return [*(p.detach() for p in trainer.model.parameters()), *moments]


if __name__ == "__main__":
    run_main(main)
