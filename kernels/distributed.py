"""The contrastive loss over data-parallel ranks with its work split over tensor-parallel ranks.

Conventions
    * Negatives span ``dp_group`` and nothing else. The ranks of ``tp_group`` hold identical embeddings and
      split the columns. Both groups are passed in, used for nothing else, and None means "one rank".
    * ``counts`` is a host list with the number of pairs of every data-parallel rank, known when the batch was
      built; zeros are allowed. Nothing is read back from the device during a step.
    * The loss is the global loss, the same number on every rank.
    * Gradients are SUM convention: this rank's rows of dL/dimage and dL/dtext of the *global* loss, and this
      data-parallel rank's share of dL/dscale (equal on its TP ranks). Parameter gradients summed over
      data-parallel ranks equal those of one process with the whole batch. Frameworks that average over k
      ranks instead pass ``reduce_size=k``.
    * Forward forms the gradients and makes all exchanges; backward multiplies by the incoming gradient and
      makes none, so it cannot deadlock against other collectives. Do not recompute (checkpoint) the loss.
    * For a fixed mesh the result is bitwise repeatable wherever the back end's all-reduce and
    reduce-scatter are.

Weight modes and the two schedules are described in ``lcl_kernels.schedule``, the mathematics in
``lcl_kernels._pair_terms``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lcl_kernels._gathers import (
    RaggedGather,
    group_rank,
    group_size,
    merge_lse,
    merge_lse_reduced,
    reduce_to_owners,
    sum_over,
)
from lcl_kernels._pair_terms import (
    KEPT_BYTES,
    Engine,
    Impl,
    Precision,
    add_positive,
    as_scale,
    check_choice,
    check_embeddings,
    dense_keys,
    operand,
    pair_terms,
    row_dot,
    scaled_gradients,
    total_dot,
    unmasked_keys,
    work_dtype,
)
from lcl_kernels.infonce import select_engine
from lcl_kernels.schedule import CommunicationRates, PairShards, Schedule, Weighting, choose_schedule, pair_weights
from lcl_kernels.tiled import TiledBlock
from torch import Tensor
from torch.autograd.function import once_differentiable


class DistributedInfoNCE:
    """The loss of one mesh; holds settings and groups, no tensors.

    Args:
        dp_group: ranks whose pairs are each other's negatives (same tensor-parallel index).
        tp_group: ranks that hold the same pairs and share the work.
        weighting: "image", every pair counts the same; "rank", every non-empty rank counts the same.
        schedule: "auto" (:func:`lcl_kernels.schedule.choose_schedule`), "reduce_scatter" or "gather_both".
        precision: as in :func:`lcl_kernels.infonce`; "fp16" and "bf16" also halve the gathers.
        impl: "auto", "tiled" or "triton".
        reduce_size: factor on all gradients, see the module text.
        rates: rates for "auto".
    """

    def __init__(
        self,
        dp_group: dist.ProcessGroup | None,
        tp_group: dist.ProcessGroup | None = None,
        *,
        weighting: Weighting = "image",
        schedule: Schedule = "auto",
        precision: Precision = "fp32",
        impl: Impl = "auto",
        reduce_size: float = 1.0,
        rates: CommunicationRates | None = None,
    ) -> None:
        check_choice("weighting", weighting, Weighting)
        check_choice("schedule", schedule, Schedule)
        check_choice("precision", precision, Precision)
        check_choice("impl", impl, Impl)
        if impl == "reference":
            raise ValueError('impl="reference" is one process only; use "tiled"')
        # A group of one needs no communicator at all.
        self.dp_group = dp_group if group_size(dp_group) > 1 else None
        self.tp_group = tp_group if group_size(tp_group) > 1 else None
        self.weighting: Weighting = weighting
        self.schedule: Schedule = schedule
        self.precision: Precision = precision
        self.impl: Impl = impl
        self.reduce_size = float(reduce_size)
        self.rates = rates

    def begin(self, counts: Sequence[int], dim: int, *, group_ids: Tensor | None = None) -> PendingInfoNCE:
        """Open the loss of one step.

        Args:
            counts: pairs of every data-parallel rank, in group-rank order; equal on all ranks.
            dim: embedding width D.
            group_ids: ``[n]`` integers of this rank's pairs on the embeddings' device, or None on every rank;
                equal ids >= 0, on whichever ranks, are not negatives of each other.
        """
        return PendingInfoNCE(self, counts, dim, group_ids)

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor | float,
        counts: Sequence[int],
        *,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """The whole step at once, without overlap: :meth:`begin`, the two starts, ``finish``."""
        step = self.begin(counts, image.shape[-1], group_ids=group_ids)
        step.start_image(image)
        step.start_text(text)
        return step.finish(scale)


class PendingInfoNCE:
    """One step: start each gather as soon as its embeddings exist, do other work, then :meth:`finish`.

    All ranks must call ``start_image``, ``start_text`` and ``finish`` in the same order.
    """

    def __init__(self, owner: DistributedInfoNCE, counts: Sequence[int], dim: int, group_ids: Tensor | None) -> None:
        self.owner = owner
        ranks = group_size(owner.dp_group)
        if len(counts) != ranks:
            raise ValueError(f"counts has {len(counts)} entries: must be one per data-parallel rank, {ranks}")
        self.layout = PairShards(
            tuple(int(c) for c in counts),
            group_rank(owner.dp_group),
            group_size(owner.tp_group),
            group_rank(owner.tp_group),
        )
        if owner.schedule == "auto":
            self.schedule = choose_schedule(
                self.layout.counts,
                dim,
                tp_size=self.layout.tp_size,
                wire_bytes=2 if owner.precision in ("fp16", "bf16") else 4,
                rates=owner.rates,
            )
        else:
            self.schedule = owner.schedule
        self.dim = dim
        self._image: Tensor | None = None
        self._text: Tensor | None = None
        self._gathers: dict[str, RaggedGather] = {}
        self._row_keys: Tensor | None = None
        if group_ids is not None and self.layout.total:
            self._row_keys = unmasked_keys(self.layout.row_ids(group_ids), group_ids)
            self._gathers["keys"] = self._gather(self._row_keys)

    def start_image(self, image: Tensor) -> None:
        """Take this rank's ``[n, D]`` normalised image embeddings and start their gather if there is one."""
        self._check(image, "image")
        self._image = image
        if self.schedule == "gather_both":
            self._start("image", image)

    def start_text(self, text: Tensor) -> None:
        """Take this rank's ``[n, D]`` normalised text embeddings and start their gather."""
        self._check(text, "text")
        self._text = text
        self._start("text", text)

    def finish(self, scale: Tensor | float) -> Tensor:
        """Complete the gathers, compute the loss and its gradients.

        Args:
            scale: logit scale (not its logarithm), equal on all ranks.

        Returns:
            0-dim global loss, attached to ``image``, ``text`` and ``scale`` (also on a rank without
            pairs). Under ``torch.no_grad()`` the gradient half of the work and its collectives are skipped
            on all ranks alike.
        """
        if self._image is None or self._text is None:
            raise RuntimeError("finish() needs start_image() and start_text() first")
        check_embeddings(self._image, self._text)
        scale = as_scale(scale, self._image)
        loss: Tensor = _GlobalLoss.apply(self._image, self._text, scale, self, torch.is_grad_enabled())
        self._image = self._text = None
        self._gathers.clear()
        return loss

    def _check(self, x: Tensor, name: str) -> None:
        expected = (self.layout.rows, self.dim)
        if tuple(x.shape) != expected:
            raise ValueError(f"{name} is {tuple(x.shape)}: counts and dim of this rank say {expected}")

    def _start(self, name: str, x: Tensor) -> None:
        if self.layout.total:  # every rank sees the same total, so all skip or none
            self._gathers[name] = self._gather(operand(x, self.owner.precision, work_dtype(x)))

    def _gather(self, rows: Tensor) -> RaggedGather:
        return RaggedGather(rows[self.layout.own_rows], self.layout, self.owner.dp_group)

    def keys(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """int32 keys of this rank's rows and of the gathered columns."""
        if self._row_keys is None:
            return self.layout.row_ids(like), self.layout.column_ids(like)
        rows, columns = dense_keys(self._row_keys, self._gathers["keys"].wait())
        return rows, columns

    def gathered(self, name: str) -> Tensor:
        """``[columns, D]`` operands of all ranks."""
        return self._gathers[name].wait()

    def gather_now(self, rows: Tensor) -> RaggedGather:
        """Start the gather of this rank's slice of ``rows`` ``[n, ...]``."""
        return self._gather(rows)

    def engine(self, like: Tensor) -> Engine:
        """The class of blocks for these tensors."""
        return select_engine(self.owner.impl, like) or TiledBlock


class _Local(NamedTuple):
    """This rank's operands and numbers in the work dtype."""

    x: Tensor
    y: Tensor
    s: Tensor
    cos: Tensor
    sequence_keys: Tensor
    col_keys: Tensor
    v: Tensor | None
    """[n] weights relative to the largest one; None when all are equal."""
    v_columns: Tensor | None


class _GlobalLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, step: PendingInfoNCE, with_gradients: bool
    ) -> Tensor:
        dtype = work_dtype(image, text)
        layout, owner = step.layout, step.owner
        if layout.total == 0:
            ctx.save_for_backward(torch.zeros_like(image), torch.zeros_like(text), torch.zeros_like(scale))
            return torch.zeros((), dtype=dtype, device=image.device)
        weights = pair_weights(layout.counts, owner.weighting)
        unit = max(weights)
        local = _prepare(step, image, text, scale.detach().to(dtype), [w / unit for w in weights])
        run = _reduce_scatter if step.schedule == "reduce_scatter" else _gather_both
        loss, gradients = run(step, local, with_gradients)
        (loss,) = sum_over([loss * unit], owner.dp_group)
        if gradients is not None:
            dx, dy = gradients
            k = 0.5 * unit * owner.reduce_size
            ds = k * total_dot(dx, local.x)
            ctx.save_for_backward(
                dx.mul_(local.s * k).to(image.dtype), dy.mul_(local.s * k).to(text.dtype), ds.to(scale.dtype)
            )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad), None, None)


