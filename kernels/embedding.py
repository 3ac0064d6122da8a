"""The gradient of looking rows up, added to a buffer."""

from __future__ import annotations

import torch
from torch import Tensor


def add_row_gradients(buffer: Tensor, index: Tensor, grad: Tensor) -> None:
    """``buffer[index[i]] += grad[i]``, always in one order. buffer ``[V, h]``, index ``[t]``, grad ``[t, h]``."""
    if buffer.device.type == "cuda":  # whose index_add_ adds in any order
        buffer.add_(torch.ops.aten.embedding_dense_backward(grad, index, buffer.shape[0], -1, False))
    else:
        buffer.index_add_(0, index, grad.to(buffer.dtype))
