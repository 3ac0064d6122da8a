"""Tokens end to end in segments, and attention that never crosses a segment's end.

Shape legend
    t   tokens of all segments;  a  heads on this tensor-parallel rank;  d  channels per head
    L   padded length within a bucket;  g  segments in a bucket
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lcl_kernels.dense_attention import dense_attention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from lcl_mcore.distributed.device import send

AttentionBackend = Literal["te", "flash-attn", "torch-varlen", "sdpa"]


@dataclass
class Segments(PackedSeqParams):
    """megatron's packed-sequence description, plus what it lacks.

    lengths    segment lengths on the host (sum t)
    keys       identity of each image (ViT) for drop-path, int64 [n] on the device
    sequence_keys   identity of each packed sequence (LM) for dropout, on the host
    seed       key of this (run, step, tower)
    buckets    index plans of the padded attention used where no variable-length kernel exists
    masks      what residual branches draw or have drawn, by their place: `models.layers.draw_masks`
    """

    lengths: tuple[int, ...] = ()
    keys: Tensor | None = None
    sequence_keys: tuple[int, ...] = ()
    seed: int = 0
    buckets: list[tuple[Tensor, int, int]] = field(default_factory=list)
    inverse: Tensor | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)

    @property
    def uniform(self) -> bool:
        return len(set(self.lengths)) == 1


def make_segments(
    lengths: tuple[int, ...],
    device: torch.device,
    *,
    keys: Tensor | None = None,
    sequence_keys: tuple[int, ...] = (),
    seed: int = 0,
) -> Segments:
    """Describe segments of the given host-known lengths; no device synchronisation."""
    ends = torch.tensor((0, *lengths), dtype=torch.int64).cumsum(0).to(torch.int32)
    cumulative = send(ends, device)
    return Segments(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
        keys=keys,
        sequence_keys=sequence_keys,
        seed=seed,
    )


def _plan_buckets(segments: Segments, device: torch.device) -> None:
    """Group segments by length (next power of two) into rectangles that causal attention can batch.

    Right padding needs no mask under a causal mask: it comes after every real query.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in segments.lengths:
        groups.setdefault(max(16, 1 << (length - 1).bit_length()), []).append((start, length))
        start += length
    inverse = torch.empty(start, dtype=torch.int64)
    offset = 0
    for _, members in sorted(groups.items()):
        longest = max(length for _, length in members)
        starts = torch.tensor([s for s, _ in members])
        lengths = torch.tensor([n for _, n in members])
        column = torch.arange(longest)
        index = starts[:, None] + torch.minimum(column[None], lengths[:, None] - 1)  # [g, L]
        real = column[None] < lengths[:, None]
        inverse[index[real]] = (torch.arange(index.numel()).view_as(index) + offset)[real]
        segments.buckets.append((send(index.flatten(), device), len(members), longest))
        offset += index.numel()
    segments.inverse = send(inverse, device)


def sdpa_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float) -> Tensor:
    """Attention within segments through torch's flash/SDPA kernels. q, k, v [t, a, d] -> [t, a, d]."""

    def attend(q_: Tensor, k_: Tensor, v_: Tensor) -> Tensor:  # [g, L, a, d]
        return dense_attention(q_, k_, v_, causal=causal, scale=scale)

    if segments.uniform:
        shape = (len(segments.lengths), segments.lengths[0], *q.shape[1:])
        return attend(q.view(shape), k.view(shape), v.view(shape)).reshape(q.shape)
    if not causal:
        raise ValueError("bidirectional attention over segments of unequal length is not implemented")
    if segments.inverse is None:
        _plan_buckets(segments, q.device)
    packed = torch.stack((q, k, v), dim=1)  # [t, 3, a, d]: one gather per bucket instead of three
    outputs = []
    for index, count, longest in segments.buckets:
        block = packed.index_select(0, index).view(count, longest, *packed.shape[1:])
        outputs.append(attend(*block.unbind(2)).reshape(count * longest, *q.shape[1:]))
    assert segments.inverse is not None
    return torch.cat(outputs).index_select(0, segments.inverse)


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    ends, longest = segments.cu_seqlens_q, segments.max_seqlen_q
    return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=causal)


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """Keyword arguments of torch's varlen attention, which changed between releases."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = segments.cu_seqlens_q, segments.max_seqlen_q
    options: dict[str, Any] = {}
    if "scale" in _varlen_parameters():  # without it, the default d ** -0.5 is what every caller here wants
        options["scale"] = scale
    if "is_causal" in _varlen_parameters():
        options["is_causal"] = causal
    elif causal:
        options["window_size"] = (-1, 0)
    out = varlen_attn(q, k, v, ends, ends, longest, longest, **options)
    assert isinstance(out, Tensor)  # a tuple only when auxiliary outputs are asked for
    return out


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "flash-attn": _flash,
    "torch-varlen": _torch_varlen,
    "sdpa": sdpa_segments,
}


class SegmentAttention(MegatronModule):
    """Core attention for megatron's `SelfAttention` in packed ("thd") layout, without s x s scores.

    Built through a spec with `backend`; the variable-length kernels take half precision only, so fp32
    tensors always go through SDPA.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        backend: AttentionBackend = "sdpa",
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.causal = attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.kernel = _KERNELS[backend]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Segments | None = None,
    ) -> Tensor:
        """query, key, value [t, a, d] -> [t, a * d]."""
        assert packed_seq_params is not None
        kernel = sdpa_segments if query.dtype == torch.float32 else self.kernel
        out = kernel(query, key, value, packed_seq_params, self.causal, self.scale)
        return out.reshape(query.shape[0], -1)
