"""NaN and loss spikes: the batches are skipped, and the rest is bitwise as if they had never been there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import torchrun
from lcl_mcore.batch import GlobalCounts, StepBatch
from lcl_mcore.config.schema import FaultConfig
from lcl_mcore.errors import NonFiniteError
from lcl_mcore.fault_tolerance.events import read_events
from lcl_mcore.fault_tolerance.recovery import Recovery, SpikeDetector
from training_runs import assert_same_run, records

NOBODY: Any = None  # no process group: nothing here asks other ranks
COUNTS = GlobalCounts((), (), (), ())


def test_spike_detector_wants_several_losses_in_a_row() -> None:
    config = FaultConfig(spike_warmup=10, spike_steps=3, spike_deviations=5.0)
    detector = SpikeDetector(config)
    for batch in range(40):
        assert not detector.add(batch, 2.0 + 0.1 * (-1) ** batch)
    assert detector.mean == pytest.approx(2.0, abs=0.02)
    assert detector.deviation == pytest.approx(0.1, abs=0.02)
    assert not detector.add(40, 9.0)
    assert not detector.add(41, 9.0)
    assert not detector.add(42, 2.0)  # back to normal
    saved = json.loads(json.dumps(detector.state()))
    again = SpikeDetector(config)
    again.load(saved)
    for one in (detector, again):
        assert [one.add(batch, 9.0) for batch in (43, 44, 45)] == [False, False, True]
        assert one.above == [43, 44, 45]
    assert detector.state() == again.state()


def test_skipped_batches_survive_in_checkpoint_and_folder() -> None:
    """A crash between going back and the next checkpoint leaves the range in the folder only."""
    recovery = Recovery(FaultConfig(skip_batches=((7, 8),)), {"step": 3}, [[20, 22]], NOBODY)
    recovery.ranges.add((30, 30))
    position = json.loads(json.dumps(recovery.position({"step": 31})))
    assert position["step"] == 31
    resumed = Recovery(FaultConfig(), position, [], NOBODY)
    out = [n for n in range(40) if resumed.skips(StepBatch((), COUNTS, {"step": n + 1}, ""))]
    assert out == [7, 8, 20, 21, 22, 30]


def test_going_back_from_the_same_place_is_limited() -> None:
    recovery = Recovery(FaultConfig(rollback_limit=2), None, [], NOBODY)
    recovery.count_rollback(10)
    recovery.count_rollback(10)
    with pytest.raises(NonFiniteError) as refused:
        recovery.count_rollback(10)
    assert str(refused.value) == (
        "batch 10: the run went back 2 times from here without getting past it. Look at the data and the learning "
        "rate; --resume starts at the last checkpoint."
    )
    recovery.count_rollback(11)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nan_and_spike_on_two_ranks(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    flags = arguments(tmp_path, "--steps", "18", "checkpoint.keep=9")[1:]
    done = torchrun(2, "tests/training/policies_worker.py", str(tmp_path), *flags, timeout=580)
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    for name in ("skip", "rollback", "fused", "limit"):
        assert report[name]["unchanged"] == [[2, 2], [2, 2]], name  # two bad steps on each rank
    assert report["stop"]["unchanged"] == [[1, 1], [1, 1]]  # the default: the run ends before the update
    assert "error: step 3: gradient norm nan: what rank 1 computed is NaN or Inf" in report["stop"]["lines"][-1]
    assert len(records(tmp_path / "stop")) == 2
    assert not list((tmp_path / "stop" / "checkpoints").glob("step-*"))
    for name in ("skip", "rollback"):
        text = "\n".join(report[name]["lines"])
        assert "gradient norm nan (ranks [1]); batches 4 to 4 are skipped" in text
        assert ("went back to" in text) == (name == "rollback")
        assert_same_run(tmp_path / "skipped", tmp_path / name)
        assert len(records(tmp_path / name)) == 18
    left, right = records(tmp_path / "skip"), records(tmp_path / "fused")
    for step, record in left.items():  # another optimizer, through bad steps and a checkpoint: the same learning
        for field in ("loss", "grad_norm"):
            assert right[step][field] == pytest.approx(record[field], rel=1e-5), step
    assert "error: step 3: gradient norm nan: what rank 1 computed" in report["limit"]["lines"][-1]
    assert len(records(tmp_path / "limit")) == 2

    spike = [e for e in read_events(tmp_path / "spike") if e["event"] in ("skip", "rollback")]
    assert [e["event"] for e in spike] == ["skip", "rollback"]
    first, last = spike[0]["batches"]
    assert first <= 12 < last  # the harmful batch is among those skipped
    assert spike[1]["step"] <= first
    assert_same_run(tmp_path / "never_there", tmp_path / "spike")
    assert read_events(tmp_path / "rollback")[-1]["recomputed"] > 0
