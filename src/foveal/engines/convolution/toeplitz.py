"""Depthwise convolution on matrix units, channels first: rows of x times banded Toeplitz matrices.

For one channel and one row t of taps, [rows, columns of x] @ T_t gives what that row of taps adds to
rows of y, with T_t[i, j] = filter[t, i - j + shift] inside the band and 0 elsewhere.  A program holds
M x GROUP rows of y: row g of a group meets an input row with tap t - g, so one tile of x is multiplied
with GROUP matrices side by side.  A grid of at most IN columns is taken whole (TILES = 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = [
    *("batch", "size_z", "size_y", "out_z", "out_y", "out_x", "pad_z", "pad_y", "taps_z", "taps_y"),
    *("taps_x", "shift"),
]


@triton.jit(do_not_specialize=_SIZES)
def convolution_bands_forward(
    p_filter, p_band, taps_y, taps_x, shift,
    EDGE: tl.constexpr, TILES: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """band [C, taps_z, taps_y + 2 EDGE, TILES, IN, OUT] of a filter [C, taps_z, taps_y, taps_x].

    EDGE rows of zeros stand before and after the rows of taps.
    """
    program = tl.program_id(0).to(tl.int64)
    t = (program % (taps_y + 2 * EDGE)).to(tl.int32) - EDGE
    plane = program // (taps_y + 2 * EDGE)
    i = tl.arange(0, IN)[:, None]
    j = tl.arange(0, OUT)[None, :]
    count = tl.where((t >= 0) & (t < taps_y), taps_x, 0)
    for q in tl.static_range(TILES):
        tap = q * IN + i - j + shift
        there = (tap >= 0) & (tap < count)
        x = tl.load(p_filter + (plane * taps_y + t) * taps_x + tap, mask=there, other=0.0)
        tl.store(p_band + ((program * TILES + q) * IN + i) * OUT + j, x)


@triton.jit(do_not_specialize=_SIZES)
def convolution_toeplitz_forward(
    p_x, p_band, p_bias, p_y, batch,
    x_stride_b, x_stride_c, x_stride_z, y_stride_b, y_stride_c, y_stride_z,
    size_z, size_y, out_z, out_y, out_x, pad_z, pad_y, taps_z, taps_y,
    SIZE_X: tl.constexpr, LEAD: tl.constexpr, X_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one channel, M groups of rows and OUT columns; rows are X_STRIDE and Y_STRIDE apart."""
    groups = tl.cdiv(out_y, GROUP)
    tiles = tl.cdiv(groups * out_z * batch, M)
    program = tl.program_id(0)
    begin = (program % tiles) * M
    m = begin + tl.arange(0, M)
    rest = program // tiles
    left = (rest % tl.cdiv(out_x, OUT)) * OUT
    c = (rest // tl.cdiv(out_x, OUT)).to(tl.int64)
    b = (m % batch).to(tl.int64)
    z = (m // batch) % out_z
    group = m // (batch * out_z)
    real = group < groups
    n = tl.arange(0, GROUP * OUT)
    i = tl.arange(0, IN)

    first = begin // (batch * out_z)
    last = tl.minimum((begin + M - 1) // (batch * out_z), groups - 1)
    rows = taps_y + GROUP - 1
    low = tl.maximum(pad_y - last * GROUP, 0)
    high = tl.minimum(size_y + pad_y - first * GROUP, rows)
    high = tl.maximum(high, low)
    bias = 0.0
    if p_bias is not None:
        bias = tl.load(p_bias + c).to(tl.float32)
    acc = tl.zeros([M, GROUP * OUT], tl.float32) + bias
    p_x += c * x_stride_c
    p_rows = p_x + b * x_stride_b + (z - pad_z) * x_stride_z + (group * GROUP - pad_y) * X_STRIDE
    p_band += (c * taps_z * (rows + GROUP - 1) + GROUP - 1) * (TILES * IN * OUT)
    p_band += i[:, None] * OUT + (n % OUT)[None, :] - (n // OUT)[None, :] * (TILES * IN * OUT)
    each = (high - low) * TILES
    for step in range(taps_z * each):
        oz = step // tl.maximum(each, 1)
        rest = step % tl.maximum(each, 1) + low * TILES
        t = rest // TILES
        row = group * GROUP + t - pad_y
        plane = z + oz - pad_z
        column = left - LEAD + (rest % TILES) * IN + i
        there = real & (row >= 0) & (row < size_y) & (plane >= 0) & (plane < size_z)
        x = tl.load(
            p_rows[:, None] + oz * x_stride_z + t * X_STRIDE + column[None, :],
            mask=there[:, None] & ((column >= 0) & (column < SIZE_X))[None, :],
            other=0.0,
        )
        band = tl.load(p_band + oz * ((rows + GROUP - 1) * TILES * IN * OUT) + rest * (IN * OUT))
        acc = tl.dot(x, band, acc, input_precision=PRECISION)
    row = group[:, None] * GROUP + (n // OUT)[None, :]
    column = left + n % OUT
    p_y += b[:, None] * y_stride_b + c * y_stride_c + z[:, None] * y_stride_z
    there = (row < out_y) & (column < out_x)[None, :] & real[:, None]
    tl.store(p_y + row * Y_STRIDE + column[None, :], acc.to(p_y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_SIZES)
def convolution_products_backward(
    p_x, p_dy, p_products, batch,
    x_stride_b, x_stride_c, x_stride_z, y_stride_b, y_stride_c, y_stride_z,
    size_z, size_y, out_z, out_y, out_x, pad_z, pad_y, taps_z, taps_y,
    SIZE_X: tl.constexpr, OUT_X: tl.constexpr, LEAD: tl.constexpr,
    X_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """products [C, taps_z, taps_y, TILES, IN, OUT]: sums over rows of x[row + t, i] dy[row, j].

    One program for a channel, a plane of taps, a tile of columns of x and GROUP rows of taps.
    """
    groups = tl.cdiv(taps_y, GROUP)
    program = tl.program_id(0)
    first = (program % groups) * GROUP
    rest = program // groups
    q = rest % TILES
    rest = rest // TILES
    oz = rest % taps_z
    c = (rest // taps_z).to(tl.int64)
    n = tl.arange(0, GROUP * OUT)
    i = tl.arange(0, IN)
    acc = tl.zeros([IN, GROUP * OUT], tl.float32)
    p_x += c * x_stride_c
    p_dy += c * y_stride_c
    lines = batch * out_z * size_y
    tiles = tl.cdiv(lines, M)
    for step in range(tiles * tl.cdiv(out_x, OUT)):
        left = (step // tiles) * OUT
        m = (step % tiles) * M + tl.arange(0, M)
        row = m % size_y
        z = (m // size_y) % out_z
        b = (m // (size_y * out_z)).to(tl.int64)
        plane = z + oz - pad_z
        column = left - LEAD + q * IN + i
        there = (m < lines) & (plane >= 0) & (plane < size_z)
        x = tl.load(
            p_x + (b * x_stride_b + plane * x_stride_z + row * X_STRIDE)[:, None] + column[None, :],
            mask=there[:, None] & ((column >= 0) & (column < SIZE_X))[None, :],
            other=0.0,
        )
        below = row[:, None] + pad_y - first - (n // OUT)[None, :]
        column = left + n % OUT
        p_row = p_dy + (b * y_stride_b + z * y_stride_z)[:, None] + below * Y_STRIDE
        kept = there[:, None] & (below >= 0) & (below < out_y) & (column < OUT_X)[None, :]
        dy = tl.load(p_row + column[None, :], mask=kept, other=0.0)
        acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)
    t = first + n // OUT
    place = (((c * taps_z + oz) * taps_y + t[None, :]) * TILES + q) * IN + i[:, None]
    tl.store(p_products + place * OUT + (n % OUT)[None, :], acc, mask=(t < taps_y)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def convolution_diagonals_backward(
    p_products, p_filter, taps_x, shift,
    TILES: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """filter [rows of taps, taps_x]: sums along the diagonals of products [rows, TILES, IN, OUT]."""
    program = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TAPS + tl.arange(0, TAPS)
    j = tl.arange(0, OUT)[None, :]
    i = k[:, None] + j - shift
    there = (k < taps_x)[:, None] & (i >= 0) & (i < TILES * IN)
    found = tl.load(p_products + (program * TILES * IN + i) * OUT + j, mask=there, other=0.0)
    tl.store(p_filter + program * taps_x + k, tl.sum(found, 1), mask=k < taps_x)
