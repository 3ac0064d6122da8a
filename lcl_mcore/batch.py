"""What the data engine hands to the trainer: one optimizer step of one data-parallel rank.

Shape legend (all of one micro-batch):

    b   packed sequences, micro_batch_size of them (never fewer in training, never padding sequences)
    S   tokens per sequence (`data.sequence_length`)
    t   b * S, the sequences one after the other
    n   images, any number including 0;  P  LM positions that one image takes (its patch latents)
    m   images with a preceding context (they enter the contrastive loss), m <= n
    k   positions whose next token is a target of the generation loss
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences on the host; integer tensors are int64, pixels are uint8.

    Attributes:
        tokens: [t] ids; the P positions of an image hold the placeholder id, padding holds `pad`.
        positions: [t] restart at 0 in every document; image latents take one position each.
        lengths: lengths of the attention segments, sum t: attention never crosses one. A sequence's
            padding is a segment of its own; two sequences never share a segment.
        images: [n, 3, H, W] uint8 RGB after crop and resize; normalised on the device.
        image_starts: [n] index in [t] of each image's first latent (its `<BoI>` is one before it).
        context_positions: [m] index in [t] of the `<BoI>` of each image that has a context.
        context_images: [m] which of the n images each of them is.
        target_positions: [k] index in [t] of the position that predicts.
        target_labels: [k] the token it must predict: text, `<BoI>` or end tokens only.
        image_keys: [n] identity of each image in the global batch, the same in every layout; keys the
            per-image randomness (drop-path).
        sequence_keys: [b] likewise for sequences (dropout).
        group_ids: [m] equal for two images of one document (to mask false negatives on request).
        documents: ids "source/shard/key" in order, for the log hash and for error messages.
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    images: Tensor
    image_starts: Tensor
    context_positions: Tensor
    context_images: Tensor
    target_positions: Tensor
    target_labels: Tensor
    image_keys: Tensor
    sequence_keys: Tensor
    group_ids: Tensor
    documents: tuple[str, ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        """Copy the tensors to `device` (asynchronously from pinned memory)."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }
        return MicroBatch(**moved)

    def pin_memory(self) -> MicroBatch:
        """The same in page-locked memory, so that copies to a CUDA device do not wait; what is there already stays."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() if isinstance(value, Tensor) and value.device.type == "cpu" else value
            for name, value in self.__dict__.items()
        }
        return MicroBatch(**pinned)


@dataclass(frozen=True)
class GlobalCounts:
    """Counts of the whole global batch, known on every host before the step: no device sync.

    Attributes:
        images, contexts, targets: one entry per data-parallel rank, the sum over its micro-batches.
        tokens: likewise, positions that are not padding.
        pairs: likewise, causal (query, key) pairs of all documents: the LM's attention work.
        micro_contexts: `contexts` of each micro-batch alone, again one entry per rank.
    """

    images: tuple[int, ...]
    contexts: tuple[int, ...]
    targets: tuple[int, ...]
    tokens: tuple[int, ...]
    pairs: tuple[int, ...] = ()
    micro_contexts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step of one data-parallel rank, and the position to save once it is trained on.

    Attributes:
        position: small plain JSON; restores at any data-parallel size.
        order_hash: running hash over documents, tokens and crop windows of all global batches so far.
        statistics: fill, image imbalance and failed images of the global batch.
    """

    micro_batches: tuple[MicroBatch, ...]
    counts: GlobalCounts
    position: dict[str, Any]
    order_hash: str
    statistics: dict[str, float] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Place of this global batch in the order of the data, from 0; steps differ from it by skipped batches."""
        return int(self.position["step"]) - 1
