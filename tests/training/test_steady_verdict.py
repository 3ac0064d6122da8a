"""The verdict of tests/steady.py on made-up samples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from steady import judge  # noqa: E402

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
    flat = judge(samples(0.0))
    assert flat["holds"]
    assert flat["mib_per_100_steps"] == pytest.approx(0.0, abs=1e-6)
    assert judge(samples(0.009 * MIB))["holds"]
    leak = judge(samples(0.011 * MIB))
    assert not leak["holds"]
    assert leak["mib_per_100_steps"] == pytest.approx(1.1, abs=0.01)
    files, threads = judge(samples(0.0, file_every=400)), judge(samples(0.0, thread_every=700))
    assert (files["holds"], threads["holds"]) == (False, False)
    assert (files["files_more"], threads["threads_more"]) == (3.0, 2.0)


def test_too_few_samples_are_no_verdict() -> None:
    with pytest.raises(RuntimeError, match="train for longer"):
        judge(samples(0.0)[:6])
