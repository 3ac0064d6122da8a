"""The fused element-wise operators as torch operators ``lcl::*`` with Triton kernels behind them.

As registered operators they have names in a profile, shapes without values (on "meta"), and traffic that is the sum
of their arguments and results. Triton itself is imported when the first one is launched. Derivatives and the choice
between these and plain torch: ``lcl_kernels.residual``, ``lcl_kernels.activation``, ``lcl_kernels.cross_entropy``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lcl_kernels._pair_terms import check_choice
from torch import Tensor

PROGRAMS = 512
"""Partial sums per reduction over rows: four blocks for each multiprocessor of an H100. A constant, so that gradients
have the same bits on GPUs of different sizes."""
REDUCE_TILE = {"ROWS": 64, "COLUMNS": 32}

_LIBRARY = torch.library.Library("lcl", "DEF")
_MASKS = "Tensor? row_scale, Tensor? row_keys, float dropout"
_LIBRARY.define(
    "residual_branch(Tensor branch, Tensor? bias, Tensor? gain, Tensor residual, Tensor? norm_weight, "
    f"Tensor? norm_bias, float eps, {_MASKS}) -> (Tensor hidden, Tensor normed, Tensor mean, Tensor rstd)"
)
_LIBRARY.define(
    "residual_branch_backward(Tensor grad_hidden, Tensor? grad_normed, Tensor? hidden, Tensor? mean, Tensor? rstd, "
    f"Tensor? branch, Tensor? bias, Tensor? gain, Tensor? norm_weight, {_MASKS}) -> (Tensor grad_branch, "
    "Tensor grad_residual, Tensor grad_bias, Tensor grad_gain, Tensor grad_norm_weight, Tensor grad_norm_bias)"
)
_LIBRARY.define("bias_activation(Tensor x, Tensor? bias, bool gelu) -> Tensor")
_LIBRARY.define(
    "bias_activation_backward(Tensor grad, Tensor saved, Tensor? bias, bool gelu) -> (Tensor grad_x, Tensor grad_bias)"
)
_LIBRARY.define(
    "vocabulary_sums(Tensor logits, Tensor? bias, Tensor labels, int vocab_start, int valid) "
    "-> (Tensor lse, Tensor target)"
)
_LIBRARY.define(
    "vocabulary_gradient(Tensor(a!) logits, Tensor? bias, Tensor labels, Tensor factors, Tensor lse, int vocab_start, "
    "int valid) -> ()"
)
_LIBRARY.define(
    "vocabulary_loss(Tensor(a!) logits, Tensor? bias, Tensor labels, Tensor factors, int vocab_start, int valid) "
    "-> (Tensor lse, Tensor target)"
)


FusedImpl = Literal["auto", "triton", "plain"]
"""What serves a fused operator: "auto" is Triton where it runs, else plain torch."""


def launches_triton(impl: FusedImpl, like: Tensor) -> bool:
    """Whether an operator on such tensors is one of ours.

    Raises:
        ValueError: an unknown `impl`, or "triton" where it cannot run.
    """
    check_choice("impl", impl, FusedImpl)
    if impl == "plain":
        return False
    if like.is_meta:  # no values, so nothing is launched: a planner counts what a GPU would do
        return True
    runs = like.dtype != torch.float64 and (like.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    if impl == "triton" and not (runs and _triton_is_here()):
        here = f"{like.dtype} on {like.device}" if _triton_is_here() else "a machine without the triton package"
        raise ValueError(f'impl="triton" cannot run on {here}; use impl="plain"')
    return runs and _triton_is_here()


@functools.cache
def _triton_is_here() -> bool:
    return importlib.util.find_spec("triton") is not None


def block_of(width: int) -> int:
    """Lanes for a row: the next power of two."""
    return max(32, 1 << (width - 1).bit_length())


def warps_of(block: int) -> int:
    """Eight elements a thread: 16 bytes of bf16 at a time."""
    return min(max(block // 256, 1), 16)


def _ops() -> Any:
    from lcl_kernels import triton_fused_ops

    return triton_fused_ops


def _device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors say."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _mask_numbers(rows: int, row_scale: Tensor | None, dropout: float) -> tuple[int, int, float]:
    """Rows that share a scale, and dropout's threshold of 16 bits with the factor of what is kept."""
    threshold = round(dropout * 65536)
    return rows if row_scale is None else rows // len(row_scale), threshold, 65536 / (65536 - threshold)


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0)


