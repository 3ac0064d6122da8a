"""Next-token cross-entropy over a vocabulary split among tensor-parallel ranks (paper section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lcl_kernels import linear_cross_entropy
from lcl_kernels.triton_fused import FusedImpl
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from lcl_mcore.distributed.gradient_buffers import gradient_buffer, mark_added, through_buffer


def generation_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    impl: str = "auto",
    elementwise: FusedImpl = "auto",
) -> Tensor:
    """Sum of the cross-entropies of k targets.

    Args:
        hidden: [k, D], equal on all tensor-parallel ranks.
        weight: [V / tp, D], this rank's rows of the output matrix; rows from `vocab_size` on are padding
            and stay out of the softmax. Its gradient is added to its buffer, where it has one.
        labels: [k] int64.
        impl: "chunked" never stores all logits; "reference" does; "auto" is "chunked", by what `elementwise` names.
        elementwise: "triton" keeps a chunk's logits in the dtype of `hidden`, "plain" in fp32.

    Returns:
        fp32 scalar, equal on all tensor-parallel ranks.
    """
    if impl != "reference":
        buffer = gradient_buffer(weight) if torch.is_grad_enabled() else None
        if buffer is not None:
            mark_added(weight)
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            vocab_start=vocab_start,
            tp_group=tp_group,
            valid_vocab=vocab_size,
            weight_gradient=buffer,
            impl=elementwise if impl == "auto" else "plain",
        )
    shared = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
    logits = gather_from_tensor_model_parallel_region((shared @ through_buffer(weight).T).float(), group=tp_group)
    return F.cross_entropy(logits[:, :vocab_size], labels, reduction="sum")


def generation_weight(counts: Sequence[int], rank: int, mean: str) -> float:
    """Factor that turns this rank's sum into its part of the mean over the global batch.

    mean = "global": 1 / all targets. mean = "rank": 1 / (ranks with targets * own targets), the released
    code's mean of rank means. 0 where there is nothing to average.
    """
    own, total, filled = counts[rank], sum(counts), sum(c > 0 for c in counts)
    if mean == "global":
        return 1.0 / total if total else 0.0
    return 1.0 / (filled * own) if own else 0.0
