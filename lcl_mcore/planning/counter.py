"""Counts what one training step of one rank does: FLOPs, bytes of live tensors, collectives, in order.

`StepCounter` looks at operators below autograd, so it sees backward, recompute and every collective. It works
alike on real tensors (CPU, CUDA) and on tensors without data (the "meta" device), where it answers what would
need data: collectives return at once, and numbers read by the host are 1.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode

from lcl_mcore.planning.operators import flops_of, is_free, kind_of

_RUN = object()
_RESULTS: dict[Any, list[Any]] = {}
"""Layouts of an operator's results by call, for tensors without data: what torch answers, remembered."""


class Event(NamedTuple):
    """One collective or transfer that this rank issued.

    phase    part of the step, see `StepCounter.phase`
    op       c10d operator;  group  its description;  ranks  members of the group, global numbers
    bytes    of the larger side (gathered or unreduced);  where  root, source, destination or tag
    """

    phase: str
    op: str
    group: str
    ranks: tuple[int, ...]
    bytes: int
    where: tuple[int, ...]

    @property
    def signature(self) -> tuple[Any, ...]:
        """What all members of the group must agree on."""
        return (self.op, self.bytes, self.where)


class Work(NamedTuple):
    """One operator call as the speed of a device sees it; equal calls are counted, not listed."""

    phase: str
    kind: str
    dtype: str
    flops: int
    bytes: int


class _Live(NamedTuple):
    reference: weakref.ref[torch.UntypedStorage]
    bytes: int
    part: str


