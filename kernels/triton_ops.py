"""Triton kernels of the contrastive loss; launched by ``lcl_kernels.triton_engine`` only.

Written for a block of rows X [M, D] against columns Y [K, D], both contiguous, of one dtype (fp16, bf16 or fp32).
With TMA, X, Y and G are tensor descriptors, whose loads and stores one thread issues; otherwise pointers.
Products accumulate in fp32. No kernel uses atomics: every output element is stored by exactly one program, so
results are bitwise repeatable. Programs read and write only what lies inside M and K; sizes need not be
multiples of anything.

Logits are kept in units of log 2 (``scale * log2(e)``), because the hardware exponential is exp2.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile_product(
    X,
    Y,
    pm,
    pk,
    M,
    K,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PREC: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BM, BN] fp32 products of row tile pm and column tile pk; rows and columns outside are zero."""
    acc = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for d0 in tl.range(0, D, BD):
            acc = tl.dot(X.load([pm * BM, d0]), Y.load([pk * BN, d0]).T, acc, input_precision=PREC)
    else:
        rm = pm * BM + tl.arange(0, BM)
        rk = pk * BN + tl.arange(0, BN)
        x_rows = X + rm[:, None].to(tl.int64) * D
        y_rows = Y + rk[None, :].to(tl.int64) * D
        for d0 in tl.range(0, D, BD):
            rd = d0 + tl.arange(0, BD)
            if D % BD == 0:
                a = tl.load(x_rows + rd[None, :], mask=rm[:, None] < M, other=0.0)
                b = tl.load(y_rows + rd[:, None], mask=rk[None, :] < K, other=0.0)
            else:
                a = tl.load(x_rows + rd[None, :], mask=(rm[:, None] < M) & (rd[None, :] < D), other=0.0)
                b = tl.load(y_rows + rd[:, None], mask=(rk[None, :] < K) & (rd[:, None] < D), other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PREC)
    return acc


@triton.jit
def _mixed(XRange, YRange, pm, pk):
    """False if all pairs of a tile exist and are negatives: the key ranges of its rows and columns do not meet."""
    x_low, x_high = tl.load(XRange + 2 * pm), tl.load(XRange + 2 * pm + 1)
    y_low, y_high = tl.load(YRange + 2 * pk), tl.load(YRange + 2 * pk + 1)
    return (x_low <= y_high) & (y_low <= x_high)


@triton.jit
def _negatives(XKey, YKey, rm, rk, M, K):
    """[BM, BN] True where the pair exists and is a negative: keys differ."""
    kx = tl.load(XKey + rm, mask=rm < M, other=0)
    ky = tl.load(YKey + rk, mask=rk < K, other=0)
    return (kx[:, None] != ky[None, :]) & (rm[:, None] < M) & (rk[None, :] < K)


@triton.jit
def sums_kernel(
    X,
    Y,
    XKey,
    YKey,
    XRange,  # [row tiles, 2] least and largest key
    YRange,  # [column tiles, 2]
    RowPart,  # [splits, M] fp32
    ColPart,  # [row tiles, K] fp32, only with COLS
    Scale,
    Shift,
    M,
    K,
    tiles_per_split,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PREC: tl.constexpr,
    TMA: tl.constexpr,
    COLS: tl.constexpr,
):
    """Partial sums of exp(S - shift) over negatives, rows and columns from one exponential per logit.

    Grid (row tiles, column splits). A common shift for the whole block is what lets rows and columns share
    the exponential; the launcher chooses it and checks the sums afterwards.
    """
    pm = tl.program_id(0)
    split = tl.program_id(1)
    scale = tl.load(Scale) * LOG2E
    shift = tl.load(Shift) * LOG2E
    rm = pm * BM + tl.arange(0, BM)
    row_sum = tl.zeros((BM,), tl.float32)
    first = split * tiles_per_split
    # One loop with that of the product, so that the next tile's loads run during this tile's exponentials.
    for t in tl.range(first, min(first + tiles_per_split, tl.cdiv(K, BN)), flatten=TMA):
        e = tl.math.exp2(_tile_product(X, Y, pm, t, M, K, D, BM, BN, BD, PREC, TMA) * scale - shift)
        rk = t * BN + tl.arange(0, BN)
        if _mixed(XRange, YRange, pm, t):
            e = tl.where(_negatives(XKey, YKey, rm, rk, M, K), e, 0.0)
        row_sum += tl.sum(e, 1)
        if COLS:
            tl.store(ColPart + pm.to(tl.int64) * K + rk, tl.sum(e, 0), mask=rk < K)
    tl.store(RowPart + split.to(tl.int64) * M + rm, row_sum, mask=rm < M)


@triton.jit
def fallback_lse_kernel(
    X,
    Y,
    XKey,
    YKey,
    RowPart,  # [splits, M] fp32: here log-sum-exps
    ColPart,  # [row tiles, K] fp32: here log-sum-exps
    Scale,
    Flag,
    M,
    K,
    tiles_per_split,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PREC: tl.constexpr,
    TMA: tl.constexpr,
    COLS: tl.constexpr,
):
    """Like ``sums_kernel`` with a maximum per row and per column; does nothing unless Flag is set.

    Always launched, so that the host never has to read the flag.
    """
    if tl.load(Flag) != 0:
        pm = tl.program_id(0)
        split = tl.program_id(1)
        scale = tl.load(Scale) * LOG2E
        rm = pm * BM + tl.arange(0, BM)
        peak = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        first = split * tiles_per_split
        for t in tl.range(first, min(first + tiles_per_split, tl.cdiv(K, BN))):
            rk = t * BN + tl.arange(0, BN)
            z = _tile_product(X, Y, pm, t, M, K, D, BM, BN, BD, PREC, TMA) * scale
            z = tl.where(_negatives(XKey, YKey, rm, rk, M, K), z, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(z, 1))
            # A finite stand-in where nothing was seen yet: -inf - -inf would be NaN.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.math.exp2(peak - base) + tl.sum(tl.math.exp2(z - base[:, None]), 1)
            peak = new_peak
            if COLS:
                col_peak = tl.max(z, 0)
                col_base = tl.where(col_peak == float("-inf"), 0.0, col_peak)
                col_total = tl.sum(tl.math.exp2(z - col_base[None, :]), 0)
                col_lse = (col_base + tl.math.log2(col_total)) * LN2
                tl.store(ColPart + pm.to(tl.int64) * K + rk, col_lse, mask=rk < K)
        row_base = tl.where(peak == float("-inf"), 0.0, peak)
        row_lse = (row_base + tl.math.log2(total)) * LN2
        tl.store(RowPart + split.to(tl.int64) * M + rm, row_lse, mask=rm < M)


