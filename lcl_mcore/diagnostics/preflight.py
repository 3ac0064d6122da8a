"""Checks of a job before it trains, over all its processes: links, equal software, clocks, storage.

Every process calls `run_preflight`; each process gets the whole result, so all agree whether to go on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcl_mcore.diagnostics import environment

PACKAGES = ("numpy", "transformer-engine", "flash-attn", "triton")
CLOCK_WARNING_SECONDS = 1.0
FILE_MEGABYTES = 64.0
LEFT_OVER = ".preflight-"


@dataclass(frozen=True)
class RankResult:
    """What one rank saw of the trial all-reduce.

    Attributes:
        rank: its number.
        host: SLURM's name of its node, else the host's.
        total: sum of rank + 1 over all ranks.
        small_ms: median milliseconds for one number.
        large_ms: median milliseconds for the large buffer.
        bus_gb_per_s: bytes x 2 (n - 1) / n / time of the large buffer: what the slowest link carried.
    """

    rank: int
    host: str
    total: float
    small_ms: float
    large_ms: float
    bus_gb_per_s: float = 0.0


@dataclass(frozen=True)
class StorageResult:
    """One node's trial of the run folder; rates in 1e6 bytes per second, `problem` empty if all went well."""

    node: str
    write_mb_per_s: float
    read_mb_per_s: float
    rename_ms: float
    free_gb: float
    problem: str = ""


@dataclass
class Preflight:
    """The result, the same on every rank.

    Attributes:
        ranks: of the trial all-reduce.
        megabytes: of its large buffer, 1e6 bytes.
        clock_seconds: largest difference between a node's clock and rank 0's.
        storage: the run folder, by node.
        errors: what must be mended before the job can train.
        warnings: what should be.
    """

    ranks: list[RankResult] = field(default_factory=list)
    megabytes: float = 0.0
    clock_seconds: float = 0.0
    storage: list[StorageResult] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def node_name() -> str:
    """SLURM's name of this node, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def run_preflight(
    folder: Path | None, megabytes: float | None, min_bandwidth: float, timeout_seconds: float = 120.0
) -> Preflight:
    """Check the processes that torchrun started. Collective; leaves the process group initialised.

    Args:
        folder: run folder to try from every node, if any.
        megabytes: size of the all-reduce in 1e6 bytes [16 on CPU, 512 on GPUs]; the trial file has at most 64.
        min_bandwidth: smallest acceptable bus bandwidth in 1e9 bytes per second; 0 accepts any.
        timeout_seconds: of every collective.

    Raises:
        RuntimeError: the processes cannot talk to each other.
    """
    import torch.distributed as dist

    from lcl_mcore.distributed.device import init_process_group, pick_device

    device = pick_device()
    init_process_group(device, timeout_seconds)
    group = dist.new_group(list(range(dist.get_world_size())), group_desc="preflight")

    def gather(value: Any) -> list[Any]:
        """Every rank's `value`."""
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, value, group=group)
        return everyone

    result = Preflight(megabytes=megabytes or (512.0 if device.is_cuda else 16.0))
    nodes = gather(node_name())
    result.errors += compare_facts(nodes, gather(software_facts()))
    _measure_links(result, group, device, gather, min_bandwidth)
    _compare_clocks(result, nodes, gather)
    if folder is not None:
        _try_storage(result, folder, nodes, group.rank(), gather)
    return result


def software_facts() -> dict[str, str]:
    """What must be the same on every node, by name."""
    gpus = environment.gpus()
    found = environment.versions() | {name: environment.package_version(name) for name in PACKAGES}
    found |= {"gpu": gpus[0]["name"] if gpus else None, "gpus": len(gpus)}
    facts = {name: str(value or "none") for name, value in found.items()}
    facts["lcl_mcore"] = _source_digest()
    for name in ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS"):
        facts[name] = os.environ.get(name, "unset")
    facts["NCCL_*"] = " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("NCCL_"))
    return facts


