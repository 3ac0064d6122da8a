"""CUDA or CPU: the one module that knows the difference."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
from torch import Tensor

from lcl_mcore.distributed.rendezvous import MEETING_SECONDS, join_store
from lcl_mcore.errors import ConfigError, explain


@dataclass(frozen=True)
class HostCopy:
    """A copy on its way to the host; `wait` before reading it."""

    tensor: Tensor
    arrived: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """The copy, once it has arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class SideStream:
    """A stream of its own for device work beside training, which would otherwise queue behind training's kernels.

    On a CPU there is none, and everything here does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def handle(self) -> int | None:
        """The `cudaStream_t`, for other libraries."""
        return None if self._stream is None else int(self._stream.cuda_stream)

    def current(self) -> AbstractContextManager[Any]:
        """Within it, the calling thread's work goes to this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        """An event behind all that was launched here so far."""
        return None if self._stream is None else self._stream.record_event()


def take_over(tensors: Iterable[Tensor], made: torch.cuda.Event | None) -> None:
    """Let the current stream use tensors of a `SideStream`: it waits for the mark behind them, the host does not."""
    if made is None:
        return
    stream = torch.cuda.current_stream()
    stream.wait_event(made)
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(stream)  # or the allocator would give its memory away while it is read


@dataclass(frozen=True)
class Device:
    """Where this process computes.

    Attributes:
        kind: "cuda" or "cpu".
        device: the torch device of this process (local rank on CUDA).
        backend: the process-group backend that serves it ("nccl" or "gloo").
        name: the hardware's name, for logs and reports.
    """

    kind: str
    device: torch.device
    backend: str
    name: str

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def memory(self) -> tuple[int, str]:
        """Bytes for this rank, and whose they are: the GPU's, or its part of the machine's."""
        if self.is_cuda:
            return torch.cuda.get_device_properties(self.device).total_memory, "the GPU's memory"
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return psutil.virtual_memory().total // ranks, f"this machine's memory, shared by {ranks} ranks"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def copy_to_host(self, tensor: Tensor, out: Tensor | None = None) -> HostCopy:
        """Start copying a tensor of this device to the host; on CUDA queued behind what was launched before.

        Args:
            out: host memory of the same shape, pinned on CUDA; None allocates it.
        """
        if not self.is_cuda:
            return HostCopy(tensor if out is None else out.copy_(tensor))
        if out is None:
            out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        out.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return HostCopy(out, event)

    def peak_memory(self) -> int:
        """Peak bytes: of the allocator on CUDA, resident set of the process on CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_name() -> str:
    """Marketing name of the CPU, as Linux reports it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "CPU"


def pick_device(requested: str = "auto") -> Device:
    """Choose CUDA when present unless `requested` ("auto", "cuda", "cpu") says otherwise.

    On CPU, megatron-core's CUDA expectations are met by `distributed.cpu`, installed here and only here.

    Raises:
        ConfigError: "cuda" was requested and no CUDA device is visible.
    """
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise ConfigError(explain("device = cuda", "no CUDA device is visible to torch", "Use --device cpu or auto."))
    if requested == "cpu" or not available:
        from lcl_mcore.distributed import cpu

        cpu.install()
        return Device("cpu", torch.device("cpu"), "gloo", cpu_name())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32; bf16 is the fast path
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for each shape, and the image count varies
    return Device("cuda", device, "nccl", torch.cuda.get_device_name(device))


def init_process_group(device: Device, timeout_seconds: float) -> torch.distributed.Store:
    """Join the job that torchrun (or SLURM through torchrun) described; a single process if none did.

    gloo connects two ranks when they first talk: the groups on the host would otherwise hold a socket for every pair of
    ranks each, which are more than a process may open long before a job has a thousand.

    Returns:
        The store that this job's processes share; nothing of an earlier attempt is in it.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        store: torch.distributed.Store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
        rank, world = 0, 1
    else:
        store, rank, world = join_store(max(timeout_seconds, MEETING_SECONDS))
    torch.distributed.init_process_group(
        device.backend,
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device.device if device.is_cuda else None,
    )
    return store
