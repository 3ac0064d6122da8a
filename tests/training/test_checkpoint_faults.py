"""Kills, full disks and damage: the newest good checkpoint is found, loaded exactly, and the message says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(run_tool: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("faults")
    done = run_tool("tests/training/checkpoint_faults_worker.py", str(folder), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.timeout(280)
def test_killed_at_twenty_points_of_a_save(report: dict[str, Any]) -> None:
    """Before the rename the step before is whole, after it the new one; nothing half-made is left or counted."""
    cases = report["kill"]
    assert len(cases) == 20
    assert len({case["at"] for case in cases}) == 20
    assert cases[-1]["at"] == cases[-1]["of"] - 1
    for case in cases:
        assert case["killed"], case
        assert case["exact"], case
        assert case["left"] == [], case
        assert case["skipped"] == [], case
        assert case["step"] == (3 if "step-00000003" in case["names"] else 2), case
    steps = [case["step"] for case in cases]
    assert steps == sorted(steps)
    assert set(steps) == {2, 3}


def test_full_disk_at_three_sizes(report: dict[str, Any]) -> None:
    assert len({case["limit"] for case in report["full"]}) == 3
    assert all(case["problem"].endswith("[Errno 27] File too large") for case in report["full"])
    for case in report["full"]:
        assert case["left"] == ["step-00000001"]
        assert (case["step"], case["exact"]) == (1, True)


def test_every_flipped_cut_or_missing_file_is_noticed_before_use(report: dict[str, Any]) -> None:
    cases = report["damage"]
    files = {".metadata", "__0_0.distcp", "config.yaml", "manifest.json", "state.json", "metadata.json", "common.pt"}
    for kind, count in (("flip", 7), ("delete", 7), ("cut", 10)):
        of_kind = [case for case in cases if case["kind"] == kind]
        assert len(of_kind) == count
        assert kind == "cut" or {case["file"] for case in of_kind} == files
        for case in of_kind:
            assert (case["step"], case["exact"]) == (1, True), case
            assert len(case["skipped"]) == 1
            assert f"step-00000002: damaged, skipped: {case['file']}: " in case["skipped"][0]
            assert case["left"] == ["damaged-step-00000002", "step-00000001"]
    assert cases[-1]["kind"] == "none"
    assert (cases[-1]["step"], cases[-1]["skipped"]) == (2, [])
