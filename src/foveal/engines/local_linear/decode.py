"""A few queries against many keys: one pass over the keys in parts, an exact merge, one system per query.

The sums of a part, w, w k, w v, w k k^T and w k v^T, add up to those of all keys once their weights count
from the same largest score.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.tiles import load_rows

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rooted(x, roots):
    """Rows times the roots of their weights: products of two such matrices are symmetric as computed."""
    return (roots[:, None] * x.to(tl.float32)).to(x.dtype)


@triton.jit
def _lines(w, x, APART: tl.constexpr):
    """Weighted rows of x, added up to APART lines that no two threads share."""
    KEYS: tl.constexpr = x.shape[0]
    weighted = w[:, None] * x.to(tl.float32)
    return tl.sum(tl.reshape(weighted, (KEYS // APART, APART, x.shape[1])), 0)


@triton.jit
def local_linear_decode(
    p_q, p_k, p_v, p_lower, p_upper, p_sums, p_matrices,
    q_strides, k_strides, v_strides, heads, groups, Lq, splits, unit,
    D: tl.constexpr, PAD: tl.constexpr, DV: tl.constexpr, VALUE_PAD: tl.constexpr,
    KEYS: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of one query over one part of the keys that it sees, lower <= j < upper.

    Tensors by strides (batch, token, head).  sums float32 [programs, 2 + PAD + VALUE_PAD]: largest score in
    base 2, sum of weights, of keys, of values; matrices float32 [programs, PAD, PAD + VALUE_PAD].
    """
    program = tl.program_id(0)
    split = program % splits
    row = program // splits
    i_q = row % Lq
    h = row // Lq % heads
    n = (row // Lq // heads).to(tl.int64)
    lower = tl.load(p_lower + i_q)
    upper = tl.load(p_upper + i_q)
    boxes = tl.cdiv(tl.maximum(upper - lower, 0), KEYS)
    own = tl.cdiv(boxes, splits)
    start = lower + split * own * KEYS
    stop = tl.minimum(start + own * KEYS, upper)

    column = tl.arange(0, PAD)
    p_row = p_q + n * q_strides[0] + i_q.to(tl.int64) * q_strides[1] + h.to(tl.int64) * q_strides[2]
    q = tl.load(p_row + column, mask=column < D, other=0.0).to(tl.float32) * unit
    kv_h = (h // groups).to(tl.int64)
    p_keys = p_k + n * k_strides[0] + kv_h * k_strides[2]
    p_values = p_v + n * v_strides[0] + kv_h * v_strides[2]
    largest = tl.full([], float("-inf"), tl.float32)
    weights = tl.zeros([KEYS], tl.float32)
    key_sum = tl.zeros([APART, PAD], tl.float32)
    value_sum = tl.zeros([APART, VALUE_PAD], tl.float32)
    second = tl.zeros([PAD, PAD], tl.float32)
    cross = tl.zeros([PAD, VALUE_PAD], tl.float32)
    for first in range(start, stop, KEYS):
        j = first + tl.arange(0, KEYS)
        inside = j < stop
        k = load_rows(p_keys + j.to(tl.int64) * k_strides[1], inside, D, PAD, True)
        v = load_rows(p_values + j.to(tl.int64) * v_strides[1], inside, DV, VALUE_PAD, True)
        s = tl.sum(k.to(tl.float32) * q[None, :], 1)
        s = tl.where(inside, s, float("-inf"))
        found = tl.maximum(largest, tl.max(s, 0))
        base = tl.where(found == float("-inf"), 0.0, found)
        w = tl.exp2(s - base)
        factor = tl.exp2(largest - base)
        largest = found
        weights = weights * factor + w
        key_sum = key_sum * factor + _lines(w, k, APART)
        value_sum = value_sum * factor + _lines(w, v, APART)
        roots = tl.sqrt(w)
        side = _rooted(k, roots)
        turned = tl.trans(side)
        second = tl.dot(turned, side, second * factor, input_precision=PRECISION)
        cross = tl.dot(turned, _rooted(v, roots), cross * factor, input_precision=PRECISION)
    p_sum = p_sums + program.to(tl.int64) * (2 + PAD + VALUE_PAD)
    tl.store(p_sum, largest)
    tl.store(p_sum + 1, tl.sum(weights, 0))
    tl.store(p_sum + 2 + column, tl.sum(key_sum, 0))
    value_column = tl.arange(0, VALUE_PAD)
    tl.store(p_sum + 2 + PAD + value_column, tl.sum(value_sum, 0))
    p_matrix = p_matrices + program.to(tl.int64) * PAD * (PAD + VALUE_PAD)
    p_line = p_matrix + column[:, None] * (PAD + VALUE_PAD)
    tl.store(p_line + column[None, :], second)
    tl.store(p_line + PAD + value_column[None, :], cross)


@triton.jit
def _shares(p_part, there):
    """Of every part, the factor that makes its sums means; base-2 lse."""
    largest = tl.load(p_part, mask=there, other=float("-inf"))
    total = tl.load(p_part + 1, mask=there, other=0.0)
    most = tl.max(largest, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    factor = tl.exp2(largest - base)
    whole = tl.sum(factor * total, 0)
    share = factor / tl.where(whole == 0.0, 1.0, whole)
    lse = tl.where(whole == 0.0, float("-inf"), base + tl.log2(tl.where(whole == 0.0, 1.0, whole)))
    return share, lse


@triton.jit
def local_linear_decode_merge(
    p_sums, p_matrices, p_means, p_system, splits,
    PAD: tl.constexpr, VALUE_PAD: tl.constexpr, SPLITS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """LINES lines of a query's centred matrices: system float32 [queries, PAD, PAD + VALUE_PAD]; and means
    float32 [queries, 1 + PAD + VALUE_PAD]: base-2 lse, mean key, mean value."""
    WIDTH: tl.constexpr = PAD + VALUE_PAD
    blocks: tl.constexpr = PAD // LINES
    row = tl.program_id(0) // blocks
    line = tl.program_id(0) % blocks * LINES + tl.arange(0, LINES)
    column, value_column = tl.arange(0, PAD), tl.arange(0, VALUE_PAD)
    part = tl.arange(0, SPLITS)
    there = part < splits
    p_part = p_sums + (row * splits + part).to(tl.int64) * (2 + WIDTH)
    p_sum = p_part[:, None] + 2
    # Asked for here, used behind the matrices: their way is long.
    keys = tl.load(p_sum + column[None, :], mask=there[:, None], other=0.0)
    values = tl.load(p_sum + PAD + value_column[None, :], mask=there[:, None], other=0.0)
    share, lse = _shares(p_part, there)
    place = line[:, None].to(tl.int64) * WIDTH
    second = tl.zeros([LINES, PAD], tl.float32)
    cross = tl.zeros([LINES, VALUE_PAD], tl.float32)
    # Not a loop: the loads of all parts are under way at once.
    for part in tl.static_range(SPLITS):
        own = tl.sum(tl.where(tl.arange(0, SPLITS) == part, share, 0.0), 0)
        at = row * splits + tl.minimum(part, splits - 1)
        p_matrix = p_matrices + at.to(tl.int64) * PAD * WIDTH + place
        second += own * tl.load(p_matrix + column[None, :])
        cross += own * tl.load(p_matrix + PAD + value_column[None, :])
    mean = tl.sum(share[:, None] * keys, 0)
    value = tl.sum(share[:, None] * values, 0)
    at_line = tl.sum(tl.where(line[:, None] == column[None, :], mean[None, :], 0.0), 1)
    p_matrix = p_system + row.to(tl.int64) * PAD * WIDTH + place
    tl.store(p_matrix + column[None, :], second - at_line[:, None] * mean[None, :])
    tl.store(p_matrix + PAD + value_column[None, :], cross - at_line[:, None] * value[None, :])
    if tl.program_id(0) % blocks == 0:
        p_mean = p_means + row.to(tl.int64) * (1 + WIDTH)
        tl.store(p_mean, lse)
        tl.store(p_mean + 1 + column, mean)
        tl.store(p_mean + 1 + PAD + value_column, value)


@triton.jit
def local_linear_decode_solve(
    p_q, p_ridge, p_means, p_system, p_o, p_lse, q_strides, o_strides, heads, Lq, most, tolerance,
    D: tl.constexpr, PAD: tl.constexpr, DV: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """o and lse [N, heads, Lq] of one query, by conjugate gradients on chip."""
    WIDTH: tl.constexpr = PAD + VALUE_PAD
    row = tl.program_id(0)
    i_q = (row % Lq).to(tl.int64)
    h = (row // Lq % heads).to(tl.int64)
    n = (row // Lq // heads).to(tl.int64)
    column, value_column = tl.arange(0, PAD), tl.arange(0, VALUE_PAD)
    p_line = p_system + row.to(tl.int64) * PAD * WIDTH + column[:, None] * WIDTH
    system = tl.load(p_line + column[None, :])
    cross = tl.load(p_line + PAD + value_column[None, :])
    p_mean = p_means + row.to(tl.int64) * (1 + WIDTH)
    lse = tl.load(p_mean)
    mean = tl.load(p_mean + 1 + column)
    value = tl.load(p_mean + 1 + PAD + value_column)
    q = tl.load(
        p_q + n * q_strides[0] + i_q * q_strides[1] + h * q_strides[2] + column,
        mask=column < D, other=0.0,
    ).to(tl.float32)  # fmt: skip
    ridge = tl.load(p_ridge + h)
    residual = tl.where(lse - lse == 0.0, mean - q, 0.0)
    r = tl.zeros([PAD], tl.float32)
    d = residual
    size = tl.sum(residual * residual, 0)
    floor = tl.minimum(size, 4.0 * ridge) * tolerance * tolerance
    count = 0
    while (count < most) & (size > floor):
        image = tl.sum(system * d[:, None], 0) + ridge * d
        energy = tl.sum(d * image, 0)
        # Products of tiny numbers may be 0: r stays as it is.
        good = energy > 0.0
        step = tl.where(good, size / tl.where(good, energy, 1.0), 0.0)
        r += step * d
        residual -= step * image
        before = size
        size = tl.sum(residual * residual, 0)
        d = residual + size / before * d
        count = tl.where(good, count + 1, most)
    o = value - tl.sum(cross * r[:, None], 0)
    o = tl.where(lse == lse, o, float("nan"))
    p_row = p_o + n * o_strides[0] + i_q * o_strides[1] + h * o_strides[2] + value_column
    tl.store(p_row, o.to(p_o.dtype.element_ty), mask=value_column < DV)
    tl.store(p_lse + row, lse * LN2)