class StepCounter(TorchDispatchMode):
    """Counts while it is entered. `simulated` says that tensors on `device` have no data.

    live, peak          bytes of tensors on the device, now and at most
    parts, peak_parts   the same by part: weights, gradients, optimizer, input, activations, loss, communication
    work                operator calls;  events  collectives in the order they were issued
    """

    def __init__(self, device: torch.device, *, simulated: bool, rounding: int = 1) -> None:
        super().__init__()
        self.device_type, self.simulated, self.rounding = device.type, simulated, rounding
        self.work: Counter[Work] = Counter()
        self.events: list[Event] = []
        self.live = self.peak = 0
        self.parts: Counter[str] = Counter()
        self.peak_parts: dict[str, int] = {}
        self.phase_peaks: Counter[str] = Counter()
        self._storages: dict[int, _Live] = {}
        self._host_values: dict[int, list[int]] = {}  # of small index tensors sent to the device
        self._part, self._phase = "activations", "other"

    # --- where we are ---

    @contextmanager
    def within(self, *, part: str | None = None, phase: str | None = None) -> Iterator[None]:
        """New tensors belong to `part`, work to `phase`, unless backward is running."""
        before = self._part, self._phase
        self._part, self._phase = part or self._part, phase or self._phase
        try:
            yield
        finally:
            self._part, self._phase = before

    def region(self, name: str) -> AbstractContextManager[None]:
        """A part of the step begins (see `lcl_mcore.train_step.StepObserver`)."""
        if name == "contrastive_loss":
            return self.within(part="loss", phase="loss")
        if name == "optimizer":
            return self.within(part="optimizer", phase="optimizer")
        if name == "generation_loss":
            return self.within(part="loss", phase="forward")
        if name in ("parameter_gather", "gradient_sync", "pipeline_transfer"):
            return nullcontext()
        return self.within(phase="forward" if torch.is_grad_enabled() else "first pass")

    @property
    def phase(self) -> str:
        """first pass, forward, loss, backward (with what it recomputes), optimizer, or other."""
        return "backward" if torch._C._current_graph_task_id() != -1 else self._phase

    # --- memory ---

    def own(self, part: str, *tensors: Tensor) -> None:
        """Count these tensors, made before, as live from now on; storages already known keep their part."""
        for tensor in tensors:
            self._track(tensor, part)

    def _track(self, tensor: Tensor, part: str) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages and tensor.device.type == self.device_type:
            size = -(-storage.nbytes() // self.rounding) * self.rounding
            reference = weakref.ref(storage, partial(self._freed, key))
            self._storages[key] = _Live(reference, size, part)
            self.live += size
            self.parts[part] += size
            phase = self.phase
            self.phase_peaks[phase] = max(self.phase_peaks[phase], self.live)
            if self.live > self.peak:
                self.peak, self.peak_parts = self.live, dict(self.parts)
        return key

    def _freed(self, key: int, _: object) -> None:
        gone = self._storages.pop(key)
        self._host_values.pop(key, None)
        self.live -= gone.bytes
        self.parts[gone.part] -= gone.bytes

    # --- operators ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            dtype = args[0].dtype
            return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        out = self._stand_in(func, args, kwargs) if self.simulated else _RUN
        if out is _RUN:
            out = func(*args, **kwargs)
        outputs = _tensors(out)
        part = self._part
        if (
            func is torch.ops.aten._to_copy.default
            and outputs
            and args[0].device.type != outputs[0].device.type
        ):
            part = "input"
        keys = [self._track(t, part) for t in outputs]
        if part == "input" and args[0].dtype == torch.int32 and args[0].device.type == "cpu":
            self._host_values[keys[0]] = args[0].tolist()
        self._count(func, args, kwargs, out, outputs)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, outputs: list[Tensor]) -> None:
        if is_free(func):
            return
        inputs = _tensors((args, tuple(kwargs.values())))
        touched = [t for t in (*inputs, *outputs) if t.device.type == self.device_type]
        if not touched:
            return
        flops = flops_of(func, args, kwargs, out, self._lengths)
        moved = sum(_extent(t) for t in touched)
        floating = next((t.dtype for t in inputs if t.is_floating_point()), torch.float32)
        dtype = str(floating).removeprefix("torch.")
        self.work[Work(self.phase, kind_of(func), dtype, flops, moved)] += 1

    def _lengths(self, cumulative: Tensor) -> list[int] | None:
        """Segment lengths behind a tensor of cumulative ones, if the host sent it."""
        ends = self._host_values.get(cumulative.untyped_storage()._cdata)
        return None if ends is None else [b - a for a, b in pairwise(ends)]

    def _stand_in(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Results of an operator on tensors without data; `_RUN` for one that has to run.

        Shapes of results are looked up by shapes of arguments: torch works them out in Python, which for
        small operators takes longer than all the rest.
        """
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::_fused_adamw_", "aten::_fused_adam_"):
            return None
        key = _call_key(func, args, kwargs)
        if key is None:
            return _RUN
        if name in ("aten::mm", "aten::addmm") and "dtype" in func._overloadname:  # CUDA's alone
            return (
                kwargs["out"]
                if "out" in kwargs
                else args[0].new_empty(args[0].shape[0], args[1].shape[1], dtype=args[2])
            )
        if func._schema.is_mutable:
            in_place = name.endswith("_") and name not in _RESHAPE and isinstance(args[0], Tensor)
            return args[0] if in_place else kwargs["out"] if isinstance(kwargs.get("out"), Tensor) else _RUN
        known = _RESULTS.get(key)
        if known is None:
            out = func(*args, **kwargs)
            _RESULTS[key] = [_layout(t) for t in _tensors(out)] if _is_plain(out) else []
            return out
        if not known:
            return _RUN
        made = [
            torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in known
        ]
        return made[0] if len(func._schema.returns) == 1 else tuple(made)

    # --- collectives ---

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        op = func._schema.name.split("::")[1]
        group = next(g for g in map(_as_group, args) if g is not None)
        sides = [_size(side) for side in args[:2]]
        gathers = "gather" in op or "scatter" in op
        names = [argument.name for argument in func._schema.arguments]
        where = tuple(
            value
            for name, value in zip(names, args, strict=False)
            if name in ("root_rank", "dst", "src", "tag")
        )
        ranks = tuple(dist.get_process_group_ranks(group))
        size = max(sides) if gathers else sides[0]
        self.events.append(Event(self.phase, op, group.group_desc, ranks, size, where))
        if gathers or op.startswith("recv"):
            self._relabel(_tensors(args[0]))
        if not self.simulated:
            return func(*args, **kwargs)
        work = FakeWork().boxed()
        results = [work if "Work" in str(r.type) else args[0] for r in func._schema.returns]
        return results[0] if len(results) == 1 else tuple(results)

    def _relabel(self, destinations: list[Tensor]) -> None:
        """Memory that exists to receive a collective's result is communication's, unless it is lasting state."""
        for tensor in destinations:
            key = tensor.untyped_storage()._cdata
            known = self._storages.get(key)
            if known is not None and known.part in ("activations", "loss"):
                self.parts[known.part] -= known.bytes
                self.parts["communication"] += known.bytes
                self._storages[key] = known._replace(part="communication")


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


_RESHAPE = {"aten::set_", "aten::resize_", "aten::resize_as_"}


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _is_plain(out: Any) -> bool:
    """One tensor or a tuple of tensors, all without data."""
    values = out if isinstance(out, tuple) else (out,)
    return all(isinstance(v, Tensor) and v.device.type == "meta" for v in values)


def _call_key(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """What the shapes of a call's results depend on; None where data of the host may matter, and for views."""
    if func.is_view or func.namespace not in ("aten", "torch_attn"):
        return None
    parts: list[Any] = [func]
    for value in (*args, *kwargs.items()):
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
            parts.append(value[0])
            value = value[1]
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Tensor):
                if item.device.type != "meta":
                    return None
                parts.append(_layout(item))
            else:
                parts.append(
                    (type(item), item) if isinstance(item, int | float | str | type(None)) else str(item)
                )
    return tuple(parts)


def _as_group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
        return dist.ProcessGroup.unbox(value)
    return None


def _size(side: Any) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(side))


def _extent(tensor: Tensor) -> int:
    """Bytes that reading the tensor once moves; an expanded dimension is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()
