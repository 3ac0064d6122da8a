"""The contrastive loss of a global batch (paper equation 6, halved as in the released code).

Negatives span the data-parallel ranks. Gradients follow the SUM convention: added up over data-parallel
ranks they are those of one process that holds the whole batch. The fused implementation is
`lcl_kernels.DistributedInfoNCE`; `ReferenceInfoNCE` is its plain counterpart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lcl_kernels import DistributedInfoNCE
from torch import Tensor

from lcl_mcore.config.schema import LossConfig
from lcl_mcore.distributed.groups import Groups


class PendingLoss(Protocol):
    """The loss of one step under way: each side is handed over as soon as it exists."""

    def start_image(self, image: Tensor) -> None: ...

    def start_text(self, text: Tensor) -> None: ...

    def finish(self, scale: Tensor) -> Tensor: ...


class Contrastive(Protocol):
    """Opens the loss of a step; `counts` has one entry per data-parallel rank, known on the host."""

    def begin(self, counts: Sequence[int], dim: int, *, group_ids: Tensor | None = None) -> PendingLoss: ...


class ReferenceInfoNCE:
    """Gather everything, form the whole logit matrix, let autograd differentiate it."""

    def __init__(self, group: dist.ProcessGroup, weighting: str) -> None:
        self.group, self.weighting = group, weighting

    def begin(self, counts: Sequence[int], dim: int, *, group_ids: Tensor | None = None) -> ReferenceStep:
        return ReferenceStep(self, tuple(counts), group_ids)


class ReferenceStep:
    """One step of `ReferenceInfoNCE`."""

    def __init__(self, owner: ReferenceInfoNCE, counts: tuple[int, ...], group_ids: Tensor | None) -> None:
        self.owner, self.counts, self.group_ids = owner, counts, group_ids
        self.image: Tensor
        self.text: Tensor

    def start_image(self, image: Tensor) -> None:
        self.image = image

    def start_text(self, text: Tensor) -> None:
        self.text = text

    def finish(self, scale: Tensor) -> Tensor:
        """image, text [n_r, D], scale scalar -> the global loss, the same on every rank."""
        ranks, total = len(self.counts), sum(self.counts)
        if total == 0:
            return 0.0 * (self.image.sum() + self.text.sum() + scale)
        image, text = self._everyone(self.image), self._everyone(self.text)
        # Each rank differentiates the whole loss; only a share of it may reach the shared scale.
        shared = scale.detach() + (scale - scale.detach()) / ranks
        logits = shared * image @ text.T
        if self.group_ids is not None:
            ids = self._everyone(self.group_ids)
            same = (ids[:, None] == ids[None]) & ~torch.eye(total, dtype=torch.bool, device=ids.device)
            logits = logits.masked_fill(same, -torch.inf)
        labels = torch.arange(total, device=image.device)
        each = F.cross_entropy(logits, labels, reduction="none") + F.cross_entropy(logits.T, labels, reduction="none")
        return 0.5 * (each * self._weights(each)).sum()

    def _weights(self, like: Tensor) -> Tensor:
        total, filled = sum(self.counts), sum(c > 0 for c in self.counts)
        if self.owner.weighting == "image":
            return torch.full_like(like, 1.0 / total)
        parts = [like.new_full((c,), 1.0 / (filled * c)) for c in self.counts if c]
        return torch.cat(parts)

    def _everyone(self, own: Tensor) -> Tensor:
        """All ranks' rows in rank order; gradients flow to this rank's own rows only."""
        longest = max(self.counts)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: own.shape[0]] = own.detach()
        buffers = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(buffers, padded, group=self.owner.group)
        rank = self.owner.group.rank()
        return torch.cat(
            [own if r == rank else b[:c] for r, (b, c) in enumerate(zip(buffers, self.counts, strict=True))]
        )


def make_contrastive(config: LossConfig, groups: Groups, *, half: bool) -> Contrastive:
    """The implementation that `config` asks for; `half` is what "auto" precision means here."""
    weighting = "image" if config.averaging == "global" else "rank"
    if config.contrastive_impl == "reference":
        return ReferenceInfoNCE(groups.loss, weighting)
    automatic = "fp16" if half else "fp32"
    precision = automatic if config.contrastive_precision == "auto" else config.contrastive_precision
    return DistributedInfoNCE(
        groups.loss,
        groups.tp,
        weighting=weighting,  # type: ignore[arg-type]
        schedule=config.contrastive_schedule,
        impl=config.contrastive_impl,
        precision=precision,  # type: ignore[arg-type]
    )
