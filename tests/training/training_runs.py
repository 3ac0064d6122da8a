"""Reading and comparing the metrics of finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def records(out: Path) -> dict[int, dict[str, Any]]:
    """The metrics file by step; every step must be there once."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line for line in lines}


EXACT = ("loss", "contrastive", "generation", "grad_norm", "scale", "lr", "order_hash", "images_seen")


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise the same numbers at every step."""
    left, right = records(one), records(other)
    assert left.keys() == right.keys()
    for step, record in left.items():
        assert {k: record[k] for k in EXACT} == {k: right[step][k] for k in EXACT}, step
