"""``TritonBlock``: same meaning as ``lcl_kernels.tiled.TiledBlock``, for GPUs.

How a block is done
    1. ``sums``: logits of every tile once, one exponential each, shifted by one number for the whole block
       (``lcl_kernels._common_shift``).
    2. If the sums show that anything was lost to fp32's range, a device flag makes ``fallback`` and ``merge``
       recompute with a maximum per row and column. They are always launched and return at once otherwise,
       since reading the flag would stop the host.
    3. ``gradient`` writes G for a chunk of rows in fp16, scaled by 2^14; two matrix products consume it. The
       8 N^2 D FLOP are the minimum of a method that does not keep the logits: a column's normaliser needs
       all rows.

Launches are whole waves, one program per multiprocessor: the sums take as many row tiles at a time as there are
multiprocessors, and a chunk of G as many rows as make whole waves of 128 x 256 tiles of the product with it.

Memory beyond inputs and outputs: the chunk of G (at most 1 GiB) and the partial column sums (K fp32 per
multiprocessor).
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from lcl_kernels import triton_ops as ops
from lcl_kernels._common_shift import common_shift, factors_out_of_range, smallest_sum
from lcl_kernels._pair_terms import FP16_GAIN, Precision
from lcl_kernels.triton_config import INTERPRETER, Config, Kernel, config
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

GRADIENT_BYTES = 1 << 30


class TritonBlock:
    """See :class:`lcl_kernels.tiled.TiledBlock`.

    Args:
        tile: its first number overrides the rows per chunk of G.
        precision: chooses the product of fp32 operands, "fp32" or "tf32x3".
        keep: not used; logits are formed again.
    """

    name = "triton"

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        x_keys: Tensor,
        y_keys: Tensor,
        scale: Tensor,
        *,
        tile: tuple[int, int] | None = None,
        precision: Precision = "fp32",
        keep: int = 0,
    ) -> None:
        if _interpreted() and x.dtype == torch.bfloat16:
            raise ValueError('precision="bf16": Triton\'s interpreter multiplies it as integers; use "fp16"')
        self.width = x.shape[1]
        self.x, self.y, self.x_keys, self.y_keys, self.scale = _aligned(x), _aligned(y), x_keys, y_keys, scale
        self.tile, self.precision = tile, precision
        self.empty = len(x) == 0 or len(y) == 0
        self.terms = max(len(x), len(y))
        self.shift = None if self.empty else common_shift(x, y, scale)

    def lse(self, *, columns: bool = True) -> tuple[Tensor, Tensor | None]:
        """See :meth:`lcl_kernels.tiled.TiledBlock.lse`."""
        x, y, shift = self.x, self.y, self.shift
        lr = torch.full((len(x),), -math.inf, dtype=torch.float32, device=x.device)
        lc = torch.full((len(y),), -math.inf, dtype=torch.float32, device=x.device) if columns else None
        if shift is None:
            return lr, lc
        block = (x, y, self.x_keys, self.y_keys, self.scale)
        with _device(x):
            row_sums, col_sums = _sums(*block, shift, columns, self.precision)
            floor = smallest_sum(self.terms, torch.float32)
            lost = row_sums.min() < floor
            torch.add(row_sums.log(), shift, out=lr)
            if lc is not None and col_sums is not None:
                lost = lost | (col_sums.min() < floor)
                torch.add(col_sums.log(), shift, out=lc)
            _fallback(*block, lost.to(torch.int32), lr, lc, self.precision)
        return lr, lc

    def gradients(self, row: Tensor, col: Tensor, *, want_y: bool = True) -> tuple[Tensor, Tensor | None]:
        """See :meth:`lcl_kernels.tiled.TiledBlock.gradients`."""
        x, y, shift, precision = self.x, self.y, self.shift, self.precision
        m, k, d = x.shape[0], y.shape[0], x.shape[1]
        dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        dy = torch.zeros(y.shape, dtype=torch.float32, device=x.device) if want_y else None
        if shift is None:
            return dx[:, : self.width], None if dy is None else dy[:, : self.width]
        gain = FP16_GAIN if x.dtype == torch.float16 else 1.0
        shape = _shape("gradient", x, precision)
        # A length of whole 16-element groups lets the compiler store and multiply 16 bytes at a time.
        stride = -(-k // 16) * 16
        rows = self.tile[0] if self.tile else _wave_rows(x, GRADIENT_BYTES // (stride * x.element_size()))
        rows = min(rows, m)
        buffer = torch.empty((rows, stride), dtype=x.dtype, device=x.device)
        column_range = _key_ranges(self.y_keys, shape.columns)
        with _device(x):
            flag = factors_out_of_range(row, col, shift, self.terms).to(torch.int32)
            for start in range(0, m, rows):
                part = slice(start, min(start + rows, m))
                g = buffer[: part.stop - start, :k]
                tiles = triton.cdiv(len(g), shape.rows) * triton.cdiv(k, shape.columns)
                ops.gradient_kernel[(min(tiles, _processors(x)) if shape.tma else tiles,)](
                    _operand(x[part], shape, shape.rows),
                    _operand(y, shape, shape.columns),
                    self.x_keys[part],
                    self.y_keys,
                    _key_ranges(self.x_keys[part], shape.rows),
                    column_range,
                    TensorDescriptor.from_tensor(g, [shape.rows, shape.columns]) if shape.tma else buffer,
                    row[part],
                    col,
                    self.scale,
                    shift,
                    flag,
                    len(g),
                    k,
                    stride,
                    gain,
                    D=d,
                    GROUP=8,
                    PREC=_dot_precision(x, precision),
                    TMA=shape.tma,
                    **_launch(shape),
                )
                _accumulate(dx[part], g, y, gain, precision)
                if dy is not None:
                    _accumulate(dy, g.T, x[part], gain, precision)
        return dx[:, : self.width], None if dy is None else dy[:, : self.width]


def _sums(
    x: Tensor,
    y: Tensor,
    x_keys: Tensor,
    y_keys: Tensor,
    scale: Tensor,
    shift: Tensor,
    columns: bool,
    precision: Precision,
) -> tuple[Tensor, Tensor | None]:
    shape = _shape("sums", x, precision)
    row_sums = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    col_sums = torch.zeros(y.shape[0], dtype=torch.float32, device=x.device) if columns else None
    column_range = _key_ranges(y_keys, shape.columns)
    for part, row_part, col_part, grid, per_split in _partials(x, y, shape, columns):
        ops.sums_kernel[grid](
            _operand(x[part], shape, shape.rows),
            _operand(y, shape, shape.columns),
            x_keys[part],
            y_keys,
            _key_ranges(x_keys[part], shape.rows),
            column_range,
            row_part,
            col_part,
            scale,
            shift,
            part.stop - part.start,
            y.shape[0],
            per_split,
            D=x.shape[1],
            PREC=_dot_precision(x, precision),
            TMA=shape.tma,
            COLS=columns,
            **_launch(shape),
        )
        torch.sum(row_part, 0, out=row_sums[part])
        if col_sums is not None:
            col_sums += col_part.sum(0)
    return row_sums, col_sums


def _fallback(
    x: Tensor,
    y: Tensor,
    x_keys: Tensor,
    y_keys: Tensor,
    scale: Tensor,
    flag: Tensor,
    lr: Tensor,
    lc: Tensor | None,
    precision: Precision,
) -> None:
    shape = _shape("fallback", x, precision)
    block = 256
    for part, row_part, col_part, grid, per_split in _partials(x, y, shape, lc is not None):
        ops.fallback_lse_kernel[grid](
            _operand(x[part], shape, shape.rows),
            _operand(y, shape, shape.columns),
            x_keys[part],
            y_keys,
            row_part,
            col_part,
            scale,
            flag,
            part.stop - part.start,
            y.shape[0],
            per_split,
            D=x.shape[1],
            PREC=_dot_precision(x, precision),
            TMA=shape.tma,
            COLS=lc is not None,
            **_launch(shape),
        )
        merges = [(row_part, lr[part], False)]
        if lc is not None:
            merges.append((col_part, lc, part.start > 0))
        for partial, out, keep in merges:
            grid_1d = (triton.cdiv(out.shape[0], block),)
            ops.merge_kernel[grid_1d](partial, out, flag, partial.shape[0], out.shape[0], B=block, KEEP=keep)


def _partials(x: Tensor, y: Tensor, shape: Config, columns: bool) -> Any:
    """Row chunks with their partial-sum buffers, grid and column tiles per split."""
    tiles, processors = triton.cdiv(len(y), shape.columns), _processors(x)
    chunk = processors * shape.rows
    for start in range(0, len(x), chunk):
        part = slice(start, min(start + chunk, len(x)))
        row_tiles = triton.cdiv(part.stop - part.start, shape.rows)
        splits = _splits(row_tiles, tiles, processors)
        row_part = torch.empty((splits, part.stop - part.start), dtype=torch.float32, device=x.device)
        col_shape = (row_tiles, len(y)) if columns else (1, 1)
        col_part = torch.empty(col_shape, dtype=torch.float32, device=x.device)
        yield part, row_part, col_part, (row_tiles, splits), triton.cdiv(tiles, splits)


def _splits(row_tiles: int, tiles: int, processors: int) -> int:
    """Parts of the columns such that row tiles times parts fill the multiprocessors best; none is empty."""
    longest = {s: triton.cdiv(row_tiles * s, processors) * triton.cdiv(tiles, s) for s in range(1, processors + 1)}
    best = min((s for s in longest if s <= tiles), key=lambda s: (longest[s], s))
    return triton.cdiv(tiles, triton.cdiv(tiles, best))


def _wave_rows(x: Tensor, most: int) -> int:
    """Rows of a chunk of G, at most ``most``, that make whole waves of 128 x 256 tiles of its product with y."""
    processors = _processors(x)
    wave = 128 * processors // math.gcd(processors, triton.cdiv(x.shape[1], 256))
    return max(128, most // wave * wave or most // 128 * 128)


def _key_ranges(keys: Tensor, block: int) -> Tensor:
    """``[tiles, 2]`` least and largest key of each tile; a last tile that is not full takes all numbers."""
    limits = torch.iinfo(torch.int32)
    keys = keys.to(torch.int32)
    low, high = (
        torch.nn.functional.pad(keys, (0, -len(keys) % block), value=end).view(-1, block)
        for end in (limits.min, limits.max)
    )
    return torch.stack([low.amin(1), high.amax(1)], dim=1)


def _aligned(x: Tensor) -> Tensor:
    """The operand with rows at multiples of 16 bytes, as descriptors need; columns of zeros change no product."""
    extra = -x.shape[1] % (16 // x.element_size())
    if extra == 0 and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, extra)) if extra else x.clone()


def _operand(x: Tensor, shape: Config, rows: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, shape.depth]) if shape.tma else x


def _accumulate(into: Tensor, g: Tensor, other: Tensor, gain: float, precision: Precision) -> None:
    """``into += g @ other / gain`` in fp32."""
    if other.dtype != torch.float32 and other.is_cuda:
        torch.addmm(into, g, other, out_dtype=torch.float32, alpha=1 / gain, out=into)
    elif precision == "tf32x3" and other.dtype == torch.float32:
        shape = _shape("matmul", other, precision)
        (m, k), n = g.shape, other.shape[1]
        grid = (triton.cdiv(m, shape.rows) * triton.cdiv(n, shape.columns),)
        ops.matmul_kernel[grid](g, other, into, m, n, k, g.stride(0), g.stride(1), 1, PREC="tf32x3", **_launch(shape))
    else:
        into.addmm_(g.to(torch.float32), other.to(torch.float32), alpha=1 / gain)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors say."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def _shape(kernel: Kernel, x: Tensor, precision: Precision) -> Config:
    if _interpreted():
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(x.device)
    return config(kernel, precision if x.dtype == torch.float32 else "fp16", 10 * major + minor)


def _launch(shape: Config) -> dict[str, int]:
    return {
        "BM": shape.rows,
        "BN": shape.columns,
        "BD": shape.depth,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }


def _dot_precision(x: Tensor, precision: Precision) -> str:
    # Of no effect on half-precision operands; named so that one kernel text serves all.
    return "tf32x3" if x.dtype == torch.float32 and precision == "tf32x3" else "ieee"
