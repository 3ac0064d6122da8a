"""Products of half precision with fp32 results, above all on a CPU, whose kernels round their results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def bf16_units(use: bool) -> Iterator[None]:
    """Within, a CPU's fp32 products round their operands to bf16, use its bf16 units (AMX), and sum in fp32.

    Numbers that bf16 can hold lose nothing by it. A CPU without such units multiplies in fp32, as outside. The setting
    is the process's: products of other threads are rounded in the meantime too.
    """
    if not use:
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """fp32 ``into += a @ b``. Half precision is summed in fp32 on a GPU; a CPU rounds the product, at less cost."""
    if a.dtype == into.dtype:
        into.addmm_(a, b)
    elif into.device.type == "cpu":
        into.add_(a @ b)
    else:
        torch.addmm(into, a, b, out_dtype=into.dtype, out=into)
