"""What a checkpoint holds: fp32 weights, moments, in the names and shapes of the whole model.

Every rank holds, of each parameter it shares in, one contiguous range of its tensor-parallel block: its part
under megatron's distributed optimizer. Such a range is at most a few boxes of the whole tensor, so each rank
writes and reads its own part, no rank needs all parameters, and nothing is gathered for a save.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lcl_mcore.models.lcl import LclModel
from lcl_mcore.optimizer import Optimizer

WEIGHTS, FIRST_MOMENT, SECOND_MOMENT = "weights/", "exp_avg/", "exp_avg_sq/"
# Endings of parameter names as older files have them, and as the model has them now.
RENAMED = {
    ".self_attn_bda.gain": ".self_attn_bda.gamma",  # layer scale of the residual branches
    ".mlp_bda.gain": ".mlp_bda.gamma",
}


def current_name(name: str) -> str:
    """Today's name of a parameter, or key of a checkpoint, that a file may hold under an older one."""
    for old, new in RENAMED.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


@dataclass(frozen=True)
class TensorBox:
    """A box of a whole tensor.

    key     kind and full name, for example `weights/vision.class_token`
    shape   of the whole tensor, without tensor or pipeline parallelism
    offset  of the box in it
    tensor  the box's values; contiguous
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class Shard:
    """A range of one rank's block of a tensor.

    block   shape of the block that this rank's tensor-parallel share is
    origin  where the block lies in the whole tensor of shape `shape`
    start   first element of the range in the block, counted row by row
    flat    [n] the values, on the device
    mine    whether this rank writes it; otherwise another rank holds the same values
    """

    key: str
    shape: tuple[int, ...]
    block: tuple[int, ...]
    origin: tuple[int, ...]
    start: int
    flat: Tensor
    mine: bool

    def boxes(self, flat: Tensor) -> Iterator[TensorBox]:
        """The range as boxes whose values are views of `flat` [n]."""
        done = 0
        for offset, size in boxes(self.block, self.start, self.start + flat.numel()):
            count = math.prod(size)
            place = tuple(a + b for a, b in zip(self.origin, offset, strict=True))
            yield TensorBox(self.key, self.shape, place, flat[done : done + count].view(size))
            done += count


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, size) of boxes that make up elements [start, stop) of a row-major tensor, in that order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if first * row > start:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, size in boxes(shape[1:], start, stop):
        yield (row, *offset), (1, *size)


def _shard(kind: str, name: str, parameter: nn.Parameter, start: int, flat: Tensor, tp: tuple[int, int]) -> Shard:
    rank, size = tp
    block = tuple(parameter.shape)
    shape, origin = list(block), [0] * len(block)
    split = bool(getattr(parameter, "tensor_model_parallel", False)) and size > 1
    if split:
        axis = parameter.partition_dim  # type: ignore[attr-defined]
        shape[axis] *= size
        origin[axis] = rank * block[axis]
    # Of what the tensor-parallel ranks hold alike the first writes; a tied matrix's copy on the last
    # pipeline stage is written by the first stage (megatron marks the copy `shared`).
    mine = (split or rank == 0) and not getattr(parameter, "shared", False)
    return Shard(kind + name, tuple(shape), block, tuple(origin), start, flat, mine)


def training_shards(model: LclModel, optimizer: Optimizer, tp: tuple[int, int]) -> list[Shard]:
    """Master weights and moments that this rank updates; `tp` is its tensor-parallel (rank, size)."""
    names = {parameter: model.canonical_name(local) for local, parameter in model.named_parameters()}
    result = []
    for parameter, start, tensors in optimizer.owned():
        for kind, value in zip((WEIGHTS, FIRST_MOMENT, SECOND_MOMENT), tensors, strict=True):
            result.append(_shard(kind, names[parameter], parameter, start, value.detach().view(-1), tp))
    return result


class Snapshot:
    """Host copies of the shards that this rank writes, in memory that is used again for each save."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = [shard for shard in shards if shard.mine]
        self.on_cuda = any(shard.flat.is_cuda for shard in self.shards)
        # Filled at once, so that no save waits for the system to hand out the pages.
        self.host = [
            torch.empty(s.flat.numel(), dtype=s.flat.dtype, pin_memory=self.on_cuda).fill_(0) for s in self.shards
        ]
        self.copied: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        return sum(host.nbytes for host in self.host)

    def take(self) -> None:
        """Copy the present values.

        On CUDA the copies queue behind the step's kernels on the same stream: the host goes on at once, and
        the next step cannot overtake them.
        """
        for shard, host in zip(self.shards, self.host, strict=True):
            host.copy_(shard.flat, non_blocking=True)
        if self.on_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def boxes(self) -> list[TensorBox]:
        """The copies as boxes; waits until they have arrived."""
        if self.copied is not None:
            self.copied.synchronize()
        pairs = zip(self.shards, self.host, strict=True)
        return [box for shard, host in pairs for box in shard.boxes(host)]
