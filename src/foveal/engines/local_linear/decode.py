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
def _kept(line, column, SIDE: tl.constexpr):
    """What is written of [line, column]: squares of SIDE lines below the diagonal repeat others."""
    return column[None, :] // SIDE >= line[:, None] // SIDE


@triton.jit
def local_linear_decode(
    p_q, p_k, p_v, p_lower, p_upper, p_sums, p_matrices,
    q_strides, k_strides, v_strides, heads, groups, Lq, splits, unit,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, SIDE: tl.constexpr,
    KEYS: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of one query over one part of the keys that it sees, lower <= j < upper.

    Tensors by strides (batch, token, head).  sums float32 [programs, 2 + 2 PAD]: largest score in base 2,
    sum of weights, of keys, of values; matrices float32 [programs, PAD, 2 PAD], as far as `_kept`.
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
    value_sum = tl.zeros([APART, PAD], tl.float32)
    matrix = tl.zeros([PAD, 2 * PAD], tl.float32)
    for first in range(start, stop, KEYS):
        j = first + tl.arange(0, KEYS)
        inside = j < stop
        k = load_rows(p_keys + j.to(tl.int64) * k_strides[1], inside, D, PAD, True)
        v = load_rows(p_values + j.to(tl.int64) * v_strides[1], inside, DV, PAD, True)
        s = tl.sum(k.to(tl.float32) * q[None, :], 1)
        s = tl.where(inside, s, float("-inf"))
        found = tl.maximum(largest, tl.max(s, 0))
        base = tl.where(found == float("-inf"), 0.0, found)
        w = tl.exp2(s - base)
        factor = tl.exp2(largest - base)
        # The largest score seldom changes after a few boxes; NaN counts as a change.
        if factor != 1.0:
            weights *= factor
            key_sum *= factor
            value_sum *= factor
            matrix *= factor
        largest = found
        weights += w
        key_sum += _lines(w, k, APART)
        value_sum += _lines(w, v, APART)
        roots = tl.sqrt(w)
        side = _rooted(k, roots)
        # One product for both matrices: keys and values beside each other.
        both = tl.trans(tl.join(side, _rooted(v, roots)), 0, 2, 1)
        both = tl.reshape(both, (KEYS, 2 * PAD))
        matrix = tl.dot(tl.trans(side), both, matrix, input_precision=PRECISION)
    p_matrix = p_matrices + program.to(tl.int64) * 2 * PAD * PAD
    place = column[:, None] * (2 * PAD) + column[None, :]
    # Apart: a matrix at a time is laid out for the way to memory.
    second, cross = tl.split(tl.trans(tl.reshape(matrix, (PAD, 2, PAD)), 0, 2, 1))
    tl.store(p_matrix + place, second, mask=_kept(column, column, SIDE))
    tl.store(p_matrix + PAD + place, cross)
    p_sum = p_sums + program.to(tl.int64) * (2 + 2 * PAD)
    tl.store(p_sum, largest)
    tl.store(p_sum + 1, tl.sum(weights, 0))
    tl.store(p_sum + 2 + column, tl.sum(key_sum, 0))
    tl.store(p_sum + 2 + PAD + column, tl.sum(value_sum, 0))


@triton.jit
def _shares(largest, total):
    """Of every part, the factor that makes its sums means; base-2 lse."""
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
    PAD: tl.constexpr, SIDE: tl.constexpr, SPLITS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """LINES lines of a query's centred matrices: system float32 [queries, PAD, 2 PAD]; and means
    float32 [queries, 1 + 2 PAD]: base-2 lse, mean key, mean value."""
    blocks: tl.constexpr = PAD // LINES
    row = tl.program_id(0) // blocks
    line = tl.program_id(0) % blocks * LINES + tl.arange(0, LINES)
    column = tl.arange(0, 2 * PAD)
    part = tl.arange(0, SPLITS)
    there = part < splits
    p_part = p_sums + (row * splits + part).to(tl.int64) * (2 + 2 * PAD)
    place = line[:, None].to(tl.int64) * (2 * PAD) + column[None, :]
    kept = _kept(line, column, SIDE)
    p_own = p_matrices + (row * splits + part).to(tl.int64)[:, None, None] * 2 * PAD * PAD
    own = tl.load(p_own + place[None], mask=there[:, None, None] & kept[None], other=0.0)
    sums = tl.load(p_part[:, None] + 2 + column[None, :], mask=there[:, None], other=0.0)
    # Matrices take long and are asked for first: no load moves across a barrier.
    tl.debug_barrier()
    largest = tl.load(p_part, mask=there, other=float("-inf"))
    total = tl.load(p_part + 1, mask=there, other=0.0)
    share, lse = _shares(largest, total)
    matrix = tl.sum(share[:, None, None] * own, 0)
    mean = tl.sum(share[:, None] * sums, 0)
    at_line = tl.sum(tl.where(line[:, None] == column[None, :], mean[None, :], 0.0), 1)
    matrix -= at_line[:, None] * mean[None, :]
    p_matrix = p_system + row.to(tl.int64) * 2 * PAD * PAD
    tl.store(p_matrix + place, matrix, mask=kept)
    # What was not written repeats what is on the other side of the diagonal.
    turned = column[None, :].to(tl.int64) * (2 * PAD) + line[:, None]
    other = (column[None, :] // SIDE > line[:, None] // SIDE) & (column < PAD)[None, :]
    tl.store(p_matrix + turned, matrix, mask=other)
    if tl.program_id(0) % blocks == 0:
        p_mean = p_means + row.to(tl.int64) * (1 + 2 * PAD)
        tl.store(p_mean, lse)
        tl.store(p_mean + 1 + column, mean)


@triton.jit
def local_linear_decode_solve(
    p_q, p_ridge, p_means, p_system, p_o, p_lse, q_strides, o_strides, heads, Lq, most, tolerance,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """o and lse [N, heads, Lq] of one query, by conjugate gradients on chip; a program has COLUMNS of o."""
    blocks: tl.constexpr = PAD // COLUMNS
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    i_q = (row % Lq).to(tl.int64)
    h = (row // Lq % heads).to(tl.int64)
    n = (row // Lq // heads).to(tl.int64)
    column = tl.arange(0, PAD)
    value_column = block * COLUMNS + tl.arange(0, COLUMNS)
    # A sum over lines is held by every warp, so that sums of its products need no barrier: of HELD lines
    # all but the first are 0.
    first = (tl.arange(0, HELD) == 0)[:, None]
    at = column[None, :] + tl.zeros([HELD, 1], tl.int32)
    p_query = p_q + n * q_strides[0] + i_q * q_strides[1] + h * q_strides[2]
    q = tl.load(p_query + at, mask=first & (column < D)[None, :], other=0.0).to(tl.float32)
    ridge = tl.load(p_ridge + h)
    p_mean = p_means + row.to(tl.int64) * (1 + 2 * PAD)
    p_line = p_system + row.to(tl.int64) * 2 * PAD * PAD + column[:, None] * (2 * PAD)
    lse = tl.load(p_mean)
    mean = tl.load(p_mean + 1 + at, mask=first, other=0.0)
    system = tl.load(p_line + column[None, :])
    cross = tl.load(p_line + PAD + value_column[None, :])
    value = tl.load(p_mean + 1 + PAD + value_column)
    residual = tl.sum(mean - q, 0)
    residual = tl.where(lse - lse == 0.0, residual, 0.0)
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
    if block == 0:
        tl.store(p_lse + row, lse * LN2)
