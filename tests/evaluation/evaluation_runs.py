"""What the tests of evaluation share besides fixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import MODEL

ROOT = Path(__file__).resolve().parents[2]


def records(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


SMALL = (*MODEL, "model.language.layers=1", "checkpoint.every=0", "log.tensorboard=true")


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    """Command line of a tiny run with evaluation; `more` are settings."""
    return [
        "tools/pretrain_lcl.py",
        "--recipe",
        "demo",
        "--data",
        str(corpus / "pairs"),
        "--tokenizer",
        str(corpus),
        "--out",
        str(out),
        "--steps",
        "4",
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "4",
        "--timeout",
        "60",
        "--set",
        *SMALL,
        f"evaluation.data={corpus / 'pairs'}",
        *more,
    ]
