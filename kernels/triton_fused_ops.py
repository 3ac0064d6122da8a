"""Triton kernels of the element-wise work between a transformer's matrix products; launched by
``lcl_kernels.triton_fused`` only.

Matrices are contiguous, [rows, width]; arithmetic is fp32, whatever the dtype of tensors. No kernel uses atomics:
sums over rows are partial sums of a fixed number of programs, added in a fixed order by ``reduce`` kernels, so
results are bitwise repeatable. Flags in capitals say which optional parts a call has; absent tensors are any pointer.

Dropout's mask is ``lcl_kernels.residual.drawn_keep``: 16 bits from splitmix64 (Steele, Lea and Flood, OOPSLA 2014) at a
counter of row and column, compared as integers. Backward draws it again.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def _mix(x):
    """The splitmix64 finaliser on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _kept(
    RowScale, RowKeys, row, column, row_tokens, threshold, factor, ROW_SCALE: tl.constexpr, DROPOUT: tl.constexpr
):
    """What the branch is multiplied by: 0 where it is dropped."""
    scale = 1.0
    if ROW_SCALE:
        scale = tl.load(RowScale + row // row_tokens)
    if DROPOUT:
        # Four neighbours share one draw. They lie in one thread, which draws once for them.
        draws = _mix(tl.load(RowKeys + row).to(tl.uint64) + (column // 4 + 1).to(tl.uint64) * GOLDEN)
        bits = ((draws >> (column % 4 * 16).to(tl.uint64)) & 0xFFFF).to(tl.int32)
        scale = tl.where(bits >= threshold, factor * scale, 0.0)
    return scale


@triton.jit(do_not_specialize=["rows", "row_tokens", "threshold"])
def residual_forward_kernel(
    Branch,
    Bias,
    Gain,
    Residual,
    NormWeight,
    NormBias,
    RowScale,  # [row groups] fp32
    RowKeys,  # [rows] int64
    Hidden,
    Normed,
    Mean,
    Rstd,
    rows,
    row_tokens,
    threshold,
    factor,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    GAIN: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    NORM: tl.constexpr,
):
    """Hidden = Residual + mask * Gain * (Branch + Bias); Normed = LayerNorm(Hidden). Grid: ROWS rows each."""
    column = tl.arange(0, BLOCK)
    inside = column < H
    if BIAS:
        bias = tl.load(Bias + column, mask=inside, other=0.0).to(tl.float32)
    if GAIN:
        gain = tl.load(Gain + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        weight = tl.load(NormWeight + column, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(NormBias + column, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0) * ROWS
    for step in tl.range(0, min(ROWS, rows - first)):
        row = first + step
        place = row.to(tl.int64) * H + column
        x = tl.load(Branch + place, mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(Residual + place, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            x += bias
        if GAIN:
            x *= gain
        if ROW_SCALE or DROPOUT:
            x *= _kept(RowScale, RowKeys, row, column, row_tokens, threshold, factor, ROW_SCALE, DROPOUT)
        hidden = (x + residual).to(Hidden.dtype.element_ty)
        tl.store(Hidden + place, hidden, mask=inside)
        if NORM:
            x = hidden.to(tl.float32)  # as stored: backward has nothing else
            mean = tl.sum(x) / H
            centred = tl.where(inside, x - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred) / H + eps)
            normed = centred * rstd * weight + shift
            tl.store(Normed + place, normed.to(Normed.dtype.element_ty), mask=inside)
            tl.store(Mean + row, mean)
            tl.store(Rstd + row, rstd)


@triton.jit(do_not_specialize=["rows", "per_program", "row_tokens", "threshold"])
def residual_backward_kernel(
    GradHidden,
    GradNormed,
    Hidden,
    Mean,
    Rstd,
    Branch,
    Gain,
    NormWeight,
    RowScale,  # [row groups] fp32
    RowKeys,  # [rows] int64
    GradResidual,
    GradBranch,
    Parts,  # [programs, sums, H] fp32: sums of g, of g * branch (GAIN), of dy * x^ and of dy (NORM)
    rows,
    per_program,
    row_tokens,
    threshold,
    factor,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    GAIN: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    NORM: tl.constexpr,
):
    """Gradients of both inputs, and this program's partial sums of the parameters' gradients.

    With g the gradient of Gain * (Branch + Bias): dBias = Gain * sum g, dGain = sum g * Branch + Bias * sum g.
    GradResidual is written with NORM (else it equals GradHidden), GradBranch with GAIN or a mask (else it equals
    GradResidual). Grid: per_program rows each.
    """
    column = tl.arange(0, BLOCK)
    inside = column < H
    if GAIN:
        gain = tl.load(Gain + column, mask=inside, other=0.0).to(tl.float32)
        sum_gain = tl.zeros((BLOCK,), tl.float32)
    if NORM:
        weight = tl.load(NormWeight + column, mask=inside, other=0.0).to(tl.float32)
        sum_weight = tl.zeros((BLOCK,), tl.float32)
        sum_shift = tl.zeros((BLOCK,), tl.float32)
    if BIAS or GAIN:
        sum_bias = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0) * per_program
    for step in tl.range(0, min(per_program, rows - first)):
        row = first + step
        place = row.to(tl.int64) * H + column
        g = tl.load(GradHidden + place, mask=inside, other=0.0).to(tl.float32)
        if GAIN:
            branch = tl.load(Branch + place, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            dy = tl.load(GradNormed + place, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(Hidden + place, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(Rstd + row)
            x = (x - tl.load(Mean + row)) * rstd
            scaled = dy * weight  # zero outside, as dy is
            g += (scaled - x * (tl.sum(scaled * x) / H) - tl.sum(scaled) / H) * rstd
            sum_weight += dy * x
            sum_shift += dy
            tl.store(GradResidual + place, g.to(GradResidual.dtype.element_ty), mask=inside)
        if ROW_SCALE or DROPOUT:
            g *= _kept(RowScale, RowKeys, row, column, row_tokens, threshold, factor, ROW_SCALE, DROPOUT)
        if BIAS or GAIN:
            sum_bias += g
        if GAIN:
            sum_gain += g * branch
            g *= gain
        if GAIN or ROW_SCALE or DROPOUT:
            tl.store(GradBranch + place, g.to(GradBranch.dtype.element_ty), mask=inside)
    parts = Parts + tl.program_id(0).to(tl.int64) * ((BIAS or GAIN) + GAIN + 2 * NORM) * H + column
    if BIAS or GAIN:
        tl.store(parts, sum_bias, mask=inside)
        parts += H
    if GAIN:
        tl.store(parts, sum_gain, mask=inside)
        parts += H
    if NORM:
        tl.store(parts, sum_weight, mask=inside)
        tl.store(parts + H, sum_shift, mask=inside)


@triton.jit
def _column_sum(Parts, column, inside, programs, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[COLUMNS] sums over the first axis of [programs, stride] at these columns."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(Parts + row * stride + column[None, :], mask=(row < programs) & inside[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["programs"])
def residual_reduce_kernel(
    Parts,
    Bias,
    Gain,
    GradBias,
    GradGain,
    GradNormWeight,
    GradNormBias,
    programs,
    H: tl.constexpr,
    BIAS: tl.constexpr,
    GAIN: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Parameter gradients from the partial sums. Grid: (blocks of columns, 3): bias and gain, norm gain, norm bias."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < H
    which = tl.program_id(1)
    before: tl.constexpr = (BIAS or GAIN) + GAIN
    stride: tl.constexpr = (before + 2 * NORM) * H
    if which == 0:
        if BIAS or GAIN:
            total = _column_sum(Parts, column, inside, programs, stride, ROWS, COLUMNS)
            if GAIN:
                gain = _column_sum(Parts + H, column, inside, programs, stride, ROWS, COLUMNS)
                if BIAS:
                    gain += tl.load(Bias + column, mask=inside, other=0.0).to(tl.float32) * total
                tl.store(GradGain + column, gain.to(GradGain.dtype.element_ty), mask=inside)
                total *= tl.load(Gain + column, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                tl.store(GradBias + column, total.to(GradBias.dtype.element_ty), mask=inside)
    elif NORM:
        total = _column_sum(Parts + (before + which - 1) * H, column, inside, programs, stride, ROWS, COLUMNS)
        if which == 1:
            tl.store(GradNormWeight + column, total.to(GradNormWeight.dtype.element_ty), mask=inside)
        else:
            tl.store(GradNormBias + column, total.to(GradNormBias.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def activation_forward_kernel(
    X, Bias, Y, rows, F: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr
):
    """Y = activation(X + Bias): exact GELU or ReLU. Grid: (groups of ROWS rows, blocks of columns)."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    if BIAS:
        bias = tl.load(Bias + column, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0) * ROWS
    for step in tl.range(0, min(ROWS, rows - first)):
        row = first + step
        place = row.to(tl.int64) * F + column
        x = tl.load(X + place, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            x += bias
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476)) if GELU else tl.maximum(x, 0.0)
        tl.store(Y + place, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "per_program"])
def activation_backward_kernel(
    GradY,
    Saved,  # X for GELU, Y for ReLU
    Bias,
    GradX,
    Parts,  # [programs, F] fp32
    rows,
    per_program,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
):
    """GradX, and partial sums of it over rows for the bias. Grid: (programs of per_program rows, blocks of columns)."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    if BIAS:
        bias = tl.load(Bias + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0) * per_program
    for step in tl.range(0, min(per_program, rows - first)):
        row = first + step
        place = row.to(tl.int64) * F + column
        g = tl.load(GradY + place, mask=inside, other=0.0).to(tl.float32)
        saved = tl.load(Saved + place, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            if BIAS:
                saved += bias
            density = 0.3989422804014327 * tl.math.exp2(saved * saved * (-0.5 * LOG2E))
            g *= 0.5 * (1.0 + tl.erf(saved * 0.7071067811865476)) + saved * density
        else:
            g = tl.where(saved > 0.0, g, 0.0)
        tl.store(GradX + place, g.to(GradX.dtype.element_ty), mask=inside)
        if BIAS:
            total += g
    if BIAS:
        tl.store(Parts + tl.program_id(0).to(tl.int64) * F + column, total, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def activation_reduce_kernel(Parts, GradBias, programs, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bias's gradient from the partial sums. Grid: blocks of columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < F
    total = _column_sum(Parts, column, inside, programs, F, ROWS, COLUMNS)
    tl.store(GradBias + column, total.to(GradBias.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["vocab_start", "valid"])
def vocabulary_kernel(
    Logits,  # [rows, V]; with GRADIENT overwritten by dloss/dlogits
    Bias,
    Labels,
    Factors,  # [rows] fp32: a_i, 0 for ignored rows
    Lse,  # [rows] fp32: written with SUM, else read
    Target,  # [rows] fp32: written with SUM: the label's logit, 0 if it is not in this shard
    vocab_start,
    valid,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    SUM: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Log-sum-exp of a row of logits and its gradient a * (softmax - onehot). Grid: one row each.

    With both flags the row is read again while it is still in the L2 cache.
    """
    row = tl.program_id(0)
    logits = Logits + row.to(tl.int64) * V
    label = tl.load(Labels + row) - vocab_start
    here = (label >= 0) & (label < valid)
    if SUM:
        target = tl.load(logits + label, mask=here, other=0.0).to(tl.float32)
        if BIAS:
            target += tl.load(Bias + label, mask=here, other=0.0).to(tl.float32)
        tl.store(Target + row, target)
        # A maximum and a sum per lane: lanes meet once, at the end. Finite, as -inf - -inf is not a number.
        peak = tl.full((BLOCK,), -1e30, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, valid, BLOCK):
            column = start + tl.arange(0, BLOCK)
            # Padding is read, too: a bound known when compiling is what lets 16 bytes be read at a time.
            z = tl.load(logits + column, mask=column < V, other=0.0).to(tl.float32)
            if BIAS:
                z += tl.load(Bias + column, mask=column < V, other=0.0).to(tl.float32)
            z = tl.where(column < valid, z * LOG2E, float("-inf"))
            new_peak = tl.maximum(peak, z)
            total = total * tl.math.exp2(peak - new_peak) + tl.math.exp2(z - new_peak)
            peak = new_peak
        highest = tl.max(peak)
        lse = (highest + tl.math.log2(tl.sum(total * tl.math.exp2(peak - highest)))) * LN2
        lse = tl.where(valid > 0, lse, float("-inf"))  # a shard of padding alone
        tl.store(Lse + row, lse)
    else:
        lse = tl.load(Lse + row)
    if GRADIENT:
        factor = tl.load(Factors + row)
        for start in tl.range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits + column, mask=column < V, other=0.0).to(tl.float32)
            if BIAS:
                z += tl.load(Bias + column, mask=column < V, other=0.0).to(tl.float32)
            g = tl.math.exp2((z - lse) * LOG2E) - tl.where(column == label, 1.0, 0.0)
            g = tl.where(column < valid, tl.where(factor == 0.0, 0.0, g * factor), 0.0)
            tl.store(logits + column, g.to(Logits.dtype.element_ty), mask=column < V)
