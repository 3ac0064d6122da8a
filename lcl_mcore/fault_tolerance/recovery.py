"""What happens after a step that must not count: which batches are skipped, and where the run goes on.

Batches are numbered from 0 in the order of the data, steps count updates; they differ by the batches skipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_mcore.batch import StepBatch
from lcl_mcore.checkpoint.store import TrainState
from lcl_mcore.config.schema import FaultConfig
from lcl_mcore.distributed.context import Context
from lcl_mcore.errors import NonFiniteError, explain
from lcl_mcore.fault_tolerance.events import read_events
from lcl_mcore.metrics import FinishedStep, StepRecord

KEY = "faults"  # of the saved data position
HORIZON = 50  # losses that the running mean remembers

Action = Literal["continue", "skip", "rollback"]
"""What the trainer does after a step: nothing, or go on without its batches here, or from an earlier checkpoint."""


class SpikeDetector:
    """Running mean and mean absolute deviation of the loss; a spike is several losses in a row far above.

    Losses out of line do not enter the statistics.
    """

    def __init__(self, config: FaultConfig) -> None:
        self.config = config
        self.count, self.mean, self.deviation = 0, 0.0, 0.0
        self.above: list[int] = []
        """Batches of the newest losses out of line."""

    def add(self, batch: int, loss: float) -> bool:
        """Take in one loss; whether it completes a spike, whose batches are then in `above`."""
        limit = self.mean + self.config.spike_deviations * max(self.deviation, 1e-3 * abs(self.mean))
        if self.count >= self.config.spike_warmup and loss > limit:
            self.above.append(batch)
            return len(self.above) >= self.config.spike_steps
        self.above.clear()
        share = 1.0 / min(self.count + 1, HORIZON)
        self.deviation += share * (abs(loss - self.mean) - self.deviation) if self.count else 0.0
        self.mean += share * (loss - self.mean)
        self.count += 1
        return False

    def state(self) -> list[Any]:
        return [self.count, self.mean, self.deviation, self.above]

    def load(self, state: list[Any]) -> None:
        self.count, self.mean, self.deviation = int(state[0]), float(state[1]), float(state[2])
        self.above = [int(batch) for batch in state[3]]


@dataclass(frozen=True)
class SkippedBatches:
    """Batches `first` to `last`, why they are skipped, and the line that says so."""

    first: int
    last: int
    reason: str
    text: str


class Recovery:
    """The batches skipped and the counters behind the policies; equal on all ranks."""

    def __init__(
        self,
        config: FaultConfig,
        position: dict[str, Any] | None,
        logged: Iterable[list[int]],
        control: dist.ProcessGroup,
    ) -> None:
        """Continue from a saved data position.

        Args:
            logged: ranges from the run's folder. They may be newer than the checkpoint: a crash between a
                rollback and the next checkpoint must not forget why the run went back.
            control: all ranks over gloo; asked who was not finite.
        """
        self.config, self.control = config, control
        self.spikes = SpikeDetector(config)
        self.ranges: set[tuple[int, int]] = set(config.skip_batches)
        self.ranges |= {(first, last) for first, last in logged}
        self.restore(position)
        self.bad_in_a_row = 0
        self.rollbacks, self.furthest = 0, -1
        self.nonfinite_ranks: list[int] = []

    def restore(self, position: dict[str, Any] | None) -> None:
        """Go (back) to a saved position; batches once skipped stay skipped."""
        saved = (position or {}).get(KEY, {})
        self.ranges |= {(first, last) for first, last in saved.get("skipped", [])}
        if "spikes" in saved:
            self.spikes.load(saved["spikes"])
        else:
            self.spikes = SpikeDetector(self.config)

    def position(self, position: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {**position, KEY: {"skipped": sorted(self.ranges), "spikes": self.spikes.state()}}

    def skips(self, batch: StepBatch) -> bool:
        """Whether the batch is read but not trained on."""
        return any(first <= batch.number <= last for first, last in self.ranges)

    def on_step(self, done: FinishedStep, finite: Tensor) -> Action:
        """Decide what follows a step whose numbers are known; the same on all ranks.

        Args:
            finite: bool scalar, whether what this rank computed in its newest step was finite.

        Raises:
            NonFiniteError: the step was not finite and the policy, or its limit, ends the run.
        """
        if done.stats.skipped:
            self.bad_in_a_row += 1
            self.nonfinite_ranks = self._gather_nonfinite(finite)
            if self.config.nonfinite == "stop" or self.bad_in_a_row >= self.config.nonfinite_limit:
                raise self._nonfinite_error(done)
            return self.config.nonfinite
        self.bad_in_a_row = 0
        if self.config.spike != "off" and self.spikes.add(done.record.batch.number, done.loss):
            return "rollback"
        return "continue"

    def skip(self, bad: FinishedStep, newest: StepRecord) -> SkippedBatches:
        """Skip a bad step's batches from now on.

        Args:
            newest: the last step that ran: after a step that was not finite no later one was applied either.
        """
        if bad.stats.skipped:
            first, last = bad.record.batch.number, newest.batch.number
            reason = f"gradient norm {bad.stats.grad_norm} (ranks {self.nonfinite_ranks or 'unknown'})"
        else:
            first = max(self.spikes.above[0] - self.config.spike_margin, 0)
            last = bad.record.batch.number
            reason = f"loss spike at batches {self.spikes.above}"
            self.spikes.above = []
        self.ranges.add((first, last))
        text = (
            f"step {bad.stats.step + 1}: {reason}; batches {first} to {last} are skipped "
            f"(order hash {bad.record.batch.order_hash})"
        )
        return SkippedBatches(first, last, reason, text)

    def count_rollback(self, batch: int) -> None:
        """Count one more return because of `batch`.

        Raises:
            NonFiniteError: the run went back from the same place too often.
        """
        if batch > self.furthest:
            self.rollbacks, self.furthest = 0, batch
        self.rollbacks += 1
        if self.rollbacks > self.config.rollback_limit:
            raise NonFiniteError(
                explain(
                    f"batch {batch}",
                    f"the run went back {self.config.rollback_limit} times from here without getting past it",
                    "Look at the data and the learning rate; --resume starts at the last checkpoint.",
                )
            )

    def _gather_nonfinite(self, finite: Tensor) -> list[int]:
        """Ranks whose own outputs were not finite; all ranks ask together."""
        own = torch.tensor([float(finite)])
        everyone = [torch.zeros_like(own) for _ in range(self.control.size())]
        dist.all_gather(everyone, own, group=self.control)
        return [rank for rank, flag in enumerate(everyone) if not flag]

    def _nonfinite_error(self, done: FinishedStep) -> NonFiniteError:
        """Name step and ranks; the device already refused this and every later update.

        On CUDA the flag is read a step later, so a rank is named when its outputs still are not finite.
        """
        ranks = ", ".join(map(str, self.nonfinite_ranks))
        where = f"what rank {ranks} computed" if ranks else "the gradient (every rank's outputs were finite)"
        step = done.stats.step
        return NonFiniteError(
            explain(
                f"step {step + 1}: gradient norm {done.stats.grad_norm}",
                f"{where} is NaN or Inf; parameters were not updated and no checkpoint was written after step {step}",
                "Continue from the last checkpoint with --resume, with a lower --lr or --precision fp32; data "
                f"position of the step: order hash {done.record.batch.order_hash}.",
            )
        )


def batches_seen(state: TrainState) -> int:
    """Number of batches read before a checkpoint."""
    return int((state.position or {"step": 0})["step"])


def skipped_ranges(context: Context) -> list[list[int]]:
    """The ranges of batches that rank 0's event file says are skipped, on every rank."""
    ranges: list[Any] = [None]
    if context.rank == 0:
        events = read_events(context.run_folder)
        ranges = [[event["batches"] for event in events if event["event"] == "skip"]]
    dist.broadcast_object_list(ranges, group_src=0, group=context.groups.host_control)
    found: list[list[int]] = ranges[0]
    return found
