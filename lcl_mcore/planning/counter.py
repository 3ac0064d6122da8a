"""Counts what one training step of one rank does: FLOPs, bytes of live tensors, collectives, in order.

`StepCounter` looks at operators below autograd, so it sees backward, recompute and every collective. It works alike on
real tensors (CPU, CUDA) and on the "meta" device, whose tensors have no values; there it answers what would need them:
collectives return at once, and numbers read by the host are 1.
"""

from __future__ import annotations

import functools
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

_ATEN = torch.ops.aten
# Matmuls -> places of the two factors among the arguments.
_MATMULS = {
    _ATEN.mm: (0, 1),
    _ATEN.bmm: (0, 1),
    _ATEN.addmm: (1, 2),
    _ATEN.addmm_: (1, 2),
    _ATEN.baddbmm: (1, 2),
    _ATEN.baddbmm_: (1, 2),
}
# Attention operators -> places of query and key among the arguments, and matmuls of the size of the scores: forward has
# two (scores, values), backward five, as it forms the scores again.
_ATTENTION: dict[str, tuple[int, int, int]] = {
    "aten::_scaled_dot_product_flash_attention": (0, 1, 2),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (0, 1, 2),
    "aten::_scaled_dot_product_efficient_attention": (0, 1, 2),
    "aten::_scaled_dot_product_flash_attention_backward": (1, 2, 5),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (1, 2, 5),
    "aten::_scaled_dot_product_efficient_attention_backward": (1, 2, 5),
    "torch_attn::_varlen_attn": (0, 1, 2),
    "torch_attn::_varlen_attn_backward": (1, 2, 5),
}
_NO_TRAFFIC = {
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::detach",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
    "aten::set_",
    "aten::lift_fresh",
    "aten::record_stream",
}
# Operators that read only those elements of their first argument that an index names, as many as the result has.
_READ_SOME = {"aten::gather", "aten::index_select", "aten::index", "aten::embedding"}
# Operators that change only those elements of their first argument that an index names -> place of the argument that
# has as many elements, and how often each is touched (added to: read and written).
_CHANGE_SOME = {
    "aten::scatter_": (2, 1),
    "aten::scatter_add_": (2, 2),
    "aten::index_copy_": (3, 1),
    "aten::index_add_": (3, 2),
}
_RESHAPE = {"aten::set_", "aten::resize_", "aten::resize_as_"}
_RUN = object()

TensorLayout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class CollectiveCall(NamedTuple):
    """One collective or transfer that this rank issued.

    Attributes:
        phase: part of the step, see `StepCounter.phase`.
        op: c10d operator.
        group: its description.
        ranks: members of the group, global numbers.
        bytes: of the larger side (gathered or unreduced).
        where: root, source, destination or tag.
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


class OperatorCall(NamedTuple):
    """One operator call as the speed of a device sees it; equal calls are counted, not listed.

    Attributes:
        phase: part of the step, see `StepCounter.phase`.
        kind: matmul, attention or other.
        dtype: of the factors of a matmul or an attention; of the first floating argument otherwise.
        flops: multiplications and additions of matmuls and attention, else 0.
        bytes: read and written.
    """

    phase: str
    kind: str
    dtype: str
    flops: int
    bytes: int


class Cost(NamedTuple):
    """What a call costs in whatever phase; attributes as in `OperatorCall`."""

    kind: str
    dtype: str
    flops: int
    bytes: int


class KnownCall(NamedTuple):
    """What is known of calls on tensors without values, by the layouts of their arguments.

    Attributes:
        results: their layouts, as torch worked them out; none: the operator has to run.
        cost: None where there is none.
    """

    results: tuple[TensorLayout, ...]
    cost: Cost | None


KnownCalls = dict[Any, KnownCall]


class _LiveStorage(NamedTuple):
    reference: weakref.ref[torch.UntypedStorage]
    bytes: int
    part: str


class _Dispatch:
    """Holds `StepCounter`'s method: one in a subclass of `TorchDispatchMode` itself would load torch's compiler."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})  # type: ignore[attr-defined]


