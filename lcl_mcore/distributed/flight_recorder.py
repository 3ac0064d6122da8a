"""Which collectives are pending on this rank, from torch's flight recorder (gloo and NCCL alike)."""

from __future__ import annotations

import json
import os
from typing import Any

from torch._C import _distributed_c10d as c10d

from lcl_mcore.errors import CheckpointError, DataError

ENTRIES = 512
_COMMUNICATION_ERRORS = (
    "gloo/transport",
    "ProcessGroupGloo",
    "NCCL error",
    "NCCL communicator",
    "collective operation timeout",
    "TCPStore",
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
)


def record_collectives() -> None:
    """Switch the recorder on; must come before the process group exists. A user's own setting is kept."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(ENTRIES))


def is_communication_error(error: BaseException) -> bool:
    """Whether an error says that another rank did not answer, rather than that this one did something wrong."""
    if not isinstance(error, (RuntimeError, OSError, CheckpointError, DataError)):
        return False  # the last two may repeat what a collective said
    return any(part in str(error) for part in _COMMUNICATION_ERRORS)


def pending_collectives() -> list[str]:
    """Collectives that were started and not finished; failing that the newest one of all.

    Returns:
        Each reads `all_reduce of [10] in group host-control (its number 7)`.
    """
    dumped: dict[str, Any] = json.loads(c10d._dump_fr_trace_json(True, False))  # type: ignore[attr-defined]
    entries = sorted(dumped.get("entries", []), key=lambda e: e["record_id"])
    pending = [e for e in entries if not e["retired"]]
    return [_describe(entry) for entry in (pending[:4] or entries[-1:])]


def _describe(entry: dict[str, Any]) -> str:
    name, description = (*entry["process_group"], "")[:2]
    operation = entry["profiling_name"].rpartition(":")[2]
    sizes = "+".join(str(size) for size in entry["input_sizes"][:2])
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    return f"{operation} of {sizes} in group {description or name} (its number {number})"
