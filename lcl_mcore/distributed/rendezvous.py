"""A job's store, free of what earlier attempts of the same job left in it.

torchrun restarts a job's processes in place, and their store lives on in the launcher: the new processes would
read the addresses of the dead ones ("Connection refused" with gloo in torch 2.13; pytorch #135712). The usual
remedy is an environment variable of the launcher; here nothing has to be known. The restart count that torchrun
hands out is no name for an attempt: launchers of different nodes may count differently after a membership change.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PREFIX = "lcl/attempt"
MEETING_SECONDS = 300.0
"""How far apart processes may start: hundreds read the same packages, or the machine is busy."""


def join_store(timeout_seconds: float) -> tuple[dist.Store, int, int]:
    """Meet the other processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Returns:
        A store that only this attempt's processes write to, this rank, the number of ranks.

    Raises:
        TimeoutError: some process did not come within `timeout_seconds`.
    """
    limit = timedelta(seconds=timeout_seconds)
    store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    name = _lead(store, world, timeout_seconds) if rank == 0 else _follow(store, limit)
    return dist.PrefixStore(f"{PREFIX}/{name}", store), rank, world


def _lead(store: dist.Store, world: int, timeout_seconds: float) -> str:
    """Rank 0 names the attempt and tells everyone who asks; processes that died before never confirm."""
    name, end = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    known, waiting = 0, set[int]()
    while store.add(f"{PREFIX}/{name}/confirmed", 0) < world - 1:
        asked = store.add(f"{PREFIX}/asked", 0)
        waiting.update(range(known + 1, asked + 1))
        known = asked
        for number in sorted(waiting):
            if store.check([f"{PREFIX}/ask/{number}"]):
                store.set(f"{PREFIX}/answer/{store.get(f'{PREFIX}/ask/{number}').decode()}", name)
                waiting.remove(number)
        if time.monotonic() > end:
            came = store.add(f"{PREFIX}/{name}/confirmed", 0) + 1
            raise TimeoutError(f"{came} of {world} processes came to the job within {timeout_seconds:g} s.")
        time.sleep(0.01)
    return name


def _follow(store: dist.Store, limit: timedelta) -> str:
    token = uuid.uuid4().hex
    store.set(f"{PREFIX}/ask/{store.add(f'{PREFIX}/asked', 1)}", token)
    try:
        store.wait([f"{PREFIX}/answer/{token}"], limit)
    except dist.DistStoreError:
        raise TimeoutError(f"rank 0 did not come to the job within {limit.total_seconds():g} s.") from None
    name = store.get(f"{PREFIX}/answer/{token}").decode()
    store.add(f"{PREFIX}/{name}/confirmed", 1)
    return name
