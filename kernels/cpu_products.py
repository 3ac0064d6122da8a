"""Half precision products with fp32 results on a CPU, whose half precision kernels round their results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def bf16_units(x: Tensor) -> Iterator[None]:
    """Within, a CPU's fp32 products of numbers that bf16 can hold use its bf16 units (AMX), and sum in fp32.

    They lose nothing by it. A CPU without such units multiplies in fp32, as outside.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