class StepCounter(_Dispatch, TorchDispatchMode):
    """Counts while it is entered, and observes which part of the step runs (`lcl_mcore.train_step.StepObserver`).

    Attributes:
        live, peak: bytes of tensors on the device, now and at most.
        parts, peak_parts: the same by part: weights, gradients, optimizer, input, activations, loss, communication.
        phase_peaks: most live bytes in each phase.
        operators: operator calls.
        collectives: in the order they were issued.
    """

    def __init__(self, device: torch.device, *, rounding: int = 1, known_calls: KnownCalls | None = None) -> None:
        """Count tensors and operators of one device.

        Args:
            device: where the step runs; on "meta" nothing is computed or sent.
            rounding: tensors take a multiple of this many bytes.
            known_calls: what was found in earlier counts on "meta"; extended here.
        """
        super().__init__()
        self.device_type, self.rounding = device.type, rounding
        self.simulated = device.type == "meta"
        self.operators: Counter[OperatorCall] = Counter()
        self.collectives: list[CollectiveCall] = []
        self.live = self.peak = 0
        self.parts: Counter[str] = Counter()
        self.peak_parts: dict[str, int] = {}
        self.phase_peaks: Counter[str] = Counter()
        self._known_calls: KnownCalls = {} if known_calls is None else known_calls
        self._storages: dict[int, _LiveStorage] = {}
        self._host_values: dict[int, list[int]] = {}  # of small index tensors sent to the device
        self._part, self._phase = "activations", "other"

    # --- parts of the step ---

    def region(self, name: str) -> AbstractContextManager[None]:
        """A part of the step begins. Forward without gradients is the feature pass of GradCache."""
        if name == "contrastive_loss":
            return self._within("loss", "loss")
        if name == "optimizer":
            return self._within("optimizer", "optimizer")
        if name == "generation_loss":
            return self._within("loss", "forward")
        if name in ("parameter_gather", "gradient_sync", "pipeline_transfer"):  # known by their operators
            return nullcontext()
        return self._within(self._part, "forward" if torch.is_grad_enabled() else "feature pass")

    @contextmanager
    def _within(self, part: str, phase: str) -> Iterator[None]:
        """New tensors belong to `part`, operators to `phase`."""
        before = self._part, self._phase
        self._part, self._phase = part, phase
        try:
            yield
        finally:
            self._part, self._phase = before

    @property
    def phase(self) -> str:
        """feature pass, forward, loss, backward (with what it recomputes), optimizer, or other."""
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
            self._storages[key] = _LiveStorage(reference, size, part)
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

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operator: its results, counted."""
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        if func is _ATEN._local_scalar_dense.default and args[0].device.type == "meta":
            dtype = args[0].dtype
            return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        name, is_view, single = _facts(func)
        if is_view:
            return func(*args, **kwargs)
        key = _call_key(func, args, kwargs) if self.simulated else None
        known = self._known_calls.get(key)
        if known is not None and known.results:
            made = [
                torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in known.results
            ]
            for tensor in made:
                self._track(tensor, self._part)
            self._add(known.cost if name not in _ATTENTION else self._cost(name, func, args, kwargs, made))
            return made[0] if single else tuple(made)
        out = _RUN if key is None else self._without_values(name, func, args, kwargs)
        ran = out is _RUN
        if ran:
            out = func(*args, **kwargs)
        outputs = _tensors(out)
        sent = (
            func is _ATEN._to_copy.default
            and args[0].device.type != self.device_type
            and outputs[0].device.type == self.device_type
        )
        places = [self._track(t, "input" if sent else self._part) for t in outputs]
        if sent and args[0].dtype == torch.int32:
            self._host_values[places[0]] = args[0].tolist()
        if known is None:
            cost = self._cost(name, func, args, kwargs, outputs)
            repeatable = ran and not func._schema.is_mutable and _is_plain(out)
            if key is not None:
                self._known_calls[key] = KnownCall(tuple(map(_layout, outputs)) if repeatable else (), cost)
        else:
            cost = known.cost
        self._add(cost)
        return out

    def _add(self, cost: Cost | None) -> None:
        if cost is not None:
            self.operators[OperatorCall(self.phase, *cost)] += 1

    def _cost(self, name: str, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Cost | None:
        if name in _NO_TRAFFIC:
            return None
        inputs = _tensors((args, tuple(value for key, value in kwargs.items() if key != "out")))
        if not any(t.device.type == self.device_type for t in (*inputs, *outputs)):
            return None
        kind, factors, flops = "other", inputs, 0
        if func.overloadpacket in _MATMULS:
            left, right = _MATMULS[func.overloadpacket]
            kind, factors = "matmul", [args[left], args[right]]
            flops = 2 * factors[0].numel() * factors[1].shape[-1]
        elif name in _ATTENTION:
            query, key, matmuls = _ATTENTION[name]
            kind, factors = "attention", [args[query], args[key]]
            flops = matmuls * 2 * self._scores(func, args, kwargs, *factors) * factors[0].shape[-1]
        dtype = next((t.dtype for t in factors if t.is_floating_point()), torch.float32)
        return Cost(kind, str(dtype).removeprefix("torch."), flops, self._traffic(name, func, args, inputs, outputs))

    def _traffic(self, name: str, func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Bytes read and written on the device."""
        selected = 0
        if name in _READ_SOME:
            selected, inputs = _extent(outputs[0]), inputs[1:]
        elif name in _CHANGE_SOME:
            place, times = _CHANGE_SOME[name]
            selected = times * args[place].numel() * outputs[0].element_size()
            inputs, outputs = inputs[1:], []
        elif not name.startswith("aten::"):  # one pass over what it is given, makes and changes
            changed = zip(func._schema.arguments, args, strict=False)
            outputs = outputs + [t for argument, t in changed if argument.is_write and isinstance(t, Tensor)]
        return selected + sum(_extent(t) for t in (*inputs, *outputs) if t.device.type == self.device_type)

    def _scores(self, func: Any, args: Any, kwargs: Any, query: Tensor, key: Tensor) -> int:
        """(query, key) pairs of one attention call, over all heads."""
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        window = given.get("window_size")
        causal = bool(given.get("is_causal", False)) or (window is not None and list(window) == [-1, 0])
        if query.dim() == 3:  # [t, a, d]: segments end to end
            longest = int(given["max_q"])
            lengths = self._lengths(given["cu_seq_q"]) or [longest] * (query.shape[0] // longest)
            return query.shape[1] * sum(_pairs(n, n, causal) for n in lengths)
        batch, heads, queries, _ = query.shape  # [b, a, s, d]
        return batch * heads * _pairs(queries, key.shape[2], causal)

    def _lengths(self, cumulative: Tensor) -> list[int] | None:
        """Segment lengths behind a tensor of cumulative ones, if the host sent it."""
        ends = self._host_values.get(cumulative.untyped_storage()._cdata)
        return None if ends is None else [b - a for a, b in pairwise(ends)]

    def _without_values(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Results of an operator that torch could not run on tensors without values; `_RUN` for all others."""
        if name in ("aten::_fused_adamw_", "aten::_fused_adam_"):
            return None
        if name in ("aten::mm", "aten::addmm") and "dtype" in func._overloadname:  # CUDA's alone
            if "out" in kwargs:
                return kwargs["out"]
            return args[0].new_empty(args[0].shape[0], args[1].shape[1], dtype=args[2])
        if func._schema.is_mutable and func.namespace == "aten":
            in_place = name.endswith("_") and name not in _RESHAPE and isinstance(args[0], Tensor)
            return args[0] if in_place else kwargs["out"] if isinstance(kwargs.get("out"), Tensor) else _RUN
        return _RUN

    # --- collectives ---

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        op = func._schema.name.split("::")[1]
        group = next(g for g in map(_as_group, args) if g is not None)
        sides = [_size(side) for side in args[:2]]
        gathers = "gather" in op or "scatter" in op
        names = [argument.name for argument in func._schema.arguments]
        where = tuple(
            value for name, value in zip(names, args, strict=False) if name in ("root_rank", "dst", "src", "tag")
        )
        ranks = tuple(dist.get_process_group_ranks(group))
        size = max(sides) if gathers else sides[0]
        self.collectives.append(CollectiveCall(self.phase, op, group.group_desc, ranks, size, where))
        if gathers or op.startswith("recv"):
            self._relabel(_tensors(args[0]))
        if not self.simulated:
            return func(*args, **kwargs)
        work = FakeWork().boxed()
        results = [work if "Work" in str(r.type) else args[0] for r in func._schema.returns]
        return results[0] if len(results) == 1 else tuple(results)

    def _relabel(self, destinations: list[Tensor]) -> None:
        """Memory that exists to receive a collective's result is communication's, unless it is model state."""
        for tensor in destinations:
            key = tensor.untyped_storage()._cdata
            known = self._storages.get(key)
            if known is not None and known.part in ("activations", "loss"):
                self.parts[known.part] -= known.bytes
                self.parts["communication"] += known.bytes
                self._storages[key] = known._replace(part="communication")


@functools.cache
def _facts(func: Any) -> tuple[str, bool, bool]:
    """`aten::mm` for any overload of it, whether its results are views, and whether there is one."""
    return str(func.overloadpacket._qualified_op_name), func.is_view, len(func._schema.returns) == 1


def _pairs(queries: int, keys: int, causal: bool) -> int:
    return queries * (queries + 1) // 2 if causal else queries * keys


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _layout(tensor: Tensor) -> TensorLayout:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _empty(layout: TensorLayout) -> Tensor:
    size, stride, dtype = layout
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _is_plain(out: Any) -> bool:
    """One tensor or a tuple of tensors, all without values."""
    values = out if isinstance(out, tuple) else (out,)
    return all(isinstance(v, Tensor) and v.device.type == "meta" for v in values)


def _call_key(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the shapes of a call's results depend on; None where data of the host may matter."""
    parts: list[Any] = [func]
    for value in (*args, *kwargs.keys(), *kwargs.values()):
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Tensor):
                if not item.is_meta:
                    return None
                parts += (item.shape, item.stride(), item.dtype)
            else:
                parts += (type(item), item) if isinstance(item, int | float | str | type(None)) else (str(item),)
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