def _source_digest() -> str:
    """Digest of the package's own source files as this process sees them."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def compare_facts(nodes: list[str], facts: list[dict[str, str]]) -> list[str]:
    """One line for every fact that is not the same everywhere, naming the nodes that differ from most.

    Args:
        nodes: name of every rank's node.
        facts: `software_facts` of every rank.
    """
    lines = []
    for name in sorted({key for each in facts for key in each}):
        values = [each.get(name, "none") for each in facts]
        usual = statistics.mode(values)
        for value in sorted(set(values) - {usual}):
            odd = sorted({node for node, other in zip(nodes, values, strict=True) if other == value})
            lines.append(f"{name} is {value or 'empty'} on {_names(odd)}, {usual or 'empty'} elsewhere")
    return lines


def _names(nodes: list[str], most: int = 8) -> str:
    return ", ".join(nodes[:most]) + (f" and {len(nodes) - most} more" if len(nodes) > most else "")


def _measure_links(
    result: Preflight, group: Any, device: Any, gather: Callable[[Any], list[Any]], min_bandwidth: float
) -> None:
    import torch
    import torch.distributed as dist

    size = group.size()
    number = torch.tensor([group.rank() + 1.0], device=device.device)
    dist.all_reduce(number, group=group)
    small = _milliseconds(torch.zeros(1, device=device.device), group, device.synchronize)
    count = max(1, int(result.megabytes * 1e6) // 4)
    large = _milliseconds(torch.zeros(count, device=device.device), group, device.synchronize)
    bandwidth = 4e-6 * count * 2 * (size - 1) / size / large
    mine = [node_name(), number.item(), small, large, bandwidth]
    result.ranks = [RankResult(rank, *values) for rank, values in enumerate(gather(mine))]
    expected = size * (size + 1) / 2
    wrong = [r.rank for r in result.ranks if r.total != expected]
    if wrong:
        result.errors.append(f"all-reduce gave wrong sums on ranks {wrong}")
    slowest = min(r.bus_gb_per_s for r in result.ranks)
    if size > 1 and slowest < min_bandwidth:
        result.errors.append(
            f"all-reduce over {size} ranks reached {slowest:.2f} GB/s: at least {min_bandwidth:g} is required. "
            "Look for a slow link or a missing network plugin (NCCL_DEBUG=INFO), or lower --min-bandwidth."
        )


def _milliseconds(tensor: Any, group: Any, synchronize: Callable[[], None], repeats: int = 5) -> float:
    import torch.distributed as dist

    times = []
    for _ in range(repeats + 1):
        synchronize()
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def _compare_clocks(result: Preflight, nodes: list[str], gather: Callable[[Any], list[Any]]) -> None:
    """Compare clocks: a gather ends on all ranks within its own duration, and clocks read then differ by no more."""
    offsets = []
    for _ in range(3):
        started = time.perf_counter()
        gather(0)
        now, width = time.time(), time.perf_counter() - started
        readings = gather([now, width])
        offsets.append([max(0.0, abs(t - readings[0][0]) - max(w, readings[0][1])) for t, w in readings])
    smallest = [min(values) for values in zip(*offsets, strict=True)]
    result.clock_seconds = max(smallest)
    if result.clock_seconds > CLOCK_WARNING_SECONDS:
        odd = sorted({n for n, s in zip(nodes, smallest, strict=True) if s > CLOCK_WARNING_SECONDS})
        result.warnings.append(
            f"the clock of {_names(odd)} is {result.clock_seconds:.1f} s or more off rank 0's: logs and file times of "
            "the run will not agree. Synchronise the nodes (chrony, ntpd)."
        )


def _try_storage(
    result: Preflight, folder: Path, nodes: list[str], rank: int, gather: Callable[[Any], list[Any]]
) -> None:
    """Each node writes a file and reads its neighbour's: shows speed, and that all see one file system."""
    writers = [nodes.index(node) for node in dict.fromkeys(nodes)]  # the first rank of each node
    payload = hashlib.sha256(b"lcl_mcore").digest() * (int(min(result.megabytes, FILE_MEGABYTES) * 1e6) // 32)
    mine = folder / f"{LEFT_OVER}{rank}"
    report: dict[str, Any] = {}
    if rank in writers:
        report = _guard(lambda: _write(mine, payload))
    gather(0)  # everything is written
    if rank in writers and not report["problem"]:
        neighbour = writers[(writers.index(rank) + 1) % len(writers)]
        report |= _guard(lambda: _read(folder / f"{LEFT_OVER}{neighbour}", payload, nodes[neighbour]))
    everyone = gather(report)  # everything is read
    if rank in writers:
        for path in (mine, mine.with_name(mine.name + ".part")):
            path.unlink(missing_ok=True)
    for writer in writers:
        seen = {"write": 0.0, "read": 0.0, "rename": 0.0, "free": 0.0} | everyone[writer]
        one = StorageResult(nodes[writer], seen["write"], seen["read"], seen["rename"], seen["free"], seen["problem"])
        result.storage.append(one)
        if one.problem:
            result.errors.append(f"{folder} on {one.node}: {one.problem}")


def _guard(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`action`'s report, or the problem that it met."""
    try:
        return {"problem": ""} | action()
    except OSError as error:
        return {"problem": f"{error.strerror or error}. The run folder must be writable storage of all nodes."}


def _write(path: Path, payload: bytes) -> dict[str, Any]:
    """Write, fsync and rename, as a checkpoint is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    started = time.perf_counter()
    with open(part, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter()
    part.rename(path)
    renamed = time.perf_counter()
    return {
        "write": 1e-6 * len(payload) / (written - started),
        "rename": 1e3 * (renamed - written),
        "free": 1e-9 * shutil.disk_usage(path.parent).free,
    }


def _read(path: Path, payload: bytes, node: str) -> dict[str, Any]:
    """Read the neighbour's file; attribute caches of network storage get ten seconds."""
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if not path.exists():
        return {"problem": f"does not see the file that {node} wrote: the nodes do not share this folder."}
    started = time.perf_counter()
    content = path.read_bytes()
    seconds = time.perf_counter() - started
    if content != payload:
        return {"problem": f"reads other bytes than {node} wrote ({path.name})."}
    return {"read": 1e-6 * len(payload) / seconds}


def format_preflight(result: Preflight) -> list[str]:
    """Lines for people; of many ranks the slowest are shown."""
    lines = []
    if result.ranks:
        slowest = sorted(result.ranks, key=lambda r: r.bus_gb_per_s)
        shown = sorted(slowest[:8], key=lambda r: r.rank)
        title = f"all-reduce over {len(result.ranks)} processes"
        lines.append(title + (f", the {len(shown)} slowest" if len(shown) < len(slowest) else ""))
        lines += [
            f"  rank {r.rank:<4}{r.host:<20} sum {r.total:g}  1 number {r.small_ms:.3f} ms  "
            f"{result.megabytes:g} MB {r.large_ms:.2f} ms, {r.bus_gb_per_s:.2f} GB/s"
            for r in shown
        ]
        lines.append(f"  clocks within {result.clock_seconds:.3f} s; software is compared on every node")
    if result.storage:
        worst = sorted(result.storage, key=lambda s: s.write_mb_per_s)[:8]
        title = f"run folder from {len(result.storage)} nodes"
        lines.append(title + (f", the {len(worst)} slowest" if len(worst) < len(result.storage) else ""))
        lines += [
            f"  {s.node:<20} write+fsync {s.write_mb_per_s:.0f} MB/s  read of the next node's file "
            f"{s.read_mb_per_s:.0f} MB/s  rename {s.rename_ms:.1f} ms  free {s.free_gb:.0f} GB"
            for s in worst
        ]
    return lines
