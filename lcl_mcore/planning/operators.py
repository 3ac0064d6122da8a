"""What single operators cost: matrix products by their shapes, attention from its segment lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.addmm_, _ATEN.baddbmm, _ATEN.baddbmm_}
# Name of the operator -> places of (query, key) among its arguments, and products of the size of the scores.
# Forward has two (scores, values), backward five: it forms the scores again.
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


def name_of(func: Any) -> str:
    """`aten::mm` for any overload of it."""
    return str(func.overloadpacket._qualified_op_name)


def is_free(func: Any) -> bool:
    """Views and allocations: nothing is computed or moved."""
    return func.is_view or name_of(func) in _NO_TRAFFIC


def kind_of(func: Any) -> str:
    """product, attention or other."""
    if name_of(func) in _ATTENTION:
        return "attention"
    return "product" if func.overloadpacket in _PRODUCTS else "other"


def flops_of(
    func: Any, args: Any, kwargs: Any, out: Any, lengths: Callable[[Tensor], list[int] | None]
) -> int:
    """FLOPs of one call; 0 for everything but matrix products and attention.

    Args:
        lengths: gives segment lengths for a tensor of cumulative lengths.
    """
    places = _ATTENTION.get(name_of(func))
    if places is not None:
        return _attention(func, args, kwargs, places, lengths)
    if func.overloadpacket not in _PRODUCTS:
        return 0
    a, b = (args[1], args[2]) if "add" in name_of(func) else (args[0], args[1])
    if a.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]


def _attention(
    func: Any,
    args: Any,
    kwargs: Any,
    places: tuple[int, int, int],
    lengths: Callable[[Tensor], list[int] | None],
) -> int:
    query, key, products = args[places[0]], args[places[1]], places[2]
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    window = given.get("window_size")
    causal = bool(given.get("is_causal", False)) or (window is not None and list(window) == [-1, 0])
    if query.dim() == 3:  # [t, a, d]: segments laid end to end
        segments = lengths(given["cu_seq_q"]) or [int(given["max_q"])] * (
            query.shape[0] // int(given["max_q"])
        )
        pairs = sum(_pairs(n, n, causal) for n in segments)
        heads = query.shape[1]
    else:  # [g, a, L, d]
        pairs = query.shape[0] * _pairs(query.shape[2], key.shape[2], causal)
        heads = query.shape[1]
    return products * 2 * pairs * heads * query.shape[-1]


def _pairs(queries: int, keys: int, causal: bool) -> int:
    return queries * (queries + 1) // 2 if causal else queries * keys
