"""Runs a command of tools/ several times, each in a forked process, after the slow imports were made once.

    tool_worker.py CASES.json    (a list of argument lists, each beginning with the script)

The last line is JSON: per case the exit code, standard output and standard error.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

LIMIT = 60
"""Seconds of a case; one that takes longer ends with SIGALRM."""
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


def run(script: str, *arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = [script, *arguments]
            code = 0
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as end:
                code = int(end.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return {"code": os.waitstatus_to_exitcode(status), "stdout": texts[0], "stderr": texts[1]}


if __name__ == "__main__":
    import lcl_mcore.distributed.context
    import lcl_mcore.evaluation.heldout
    import lcl_mcore.trainer  # noqa: F401  # for the children

    results = [run(*case) for case in json.loads(Path(sys.argv[1]).read_text())]
    print(json.dumps(results))
