"""Every script that can be started says what it does when asked, and does not do it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import run_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("tools", "examples", "benchmarks", "campaigns")
    for path in (ROOT / folder).rglob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_starts_nothing(script: str) -> None:
    """What it would start shows in its output; `usage:` comes first."""
    done = run_script(script, "--help", timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.lstrip().startswith("usage: "), done.stdout[:300]
