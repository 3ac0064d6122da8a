"""`tools/describe.py` and `tools/doctor.py` as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parent.parent / "tools"


def start(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / tool), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_describe_prints_the_released_sizes() -> None:
    done = start("describe.py", "--recipe", "released-b32-mmc4", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["parameters"]["total"] == 178_642_945
    assert report["tokens_per_image"] == {"encoder": 50, "language_model": 49, "with_markers": 51}
    text = start("describe.py", "--recipe", "released-b32-mmc4").stdout
    assert "178,642,945" in text
    assert "tokens per row         2048" in text


def test_describe_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['describe.py', '--recipe', 'demo']\n"
        f"try:\n    runpy.run_path({str(TOOLS / 'describe.py')!r}, run_name='__main__')\n"
        "except SystemExit:\n    pass\nprint([m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_describe_answers_a_wrong_name_with_the_right_one() -> None:
    done = start("describe.py", "--recipe", "paper-l15")
    assert done.returncode == 2
    assert "Did you mean paper-l14?" in done.stderr
    assert "Traceback" not in done.stderr
