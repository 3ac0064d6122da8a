"""Lets megatron-core run where there is no GPU.

megatron-core asks CUDA for its device, its random state and its streams, and names "cuda" in a few
tensor factories. `install` answers those calls for the CPU. It is called by
`platform.device.pick_device` alone, never on import, and refuses to act once a CUDA device is in use.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "as_tensor",
    "linspace",
)
_CUDA_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _Stream:
    """Stands for a stream or an event: on a CPU everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = wait = record = synchronize = _nothing

    def record_event(self, *args: Any) -> _Stream:
        return self

    def query(self) -> bool:
        return True


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _redirect_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return call


def _redirect_to(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_CPU if _is_cuda(arg) else arg for arg in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return function(self, *args, **kwargs)

    return call


def _type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()` without arguments names the CUDA type: the distributed optimizer compares it."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.dtype not in _CUDA_NAMES:
            return original(self, *args, **kwargs)
        return _CUDA_NAMES[self.dtype]

    return type_


@contextlib.contextmanager
def answering(device: torch.device) -> Iterator[None]:
    """Answer with another device than the CPU for a while: the planner's tensors have no data."""
    global _CPU
    before, _CPU = _CPU, device
    try:
        yield
    finally:
        _CPU = before


def installed() -> bool:
    """Whether the stand-ins are in place."""
    return getattr(torch.cuda.current_device, "lcl_stand_in", False)


def install() -> None:
    """Answer megatron-core's CUDA calls on the CPU. Idempotent.

    Raises:
        RuntimeError: CUDA is already initialised in this process.
    """
    if installed():
        return
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        raise RuntimeError("the CPU stand-ins cannot be installed after CUDA was used in this process")
    # Imported first: torch.compile, which megatron-core triggers, must see the genuine functions.
    import megatron.core.tensor_parallel.random as megatron_random

    cuda: Any = torch.cuda

    def current_device() -> torch.device:
        return _CPU

    current_device.lcl_stand_in = True  # type: ignore[attr-defined]
    cuda.current_device = current_device
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.is_initialized = lambda: True
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.Event = cuda.Stream = _Stream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    for name in ("FloatTensor", "IntTensor", "LongTensor", "HalfTensor", "BFloat16Tensor", "BoolTensor"):
        dtype = {
            "FloatTensor": torch.float32,
            "IntTensor": torch.int32,
            "LongTensor": torch.int64,
            "HalfTensor": torch.float16,
            "BFloat16Tensor": torch.bfloat16,
            "BoolTensor": torch.bool,
        }[name]
        setattr(cuda, name, functools.partial(torch.tensor, dtype=dtype))
    for name in _FACTORIES:
        setattr(torch, name, _redirect_device(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.to = _redirect_to(tensor.to)
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.type = _type_name(tensor.type)
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self

    patched: Any = megatron_random
    patched._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    patched._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