@triton.jit
def merge_kernel(Part, Out, Flag, parts, length, B: tl.constexpr, KEEP: tl.constexpr):
    """Out[i] = log-sum-exp over Part[:, i] (and Out[i] itself with KEEP), if Flag is set.

    Grid: blocks of B elements.
    """
    if tl.load(Flag) != 0:
        i = tl.program_id(0) * B + tl.arange(0, B)
        inside = i < length
        peak = tl.full((B,), float("-inf"), tl.float32)
        if KEEP:
            peak = tl.load(Out + i, mask=inside, other=float("-inf")) * LOG2E
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
        values = Part + i
        for _ in tl.range(0, parts):
            value = tl.load(values, mask=inside, other=float("-inf")) * LOG2E
            values += length
            new_peak = tl.maximum(peak, value)
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.math.exp2(peak - base) + tl.math.exp2(value - base)
            peak = new_peak
        base = tl.where(peak == float("-inf"), 0.0, peak)
        tl.store(Out + i, (base + tl.math.log2(total)) * LN2, mask=inside)


@triton.jit
def gradient_kernel(
    X,
    Y,
    XKey,
    YKey,
    XRange,
    YRange,
    G,  # [M, ldg], ldg a multiple of 16
    Row,
    Col,
    Scale,
    Shift,
    Flag,
    M,
    K,
    ldg,
    gain,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
    PREC: tl.constexpr,
    TMA: tl.constexpr,
):
    """G = gain * (exp(S - Row) + exp(S - Col)) for negatives, else 0.

    With Flag clear, both terms share one exponential: exp(S - shift) * (exp(shift - Row) + exp(shift -
    Col)). With Flag set the factors could leave fp32's range and each term is formed by itself.
    Any number of programs; each takes every num_programs-th tile.
    """
    scale = tl.load(Scale) * LOG2E
    shift = tl.load(Shift) * LOG2E
    separate = tl.load(Flag) != 0
    row_tiles = tl.cdiv(M, BM)
    column_tiles = tl.cdiv(K, BN)
    # GROUP row tiles run next to each other, so that the column tiles they share stay in L2.
    per_group = GROUP * column_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=TMA):
        first = (tile // per_group) * GROUP
        width = min(row_tiles - first, GROUP)
        pm = first + (tile % per_group) % width
        pk = (tile % per_group) // width
        z = _tile_product(X, Y, pm, pk, M, K, D, BM, BN, BD, PREC, TMA) * scale
        rm = pm * BM + tl.arange(0, BM)
        rk = pk * BN + tl.arange(0, BN)
        row = tl.load(Row + rm, mask=rm < M, other=float("inf")) * LOG2E
        col = tl.load(Col + rk, mask=rk < K, other=float("inf")) * LOG2E
        if separate:
            g = (tl.math.exp2(z - row[:, None]) + tl.math.exp2(z - col[None, :])) * gain
        else:
            g = tl.math.exp2(z - shift) * (
                (gain * tl.math.exp2(shift - row))[:, None] + (gain * tl.math.exp2(shift - col))[None, :]
            )
        if _mixed(XRange, YRange, pm, pk):
            g = tl.where(_negatives(XKey, YKey, rm, rk, M, K), g, 0.0)
        if TMA:
            G.store([pm * BM, pk * BN], g.to(G.dtype))
        else:
            # The mask is that of the padded row, whose length the compiler knows to be whole 16-byte stores.
            out = G + rm[:, None].to(tl.int64) * ldg + rk[None, :]
            tl.store(out, g.to(G.dtype.element_ty), mask=(rm[:, None] < M) & (rk[None, :] < ldg))


@triton.jit
def matmul_kernel(
    A, B, C, M, N, K, a_row, a_col, accumulate, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr
):
    """C [M, N] = A [M, K] @ B [K, N] (+ C if accumulate); A has any strides, B and C are contiguous fp32.

    Exists for ``tf32x3``, which no library call offers; fp16 and fp32 products go to cuBLAS.
    """
    column_tiles = tl.cdiv(N, BN)
    rm = (tl.program_id(0) // column_tiles) * BM + tl.arange(0, BM)
    rn = (tl.program_id(0) % column_tiles) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BD):
        rk = k0 + tl.arange(0, BD)
        a_ptr = A + rm[:, None].to(tl.int64) * a_row + rk[None, :].to(tl.int64) * a_col
        a = tl.load(a_ptr, mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0)
        b_ptr = B + rk[:, None].to(tl.int64) * N + rn[None, :]
        b = tl.load(b_ptr, mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PREC)
    out = C + rm[:, None].to(tl.int64) * N + rn[None, :]
    inside = (rm[:, None] < M) & (rn[None, :] < N)
    if accumulate != 0:
        acc += tl.load(out, mask=inside, other=0.0)
    tl.store(out, acc, mask=inside)
