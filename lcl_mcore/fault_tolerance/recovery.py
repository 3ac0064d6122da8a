"""What happens after a step that must not count: which batches are left out, and where the run goes on.

Batches are numbered from 0 in the order of the data, steps count updates; they differ by the batches left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from lcl_mcore.batch import StepBatch
from lcl_mcore.checkpoint.manifest import TrainState
from lcl_mcore.config.faults import FaultConfig
from lcl_mcore.distributed.groups import gather_bytes

KEY = "faults"  # of the saved data position
HORIZON = 50  # losses that the running mean remembers


def batch_number(batch: StepBatch) -> int:
    """Place of a global batch in the order of the data, from 0."""
    return int(batch.position["step"]) - 1


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


class Recovery:
    """The batches left out and the counters behind the policies; equal on all ranks."""

    def __init__(
        self, config: FaultConfig, position: dict[str, Any] | None, logged: Iterable[list[int]]
    ) -> None:
        """Continue from a saved data position; `logged` are ranges from the run's folder.

        Those may be newer than the checkpoint: a crash between going back and the next checkpoint must
        not forget why the run went back.
        """
        self.config, self.spikes = config, SpikeDetector(config)
        self.ranges: set[tuple[int, int]] = set(config.skip_batches)
        self.ranges |= {(first, last) for first, last in logged}
        self.restore(position)
        self.bad_in_a_row = 0
        self.rollbacks, self.furthest = 0, -1

    def restore(self, position: dict[str, Any] | None) -> None:
        """Go (back) to a saved position; batches once left out stay left out."""
        saved = (position or {}).get(KEY, {})
        self.ranges |= {(first, last) for first, last in saved.get("skipped", [])}
        if "spikes" in saved:
            self.spikes.load(saved["spikes"])
        else:
            self.spikes = SpikeDetector(self.config)

    def position(self, position: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {**position, KEY: {"skipped": sorted(self.ranges), "spikes": self.spikes.state()}}

    def leaves_out(self, batch: int) -> bool:
        return any(first <= batch <= last for first, last in self.ranges)

    def leave_out(self, first: int, last: int) -> None:
        self.ranges.add((first, last))

    def may_go_back(self, batch: int) -> bool:
        """Count one more return because of `batch`; False when the same place was returned from too often."""
        if batch > self.furthest:
            self.rollbacks, self.furthest = 0, batch
        self.rollbacks += 1
        return self.rollbacks <= self.config.rollback_limit


def batches_seen(state: TrainState) -> int:
    """Number of batches read before a checkpoint."""
    return int((state.position or {"step": 0})["step"])


def share_ranges(events: list[dict[str, Any]], control: dist.ProcessGroup) -> list[list[int]]:
    """The ranges of batches that rank 0's event file says are left out, on every rank."""
    mine = [event["batches"] for event in events if event["event"] == "leave-out"]
    answer: list[list[int]] = json.loads(gather_bytes(json.dumps(mine).encode(), control)[0])
    return answer
