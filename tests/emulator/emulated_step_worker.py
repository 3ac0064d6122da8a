"""Runs steps of the named cases on the emulated GPU between marks of its log, and prints one line of JSON for each.

emulated_step_worker.py CASE...                   # all of one number of ranks
emulated_step_worker.py --planned CASE...         # what the planner says of them; no GPU, emulated or not
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emulated_cases import CASES

WARM_UP, TIMED = 3, 3


class OperatorCount(TorchDispatchMode):
    """How many operators a step dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def planned(names: list[str]) -> None:
    """The planner's launches and peak, rank by rank."""
    from lcl_mcore.data.synthetic import synthetic_step
    from lcl_mcore.planning.simulate import Simulator

    simulator = Simulator("cuda")
    for name in names:
        case, config = CASES[name], CASES[name].config()
        batch = synthetic_step(config, config.check_processes(case.ranks))
        for rank in range(case.ranks):
            count = simulator.count(config, case.ranks, rank, batch)
            print(json.dumps({"case": name, "rank": rank, "operators": count.operators.total(), "peak": count.peak}))


def counted(names: list[str]) -> None:
    """The emulator's side."""
    import step as benchmark
    from megatron.core import parallel_state

    import lcl_mcore.build as build
    from lcl_mcore.distributed.device import init_process_group, pick_device
    from lcl_mcore.distributed.groups import make_groups

    # Values mean nothing here, and drawing them takes most of the time.
    build.initialize = lambda *arguments: None
    runtime = ctypes.CDLL(None)
    if any(CASES[name].te for name in names):
        import cudnn_stand_in

        cudnn_stand_in.install()
    device = pick_device("cuda")
    init_process_group(device, 120)
    rank = torch.distributed.get_rank()
    for dtype in (torch.float32, torch.bfloat16):  # cuBLAS takes its workspaces at the first product
        layer = torch.nn.Linear(64, 64, device="cuda", dtype=dtype)
        layer(torch.zeros(64, 64, device="cuda", dtype=dtype)).sum().backward()
    for name in names:
        config = CASES[name].config()
        layout = config.parallel
        groups = make_groups(layout.tensor_parallel_size, layout.pipeline_parallel_size, 120, 1)
        timed = benchmark.TimedStep(config, device, groups)
        for _ in range(WARM_UP):
            timed.run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        gc.collect()
        gc.disable()
        runtime.emulator_mark(name.encode())
        timed.run()
        runtime.emulator_mark(b"end")
        peak = torch.cuda.max_memory_allocated() - timed.memory_before
        host = []
        for _ in range(TIMED):
            begun = time.process_time()
            timed.run()
            host.append(time.process_time() - begun)
        gc.enable()
        with OperatorCount() as operators:
            timed.run()
        found = {
            "case": name,
            "rank": rank,
            "peak": peak,
            "host_seconds": min(host),
            "operators": operators.count,
            "backends": {choice.part: choice.backend for choice in timed.training.choices},
        }
        print(json.dumps(found), flush=True)
        del timed, operators
        gc.collect()
        torch.cuda.empty_cache()
        parallel_state.destroy_model_parallel()
    sys.stdout.flush()
    os._exit(0)  # nobody tears down the process groups of all these layouts


if __name__ == "__main__":
    planned(sys.argv[2:]) if sys.argv[1] == "--planned" else counted(sys.argv[1:])
