"""Saves to, kills uploads to, and restores from the object store at URL; the last line is a JSON report.

checkpoint_remote_worker.py URL FOLDER [restore]    (the last word: nothing but a restore)
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from checkpoint_toys import in_child, restore, save


def killed_upload(url: str, staging: Path, step: int, at: int) -> str:
    """Die before the given request of a save's upload."""
    from lcl_mcore.storage import RemoteStorage

    original, seen = RemoteStorage._retried, [0]

    def counted(self: RemoteStorage, name: str, request: Any, **options: Any) -> Any:
        if Path(staging / f"step-{step:08d}.partial" / ".metadata").is_file():  # uploads have begun
            if seen[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
        return original(self, name, request, **options)

    RemoteStorage._retried = counted  # type: ignore[method-assign]
    return save(url, staging, step)


def main(url: str, base: Path) -> dict[str, Any]:
    report: dict[str, Any] = {}
    report["saved"] = [in_child(lambda step=step: save(url, base / "one", step))[1] for step in (1, 2)]
    report["killed"] = []
    for request in (0, 3, 8):
        status, _ = in_child(lambda request=request: killed_upload(url, base / "two", 3, request))
        found = in_child(lambda request=request: restore(url, base / f"fresh{request}"))[1]
        report["killed"].append({"killed": status == signal.SIGKILL, **found})
    report["retention"] = in_child(lambda: save(url, base / "three", 4))[1]
    report["final"] = in_child(lambda: restore(url, base / "fresh"))[1]
    return report


if __name__ == "__main__":
    action = restore if sys.argv[3:] == ["restore"] else main
    result = action(sys.argv[1], Path(sys.argv[2]))
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)
