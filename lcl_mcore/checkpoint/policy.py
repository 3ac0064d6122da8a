"""When to save, and with what: steps, minutes, the end of the job's time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import yaml

from lcl_mcore.checkpoint.manager import Checkpointer, Outcome, Tensors
from lcl_mcore.checkpoint.store import open_store
from lcl_mcore.config.base import to_dict
from lcl_mcore.config.schema import CheckpointConfig, RunConfig
from lcl_mcore.distributed.context import Context
from lcl_mcore.errors import CheckpointError, explain


def make_checkpointer(config: RunConfig, context: Context, tensors: Tensors, resume: bool) -> Checkpointer:
    """The checkpointer of a run. Collective.

    Raises:
        CheckpointError: there are checkpoints already, and the run is not meant to resume.
    """
    staging = context.run_folder / "checkpoints"
    store = open_store(config.checkpoint.folder or str(staging), staging)
    node = (int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    checkpointer = Checkpointer(
        store,
        tensors,
        context.groups.host_control,
        context.groups.host_checkpoint,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        config=yaml.safe_dump(to_dict(config), sort_keys=False),
        node=node,
    )
    held = checkpointer.names()
    if held and not resume:
        raise CheckpointError(
            explain(
                store.location,
                f"already holds checkpoints ({held[-1]} and others)",
                "Add --resume to continue, or choose another folder.",
            )
        )
    return checkpointer


class SavePolicy:
    """Steps decide on every rank alike; clocks on the first rank, which asks the others."""

    def __init__(self, config: CheckpointConfig, rank: int, clock: Callable[[], float] = time.time) -> None:
        self.config, self.first, self.clock = config, rank == 0, clock
        self.begun = self.last_save = clock()
        self.longest = 0.0
        self.saved_step: int | None = None
        """Step of the newest checkpoint begun; there is no need for another one of it."""
        ends = [float(os.environ["SLURM_JOB_END_TIME"])] if "SLURM_JOB_END_TIME" in os.environ else []
        if config.max_hours:
            ends.append(self.begun + 3600 * config.max_hours)
        self.end = min(ends, default=None)
        # Before any save has been timed: a twentieth of what is left, at most two minutes.
        self.reserve = min(120.0, (self.end - self.begun) / 20) if self.end is not None else 0.0

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due by the number of steps done."""
        return self.config.every > 0 and step % self.config.every == 0

    def request(self) -> bool:
        """Whether the minutes between checkpoints are over, on the first rank."""
        limit = 60 * self.config.minutes
        return self.first and limit > 0 and self.clock() - self.last_save >= limit

    def out_of_time(self) -> bool:
        """Whether it is time for the last checkpoint, on the first rank."""
        if not self.first or self.end is None:
            return False
        return self.clock() + max(2 * self.longest, self.reserve) >= self.end

    def started(self, step: int) -> None:
        """A save of the state after `step` steps began."""
        self.saved_step, self.last_save = step, self.clock()

    def finished(self, outcome: Outcome) -> None:
        """It is complete."""
        self.longest = max(self.longest, outcome.seconds)

    def failed(self, outcome: Outcome) -> None:
        """It failed: its step has no checkpoint."""
        if self.saved_step == outcome.step:
            self.saved_step = None
