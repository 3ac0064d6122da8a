"""Kills, full disks and damage, each in forked processes below FOLDER; the last line is a JSON report."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from checkpoint_toys import count_operations, in_child, restore, save
from lcl_mcore.checkpoint.store import RUN

EVENLY, LAST = 12, 8  # points of a save at which it is killed: over all of it, and its last operations


def kill(base: Path) -> list[dict[str, Any]]:
    """Steps 1 and 2 are complete; the save of step 3, which also removes step 1, dies at each point."""
    origin = base / "origin"
    for step in (1, 2):
        assert in_child(lambda step=step: save(str(origin), base / "unused", step)) == (0, "")

    def attempt(folder: Path, limit: int | None) -> int:
        seen = count_operations(folder, limit)
        assert save(str(folder), base / "unused", 3) == ""
        return seen[0]

    shutil.copytree(origin, base / "counted")
    status, total = in_child(lambda: attempt(base / "counted", None))
    assert status == 0
    results = []
    for limit in [*(total * part // (EVENLY + 1) for part in range(EVENLY)), *range(total - LAST, total)]:
        folder = base / f"kill{limit}"
        shutil.copytree(origin, folder)
        status, _ = in_child(lambda folder=folder, limit=limit: attempt(folder, limit))
        found = in_child(lambda folder=folder: restore(str(folder), base / "unused"))[1]
        left = [name.name for name in folder.glob("*.partial")]
        results.append({"at": limit, "of": total, "killed": status == signal.SIGKILL, "left": left, **found})
    return results


def full(base: Path) -> list[dict[str, Any]]:
    """Files cannot grow beyond a size: nothing fits; the tensors fit half; all but the last bytes fit."""
    origin = base / "origin"
    assert in_child(lambda: save(str(origin), base / "unused", 1)) == (0, "")
    size = max(path.stat().st_size for path in (origin / "step-00000001").iterdir())

    def limited(folder: Path, limit: int) -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return save(str(folder), base / "unused", 2)

    results = []
    for number, limit in enumerate((0, size // 2, size - 1)):
        folder = base / f"full{number}"
        shutil.copytree(origin, folder)
        problem = in_child(lambda folder=folder, limit=limit: limited(folder, limit))[1]
        left = [path.name for path in folder.iterdir() if path.name != RUN]
        found = in_child(lambda folder=folder: restore(str(folder), base / "unused"))[1]
        results.append({"limit": limit, "problem": problem, "left": left, **found})
    return results


def damage(base: Path) -> list[dict[str, Any]]:
    """One bit of each file, each file gone, the tensors cut at 10 lengths: the step before is found."""
    origin = base / "origin"
    for step in (1, 2):
        assert in_child(lambda step=step: save(str(origin), base / "unused", step)) == (0, "")
    newest = origin / "step-00000002"
    files = sorted(path.name for path in newest.iterdir())
    tensors = max(files, key=lambda name: (newest / name).stat().st_size)
    length = (newest / tensors).stat().st_size
    cases: list[tuple[str, str, int]] = [(name, "flip", 0) for name in files]
    cases += [(name, "delete", 0) for name in files]
    cases += [(tensors, "cut", length * part // 10) for part in range(10)]
    results = []
    for number, (name, kind, amount) in enumerate(cases):
        folder = base / f"damage{number}"  # of its own: what is damaged is set aside
        shutil.copytree(origin, folder)
        path = folder / newest.name / name
        content = path.read_bytes()
        if kind == "flip":
            changed = bytearray(content)
            changed[len(content) // 3] ^= 16
            path.write_bytes(changed)
        elif kind == "delete":
            path.unlink()
        else:
            path.write_bytes(content[:amount])
        found = in_child(lambda folder=folder: restore(str(folder), base / "unused"))[1]
        left = sorted(path.name for path in folder.iterdir() if path.name != RUN)
        results.append({"file": name, "kind": kind, "left": left, **found})
    results.append({"file": "", "kind": "none", **in_child(lambda: restore(str(origin), base / "unused"))[1]})
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    report = {part.__name__: part(folder / part.__name__) for part in (kill, full, damage)}
    print(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)