def _prepare(step: PendingInfoNCE, image: Tensor, text: Tensor, s: Tensor, relative: list[float]) -> _Local:
    x, y = (operand(e, step.owner.precision, s.dtype) for e in (image, text))
    sequence_keys, col_keys = step.keys(image)
    v = v_columns = None
    if step.owner.weighting == "rank":
        v = torch.full((step.layout.rows,), relative[step.layout.rank], dtype=s.dtype, device=s.device)
        v_columns = step.layout.per_column(relative, image, s.dtype)
    return _Local(x, y, s, row_dot(x, y, s.dtype), sequence_keys, col_keys, v, v_columns)


def _reduce_scatter(
    step: PendingInfoNCE, local: _Local, with_gradients: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    layout, owner = step.layout, step.owner
    engine = step.engine(local.x)
    positive = local.s * local.cos
    positives = step.gather_now(positive)  # overlaps with the sums
    columns = step.gathered("text")
    keys = (local.sequence_keys, local.col_keys)
    keep = KEPT_BYTES if with_gradients else 0
    block = engine(local.x, columns, *keys, local.s, precision=owner.precision, keep=keep)
    lr, lc = block.lse()
    lc = merge_lse_reduced(lc, owner.dp_group)
    # This TP rank knows the column sums of its slice only; -inf elsewhere makes the merge a gather.
    own = torch.full_like(lr, -torch.inf)
    own[layout.own_rows] = lc[layout.own_columns]
    lr, own = merge_lse(torch.stack([lr, own]), owner.tp_group)
    terms = pair_terms(lr, own, positive, local.v)
    col = torch.logaddexp(lc, positives.wait())
    if not with_gradients:
        return terms.loss, None
    if local.v_columns is not None:
        col = col - local.v_columns.log()
    dx, dy_all = block.gradients(terms.row, col)
    dy = torch.zeros_like(dx)
    dy[layout.own_rows] = reduce_to_owners(dy_all, layout, owner.dp_group)
    return terms.loss, _complete(dx, dy, terms.diagonal, local, owner.tp_group)


def _gather_both(
    step: PendingInfoNCE, local: _Local, with_gradients: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    engine = step.engine(local.x)
    rest = (local.sequence_keys, local.col_keys, local.s)
    options: dict[str, Any] = {"precision": step.owner.precision, "keep": KEPT_BYTES // 2 if with_gradients else 0}
    # Text rows first: they need the image gather, which started earlier than that of the texts.
    text_rows = engine(local.y, step.gathered("image"), *rest, **options)
    lc, _ = text_rows.lse(columns=False)
    image_rows = engine(local.x, step.gathered("text"), *rest, **options)
    lr, _ = image_rows.lse(columns=False)
    lr, lc = merge_lse(torch.stack([lr, lc]), step.owner.tp_group)
    terms = pair_terms(lr, lc, local.s * local.cos, local.v)
    if not with_gradients:
        return terms.loss, None
    # The only gradient exchange: two numbers per pair, weights already folded in.
    row, col = step.gather_now(torch.stack([terms.row, terms.col], dim=1)).wait().unbind(1)
    dx, _ = image_rows.gradients(terms.row, col.contiguous(), want_y=False)
    dy, _ = text_rows.gradients(terms.col, row.contiguous(), want_y=False)
    return terms.loss, _complete(dx, dy, terms.diagonal, local, step.owner.tp_group)


def _complete(
    dx: Tensor, dy: Tensor, diagonal: Tensor, local: _Local, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Sum the column slices of the TP ranks and add the positives' terms, once."""
    dx, dy = sum_over([dx, dy], tp_group)
    add_positive(dx, diagonal, local.y)
    add_positive(dy, diagonal, local.x)
    return dx, dy
