"""What the campaigns conclude from samples and metrics, on made-up ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "campaigns")]

from soak import Tally, compare, markdown, summary  # noqa: E402
from steady import growth  # noqa: E402

MIB = 2**20


def samples(bytes_per_step: float, file_every: int = 0, thread_every: int = 0) -> list[tuple[int, ...]]:
    """Every 20 steps; memory grows fast in the first fifth, as it does while allocators warm up."""
    return [
        (
            step,
            int(300 * MIB + min(step, 300) * MIB / 10 + bytes_per_step * step),
            50 + (step // file_every if file_every else step % 3),
            20 + (step // thread_every if thread_every else 0),
        )
        for step in range(20, 2001, 20)
    ]


def test_flat_holds_and_every_leak_is_seen() -> None:
    flat = growth(samples(0.0))
    assert flat["holds"]
    assert flat["mib_per_100_steps"] == pytest.approx(0.0, abs=1e-6)
    assert growth(samples(0.009 * MIB))["holds"]
    leak = growth(samples(0.011 * MIB))
    assert not leak["holds"]
    assert leak["mib_per_100_steps"] == pytest.approx(1.1, abs=0.01)
    files, threads = growth(samples(0.0, file_every=400)), growth(samples(0.0, thread_every=700))
    assert (files["holds"], threads["holds"]) == (False, False)
    assert (files["files_more"], threads["threads_more"]) == (3.0, 2.0)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(RuntimeError, match="train for longer"):
        growth(samples(0.0)[:6])


def write_run(folder: Path, **changes: Any) -> Path:
    """Metrics of three steps; `changes` belong to the last."""
    folder.mkdir()
    lines = [
        {"step": s, "loss": 1.0 / s, "grad_norm": 1.0, "contrastive": 2.0, "generation": 3.0, "order_hash": s}
        for s in (1, 2, 3)
    ]
    lines[-1] |= changes
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("changes", "bitwise", "same_documents"),
    [
        ({}, True, True),
        ({"grad_norm": 1.0 + 1e-12}, False, True),
        ({"loss": 1 / 3 + 1e-9}, False, True),
        ({"loss": 1 / 3 + 1e-4}, False, False),
        ({"order_hash": 7}, False, False),
        ({"step": 4}, False, False),
    ],
)
def test_every_difference_of_a_run_is_seen(
    tmp_path: Path, changes: dict[str, Any], bitwise: bool, same_documents: bool
) -> None:
    undisturbed, faulted = write_run(tmp_path / "a"), write_run(tmp_path / "b", **changes)
    if "step" in changes:
        with pytest.raises(AssertionError):
            compare(faulted, undisturbed, bitwise=True)
        return
    assert compare(faulted, undisturbed, bitwise=True)["holds"] is bitwise
    assert compare(faulted, undisturbed, bitwise=False)["holds"] is same_documents


def test_the_committed_soak_report_is_what_the_campaign_writes() -> None:
    folder = Path(__file__).resolve().parents[2] / "campaigns"
    report = json.loads((folder / "soak.json").read_text(encoding="utf-8"))
    assert summary(Tally(), [], 0, 0.0).keys() <= report.keys()
    assert markdown(report) == (folder / "soak.md").read_text(encoding="utf-8")
