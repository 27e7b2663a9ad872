"""One query with a given r against many keys: one pass over the keys in parts, and an exact merge."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.tiles import load_rows
from foveal.engines.local_linear.decode import LN2


@triton.jit
def local_linear_decode_given(
    p_q, p_r, p_k, p_v, p_lower, p_upper, p_sums,
    q_strides, r_strides, k_strides, v_strides, heads, groups, splits, unit,
    D: tl.constexpr, PAD: tl.constexpr, DV: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the queries of one key head, groups <= ROWS of them, over one part of the keys.

    Tensors by strides (batch, token, head).  sums float32 [programs, 4 + 2 VALUE_PAD, ROWS]: largest
    score in base 2, sums of weights w and of w t, a number c, sums of w v and of w (t - c) v; t = r.k.
    """
    program = tl.program_id(0)
    split = program % splits
    kv_heads = heads // groups
    kv_h = program // splits % kv_heads
    n = (program // splits // kv_heads).to(tl.int64)
    row = tl.arange(0, ROWS)
    there = row < groups
    h = kv_h * groups + tl.where(there, row, 0)
    lower = tl.load(p_lower)
    upper = tl.load(p_upper)
    own = tl.cdiv(tl.cdiv(tl.maximum(upper - lower, 0), KEYS), splits)
    start = lower + split * own * KEYS
    stop = tl.minimum(start + own * KEYS, upper)

    p_rows = p_q + n * q_strides[0] + h.to(tl.int64) * q_strides[2]
    q = load_rows(p_rows, there, D, PAD, True)
    p_rows = p_r + n * r_strides[0] + h.to(tl.int64) * r_strides[2]
    r = load_rows(p_rows, there, D, PAD, True).to(q.dtype)
    p_keys = p_k + n * k_strides[0] + kv_h.to(tl.int64) * k_strides[2]
    p_values = p_v + n * v_strides[0] + kv_h.to(tl.int64) * v_strides[2]
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    centre = tl.zeros([ROWS], tl.float32)
    value = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    cross = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for first in range(start, stop, KEYS):
        j = first + tl.arange(0, KEYS)
        inside = j < stop
        k = load_rows(p_keys + j.to(tl.int64) * k_strides[1], inside, D, PAD, True)
        v = load_rows(p_values + j.to(tl.int64) * v_strides[1], inside, DV, VALUE_PAD, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * unit
        s = tl.where(inside[None, :], s, float("-inf"))
        t = tl.dot(r, tl.trans(k), input_precision=PRECISION)
        found = tl.maximum(largest, tl.max(s, 1))
        base = tl.where(found == float("-inf"), 0.0, found)
        w = tl.exp2(s - base[:, None])
        factor = tl.exp2(largest - base)
        fresh = largest == float("-inf")
        largest = found
        mass = tl.sum(w, 1)
        held = tl.sum(w * t, 1)
        # The products with v keep their digits where t is far from 0.
        centre = tl.where(fresh & (mass > 0.0), held / tl.where(mass > 0.0, mass, 1.0), centre)
        total = total * factor + mass
        along = along * factor + held
        turned = tl.where(inside[None, :], w * (t - centre[:, None]), 0.0)
        value = tl.dot(w.to(v.dtype), v, value * factor[:, None], input_precision=PRECISION)
        cross = tl.dot(turned.to(v.dtype), v, cross * factor[:, None], input_precision=PRECISION)
    p_sum = p_sums + program.to(tl.int64) * (4 + 2 * VALUE_PAD) * ROWS + row
    tl.store(p_sum, largest)
    tl.store(p_sum + ROWS, total)
    tl.store(p_sum + 2 * ROWS, along)
    tl.store(p_sum + 3 * ROWS, centre)
    column = tl.arange(0, VALUE_PAD)
    p_line = p_sum[:, None] + (4 + column)[None, :] * ROWS
    tl.store(p_line, value)
    tl.store(p_line + VALUE_PAD * ROWS, cross)


@triton.jit
def local_linear_decode_given_merge(
    p_sums, p_o, p_lse, o_strides, heads, groups, splits,
    DV: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """o and lse [N, heads] of one head."""
    program = tl.program_id(0)
    h = program % heads
    n = program // heads
    WIDTH: tl.constexpr = (4 + 2 * VALUE_PAD) * ROWS
    part = tl.arange(0, SPLITS)
    there = part < splits
    first = (n * (heads // groups) + h // groups) * splits
    row = h % groups
    p_part = p_sums + (first + part).to(tl.int64) * WIDTH + row
    largest = tl.load(p_part, mask=there, other=float("-inf"))
    total = tl.load(p_part + ROWS, mask=there, other=0.0)
    along = tl.load(p_part + 2 * ROWS, mask=there, other=0.0)
    centre = tl.load(p_part + 3 * ROWS, mask=there, other=0.0)
    most = tl.max(largest, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    factor = tl.exp2(largest - base)
    whole = tl.sum(factor * total, 0)
    share = factor / tl.where(whole == 0.0, 1.0, whole)
    mean = tl.sum(share * along, 0)
    column = tl.arange(0, VALUE_PAD)
    p_line = p_part[:, None] + (4 + column)[None, :] * ROWS
    value = tl.load(p_line, mask=there[:, None], other=0.0)
    cross = tl.load(p_line + VALUE_PAD * ROWS, mask=there[:, None], other=0.0)
    weight = share * (1.0 + mean - centre)
    o = tl.sum(weight[:, None] * value - share[:, None] * cross, 0)
    lse = tl.where(whole == 0.0, float("-inf"), base + tl.log2(tl.where(whole == 0.0, 1.0, whole)))
    o = tl.where(o - o == 0.0, o, float("nan"))
    p_row = p_o + n.to(tl.int64) * o_strides[0] + h.to(tl.int64) * o_strides[2]
    tl.store(p_row + column, o.to(p_o.dtype.element_ty), mask=column < DV)
    tl.store(p_lse + program, lse * LN2)
