"""Collectives of the distributed loss: asynchronous ragged gathers and fixed-order merges of partial sums.

Every function works on an explicit process group; None means a group of one and touches no communicator
(never the default group). All ranks of a group must call the same functions in the same order, empty ranks
included.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from lcl_kernels.schedule import PairShards
from torch import Tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


class RaggedGather:
    """An all-gather of rows in flight: started at construction, completed by :meth:`wait`.

    Slices are padded to the layout's capacity, because an all-gather of uneven pieces is a different
    (slower, and on some back ends missing) operation; the padding is dropped on arrival.
    """

    def __init__(self, rows: Tensor, layout: PairShards, group: dist.ProcessGroup | None) -> None:
        """Send ``rows`` ``[lengths[rank], ...]`` to all ranks of ``group``."""
        self._layout = layout
        self._work: dist.Work | None = None
        if group is None:
            self._out = rows
            return
        capacity = layout.capacity
        self._send = rows.contiguous()
        if rows.shape[0] != capacity:
            self._send = rows.new_zeros((capacity, *rows.shape[1:]))
            self._send[: rows.shape[0]] = rows
        self._out = rows.new_empty((len(layout.counts) * capacity, *rows.shape[1:]))
        self._work = dist.all_gather_into_tensor(self._out, self._send, group=group, async_op=True)

    def wait(self) -> Tensor:
        """``[columns, ...]`` rows of all ranks in rank order. On CUDA the stream waits, not the host."""
        if self._work is None:
            return self._out
        self._work.wait()
        index = self._layout.padded_index(self._out)
        return self._out if index is None else self._out.index_select(0, index)


def reduce_to_owners(rows: Tensor, layout: PairShards, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``rows`` ``[columns, D]`` over ranks and return this rank's own slice ``[lengths[rank], D]``."""
    if group is None:
        return rows
    index = layout.padded_index(rows)
    ranks, capacity = len(layout.counts), layout.capacity
    if index is not None:
        rows = rows.new_zeros((ranks * capacity, *rows.shape[1:])).index_copy_(0, index, rows)
    mine = rows.new_empty((capacity, *rows.shape[1:]))
    dist.reduce_scatter_tensor(mine, rows.contiguous(), group=group)
    return mine[: layout.lengths[layout.rank]]


def sum_over(tensors: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sum several tensors of one dtype over the group in one collective."""
    if group is None:
        return tensors
    packed = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(packed, group=group)
    parts = packed.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def merge_lse(partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log-sum-exp over the ranks of a small group: one gather, then the same ordered sum on every rank."""
    if group is None:
        return partial
    parts = partial.new_empty((group_size(group), *partial.shape))
    dist.all_gather_into_tensor(parts.view(-1), partial.contiguous().view(-1), group=group)
    return parts.logsumexp(0)


def merge_lse_reduced(partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log-sum-exp over the ranks of a large group, with memory independent of its size (max, then sum)."""
    if group is None:
        return partial
    peak = partial.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    peak = torch.where(torch.isinf(peak), 0.0, peak)
    total = torch.exp(partial - peak)
    dist.all_reduce(total, group=group)
    return total.log_().add_(peak)