# --- residual branch ---


def _residual_results(
    branch: Tensor, residual: Tensor, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.empty_like(residual)
    if norm_weight is None:
        return hidden, _absent(hidden), _absent(hidden), _absent(hidden)
    statistics = (torch.empty(len(residual), dtype=torch.float32, device=residual.device) for _ in range(2))
    return hidden, torch.empty_like(branch), *statistics  # type: ignore[return-value]


def _residual_branch(
    branch: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    row_scale: Tensor | None,
    row_keys: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _residual_results(branch, residual, norm_weight)
    rows, width = branch.shape
    block, group = block_of(width), 4
    with _device(branch):
        _ops().residual_forward_kernel[(max(-(-rows // group), 1),)](
            branch, bias, gain, residual, norm_weight, norm_bias, row_scale, row_keys, *results,
            rows, *_mask_numbers(rows, row_scale, dropout), eps,
            H=width, BLOCK=block, ROWS=group, BIAS=bias is not None, GAIN=gain is not None,
            ROW_SCALE=row_scale is not None, DROPOUT=row_keys is not None, NORM=norm_weight is not None,
            num_warps=warps_of(block),
        )  # fmt: skip
    return results


def _gradient_results(
    grad_hidden: Tensor, bias: Tensor | None, gain: Tensor | None, norm_weight: Tensor | None, masked: bool
) -> tuple[Tensor, ...]:
    """Gradients of branch, residual, bias, gain, norm weight and norm bias; absent ones are empty.

    Empty for the residual means that its gradient is that of the sum; for the branch, that it is the residual's.
    """
    branch = torch.empty_like(grad_hidden) if gain is not None or masked else _absent(grad_hidden)
    residual = _absent(grad_hidden) if norm_weight is None else torch.empty_like(grad_hidden)
    parameters = (bias, gain, norm_weight, norm_weight)
    return branch, residual, *(_absent(grad_hidden) if p is None else torch.empty_like(p) for p in parameters)


def _residual_branch_backward(
    grad_hidden: Tensor,
    grad_normed: Tensor | None,
    hidden: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    norm_weight: Tensor | None,
    row_scale: Tensor | None,
    row_keys: Tensor | None,
    dropout: float,
) -> tuple[Tensor, ...]:
    results = _gradient_results(grad_hidden, bias, gain, norm_weight, row_scale is not None or row_keys is not None)
    rows, width = grad_hidden.shape
    block = block_of(width)
    flags = {"BIAS": bias is not None, "GAIN": gain is not None, "NORM": norm_weight is not None}
    sums = (flags["BIAS"] or flags["GAIN"]) + flags["GAIN"] + 2 * flags["NORM"]
    per_program = max(-(-rows // PROGRAMS), 1)
    programs = max(-(-rows // per_program), 1)  # one that writes zeros where there is no row
    parts = torch.empty((programs, sums, width), dtype=torch.float32, device=grad_hidden.device)
    with _device(grad_hidden):
        _ops().residual_backward_kernel[(programs,)](
            grad_hidden, grad_normed, hidden, mean, rstd, branch, gain, norm_weight, row_scale, row_keys,
            results[1], results[0], parts, rows, per_program, *_mask_numbers(rows, row_scale, dropout),
            H=width, BLOCK=block, ROW_SCALE=row_scale is not None, DROPOUT=row_keys is not None, **flags,
            num_warps=warps_of(block),
        )  # fmt: skip
        if sums:
            _ops().residual_reduce_kernel[(-(-width // REDUCE_TILE["COLUMNS"]), 3)](
                parts, bias, gain, *results[2:], programs, H=width, **flags, **REDUCE_TILE, num_warps=4
            )
    return results


# --- activation ---


def _activation_grid(width: int, rows: int, programs: int) -> tuple[int, int, int]:
    """Lanes for the columns of one block, rows of a program, and programs over all rows."""
    block = min(block_of(width), 1024)
    columns = -(-width // block)
    per_program = max(-(-rows // max(programs // columns, 1)), 1)
    return block, per_program, max(-(-rows // per_program), 1)


def _bias_activation(x: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    y = torch.empty_like(x)
    rows, width = x.shape
    block, group = min(block_of(width), 1024), 8
    with _device(x):
        _ops().activation_forward_kernel[(max(-(-rows // group), 1), -(-width // block))](
            x, bias, y, rows, F=width, BLOCK=block, ROWS=group, BIAS=bias is not None, GELU=gelu,
            num_warps=warps_of(block),
        )  # fmt: skip
    return y


def _bias_activation_backward(grad: Tensor, saved: Tensor, bias: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    grad_x, grad_bias = _activation_gradients(grad, saved, bias, gelu)
    rows, width = grad.shape
    block, per_program, programs = _activation_grid(width, rows, PROGRAMS)
    parts = torch.empty((programs if bias is not None else 0, width), dtype=torch.float32, device=grad.device)
    with _device(grad):
        _ops().activation_backward_kernel[(programs, -(-width // block))](
            grad, saved, bias, grad_x, parts, rows, per_program, F=width, BLOCK=block, BIAS=bias is not None, GELU=gelu,
            num_warps=warps_of(block),
        )  # fmt: skip
        if bias is not None:
            _ops().activation_reduce_kernel[(-(-width // REDUCE_TILE["COLUMNS"]),)](
                parts, grad_bias, programs, F=width, **REDUCE_TILE, num_warps=4
            )
    return grad_x, grad_bias


def _activation_gradients(grad: Tensor, saved: Tensor, bias: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), _absent(grad) if bias is None else torch.empty_like(bias)


# --- vocabulary cross-entropy ---

VOCABULARY_LAUNCH = {"BLOCK": 8192, "num_warps": 16, "maxnreg": 64}
"""Two rows at a time on each multiprocessor, so that their logits stay in the L2 cache until they are read again."""


def _row_numbers(logits: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return tuple(torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))  # type: ignore[return-value]


def _vocabulary(
    logits: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, lse: Tensor, target: Tensor | None,
    vocab_start: int, valid: int,
) -> None:  # fmt: skip
    with _device(logits):
        _ops().vocabulary_kernel[(logits.shape[0],)](
            logits, bias, labels, factors, lse, target, vocab_start, valid,
            V=logits.shape[1], BIAS=bias is not None, SUM=target is not None, GRADIENT=factors is not None,
            **VOCABULARY_LAUNCH,
        )  # fmt: skip


def _vocabulary_sums(
    logits: Tensor, bias: Tensor | None, labels: Tensor, vocab_start: int, valid: int
) -> tuple[Tensor, Tensor]:
    lse, target = _row_numbers(logits)
    _vocabulary(logits, bias, labels, None, lse, target, vocab_start, valid)
    return lse, target


def _vocabulary_gradient(
    logits: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor, lse: Tensor, vocab_start: int, valid: int
) -> None:
    _vocabulary(logits, bias, labels, factors, lse, None, vocab_start, valid)


def _vocabulary_loss(
    logits: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor, vocab_start: int, valid: int
) -> tuple[Tensor, Tensor]:
    lse, target = _row_numbers(logits)
    _vocabulary(logits, bias, labels, factors, lse, target, vocab_start, valid)
    return lse, target


def _register() -> None:
    def residual_fake(
        branch: Tensor, bias: Any, gain: Any, residual: Tensor, norm_weight: Tensor | None, *rest: Any
    ) -> Any:
        return _residual_results(branch, residual, norm_weight)

    def residual_backward_fake(grad: Tensor, *rest: Any) -> Any:
        bias, gain, norm_weight, *masks = rest[5:10]
        return _gradient_results(grad, bias, gain, norm_weight, masks != [None, None])

    operators = {
        "residual_branch": (_residual_branch, residual_fake),
        "residual_branch_backward": (_residual_branch_backward, residual_backward_fake),
        "bias_activation": (_bias_activation, lambda x, bias, gelu: torch.empty_like(x)),
        "bias_activation_backward": (_bias_activation_backward, _activation_gradients),
        "vocabulary_sums": (_vocabulary_sums, _row_numbers),
        "vocabulary_gradient": (_vocabulary_gradient, lambda *arguments: None),
        "vocabulary_loss": (_vocabulary_loss, _row_numbers),
    }
    for name, (launch, shapes) in operators.items():
        for key in ("CUDA", "CPU"):  # on CPU tensors Triton's interpreter computes
            _LIBRARY.impl(name, launch, key)
        _LIBRARY.impl(name, shapes, "Meta")


_register()
