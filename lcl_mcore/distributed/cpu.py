"""The CPU platform: what lets megatron-core run, and its companions be imported, where there is no GPU.

The only module that replaces functions of torch or megatron-core. Nothing happens on import: `pick_device` calls
`install` once it has chosen the CPU. What is replaced, and why:

torch.compile, while `megatron.core` is imported
    Its decorators load torch's compiler, three seconds of processor time in every process, for functions that a CPU
    run never calls. They are compiled at their first call instead.
torch.cuda.current_device, streams, events, random state, synchronize, set_device, empty_cache
    megatron-core asks for them without looking whether there is a GPU. On a CPU all work has already happened.
torch.empty, zeros, tensor, ..., Tensor.to, Tensor.cuda, Module.cuda
    megatron-core writes out `device="cuda"`; here that means the CPU.
Tensor.type() without arguments, torch.cuda.FloatTensor and its siblings
    The distributed optimizer compares the names of CUDA types, and gradient clipping constructs such tensors.
megatron.core.tensor_parallel.random._get_cuda_rng_state and its setter
    They reach into torch.cuda's C++ generators.
glibc's allocator, which is told to keep what is freed (`keep_freed_memory`)
    It returns large blocks to the system at each `free` and gets them back page by page, a fifth of a step's time.
torchvision's operators, declared by name (`make_torchvision_importable`)
    PyPI's torchvision is built for CUDA. Beside a CPU build of torch its library does not load and its import fails,
    although timm, open_clip and transformers want only its image transforms.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # <malloc.h>
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
    with _compiling_at_first_call():
        import megatron.core.tensor_parallel.random as megatron_random

    keep_freed_memory()
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


def keep_freed_memory() -> None:
    """Have glibc serve large blocks from its heap and keep 2 GB of what is freed; another C library is left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 16 << 20)):
            mallopt(option, value)


def compile_at_first_call(compile: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` as a decorator that does its work when the function is first called."""

    def decorate(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda function: decorate(function, **options)
        if not isinstance(function, types.FunctionType):
            return compile(function, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile(function, **options))
            return compiled[0](*args, **kwargs)

        return call

    return decorate


@contextlib.contextmanager
def _compiling_at_first_call() -> Iterator[None]:
    compile = torch.compile
    torch.compile = compile_at_first_call(compile)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile


@functools.cache
def make_torchvision_importable() -> torch.library.Library | None:
    """Call before importing timm, open_clip or transformers; does nothing where torchvision is whole or absent.

    Returns:
        What holds the declarations alive, None if there is nothing to declare.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    rules = folder / "_meta_registrations.py"
    text = rules.read_text("utf-8") if rules.is_file() else ""
    names = re.findall(r'register_fake\("torchvision::(\w+)"\)', text)
    if not names or _compiled_part_loads(folder):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in names:
        library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return library


def _compiled_part_loads(folder: Path) -> bool:
    """Whether torchvision's operators come from its own library, as they should."""
    for path in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
        return True
    return False
