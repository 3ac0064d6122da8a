"""What a run says about its time: event files of all versions, goodput over restarts, and the slowest rank."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lcl_mcore.fault_tolerance.events import EVENTS, EventLog, is_restart, read_events
from lcl_mcore.fault_tolerance.goodput import Account, Goodput, past_attempts
from lcl_mcore.fault_tolerance.stragglers import StepTimes, StragglerDetector, compare

# As a run of an earlier version wrote it: 20 s, then a crash, 5 s until the next start.
OLD = [
    {"event": "start", "time": 100.0, "job": "a", "step": 0, "world": 2, "layout": "tp1 pp1 dp2", "pid": 7},
    {"event": "leave-out", "time": 105.0, "batches": [4, 6], "step": 5, "why": "gradient norm nan"},
    {"event": "straggler", "time": 106.0, "own": [0.1, 0.3], "read": [0.0, 0.0], "slowest": 1, "kind": "own"},
    {
        "event": "tick",
        "time": 120.0,
        "productive": 9.0,
        "data": 1.0,
        "checkpoint": 2.0,
        "redone": 3.0,
        "restart": 5.0,
        "wall": 20.0,
    },
]


def test_event_files_of_earlier_versions_read_in_todays_words(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in OLD) + '{"event": "ti')
    events = read_events(tmp_path)
    assert [event["event"] for event in events] == ["start", "skip", "straggler", "tick"]
    assert events[1]["batches"] == [4, 6]
    assert events[2] == {
        "event": "straggler",
        "time": 106.0,
        "compute": [0.1, 0.3],
        "data": [0.0, 0.0],
        "slowest": 1,
        "kind": "compute",
    }
    assert events[3]["recomputed"] == 3.0
    EventLog(tmp_path, enabled=True).record("rollback", step=3)
    assert read_events(tmp_path)[:-1] == events  # the line that the crash cut spoils no other
    assert read_events(tmp_path)[-1].keys() == {"event", "time", "step"}


def test_goodput_adds_up_the_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in OLD))
    before = past_attempts(read_events(tmp_path), now=125.0)
    assert before == Account(
        productive=9.0, data=1.0, checkpoint=2.0, recomputed=3.0, restart=10.0, wall=25.0, restarts=1
    )
    ended = [*read_events(tmp_path), {**OLD[-1], "event": "end", "recomputed": 3.0}]
    assert past_attempts(ended, now=1e6).wall == 20.0  # the time after a clean end does not count
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert is_restart(tmp_path)
    goodput = Goodput(EventLog(tmp_path, enabled=True), step=3, world_size=2, layout="tp1 pp1 dp2")
    goodput.start_step()
    goodput.add_step(2.0, data_seconds=0.5)
    goodput.add_checkpoint_stall(0.25)
    goodput.add_recomputed(1.0)
    goodput.end()
    total = goodput.total()
    assert (total.productive, total.data, total.checkpoint, total.recomputed) == (9.5, 1.5, 2.25, 4.0)
    assert total.restarts == 1
    assert total.describe().startswith("goodput    ")
    assert " in 2 attempts: productive " in total.describe()
    end = read_events(tmp_path)[-1]
    assert {"event", "time", "productive", "data", "checkpoint", "recomputed", "restart", "wall"} == end.keys()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    assert not is_restart(tmp_path)


def test_time_in_regions_that_wait_for_others_is_not_a_ranks_own() -> None:
    detector = StragglerDetector(1.5)
    detector.start_step()
    with detector.region("forward_language"):
        time.sleep(0.05)
    with detector.region("contrastive_loss"), detector.region("gradient_sync"):  # counted once
        time.sleep(0.2)
    detector.end_step(data_seconds=0.7)
    times = detector.times
    assert times.steps == 1
    assert times.data == 0.7
    assert times.wall - times.compute == pytest.approx(0.2, abs=0.05)
    assert times.compute == pytest.approx(times.wall - 0.2, abs=0.05)
    assert times.wall >= 0.25


def sums(compute: list[float], data: list[float]) -> list[StepTimes]:
    """After 10 steps of one second each."""
    return [StepTimes(10, 10.0, 10 * c, 10 * d) for c, d in zip(compute, data, strict=True)]


NOTHING = [StepTimes()] * 4


@pytest.mark.parametrize(
    ("compute", "data", "named"),
    [
        ([0.2, 0.2, 0.6, 0.2], [0.0] * 4, ("compute", 2, 0.6, 0.2)),
        ([0.2, 0.2, 0.29, 0.2], [0.0] * 4, ("", 2, 0.29, 0.2)),  # less than 1.5 times
        ([0.02, 0.02, 0.06, 0.02], [0.0] * 4, ("", 2, 0.06, 0.02)),  # less than 5 % of the step
        ([0.2] * 4, [0.1, 0.0, 0.9, 0.0], ("data", 2, 0.9, 0.1)),  # two ranks receive what the others read
        ([0.2] * 4, [0.1, 0.0, 0.5, 0.0], ("", 0, 0.2, 0.2)),  # reading fits behind the step
    ],
)
def test_the_slowest_rank_is_named_when_it_is_out_of_line(
    compute: list[float], data: list[float], named: tuple[str, int, float, float]
) -> None:
    report = compare(NOTHING, sums(compute, data), straggler_ratio=1.5)
    assert report is not None
    assert (report.kind, report.slowest) == named[:2]
    assert (report.seconds, report.median) == pytest.approx(named[2:])
    assert report.steps == 10


def test_ranks_are_not_compared_before_all_have_stepped() -> None:
    assert compare(NOTHING, [*sums([0.2] * 3, [0.0] * 3), StepTimes()], 1.5) is None
    assert compare([StepTimes()], sums([0.2], [0.0]), 1.5) is None


def test_a_straggler_is_logged_once(tmp_path: Path) -> None:
    detector, lines = StragglerDetector(1.5), list[str]()
    events = EventLog(tmp_path, enabled=True)
    assert detector.metrics(lines.append, events) == {}
    detector.compare(NOTHING)
    detector.compare(sums([0.2, 0.2, 0.6, 0.2], [0.0] * 4))
    for _ in range(2):
        assert detector.metrics(lines.append, events) == {
            "slowest_rank": 2,
            "slowest_seconds": pytest.approx(0.6),
            "slowest_ratio": pytest.approx(3.0),
        }
    assert lines == ["straggler  rank 2: 0.600 s of compute a step, the others 0.200 s (3.0 times; over 10 steps)"]
    (event,) = read_events(tmp_path)
    assert event["slowest"] == 2
    assert event["kind"] == "compute"
