"""One build of the emulator, one launch for each number of ranks, and a report of what was found."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "data")]
REPORT = os.environ.get("EMULATOR_REPORT", "")


@pytest.fixture(scope="session")
def emulator() -> Any:
    """The built emulator; skipped where `make emulate` has not installed what it runs."""
    if not REPORT:
        pytest.skip("runs by `make emulate`, on the CUDA build of torch")
    import emulated

    emulated.build()
    return emulated


@pytest.fixture(scope="session")
def report() -> Iterator[dict[str, Any]]:
    """What the tests found; written when the session ends."""
    found: dict[str, Any] = {}
    yield found
    if not REPORT or not found:
        return
    from lcl_mcore.diagnostics.environment import source_commit

    names = ("torch", "triton", "megatron-core", "transformer-engine")
    known = {name for name in names if importlib.util.find_spec(name.replace("-", "_").replace("_core", ""))}
    head = {
        "report": "emulated-h100",
        "what": "a device that computes nothing: launches, copies, collectives, host waits, host time and the "
        "allocator's peak are real, values are not, and nothing here says how fast a GPU is",
        **source_commit(),
        "versions": {name: importlib.metadata.version(name) for name in names if name in known},
    }
    Path(REPORT).write_text(json.dumps(head | dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def steps(emulator: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """A case's steps, one of each rank: the worker's line, with the `counts` of its log and the planner's `planned`."""
    from emulated_cases import CASES

    done: dict[str, list[dict[str, Any]]] = {}

    def start(cases: list[str]) -> None:
        log, ranks = tmp_path_factory.mktemp("steps") / "log", CASES[cases[0]].ranks
        printed = emulator.run(log, str(HERE / "emulated_step_worker.py"), *cases, ranks=ranks)
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        for rank in range(ranks):
            counts = dict(emulator.read(log, rank))
            mine = {line["case"]: line for line in lines if line["rank"] == rank}
            for case in cases:
                done.setdefault(case, []).append(mine[case] | {"counts": counts[case]})

    def get(case: str) -> list[dict[str, Any]]:
        if case not in done:
            one = CASES[case]
            start([name for name, other in CASES.items() if (other.ranks, other.te) == (one.ranks, one.te)])
        return done[case]

    return get


@pytest.fixture(scope="session")
def planned(emulator: Any) -> dict[tuple[str, int], dict[str, Any]]:
    """The planner's word on every case that it knows, by case and rank."""
    from emulated_cases import CASES

    known = [name for name, case in CASES.items() if not case.te]
    worker = str(HERE / "emulated_step_worker.py")
    printed = emulator.run(Path(os.devnull), worker, "--planned", *known, LD_PRELOAD="", CUDA_VISIBLE_DEVICES="")
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return {(line["case"], line["rank"]): line for line in lines}
