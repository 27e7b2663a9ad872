"""Kernels of the normaliser n of additive rules, n' = exp(G_C) n + (exp(G_C - G) k)^T b, and its weight.

It is the state of one more value column, of ones: what each chunk adds to it is found for all chunks at
once, then a walk over chunks gives n before each of them, and o is divided by the weight
w = scale exp(G) (q . n) + sum_j P_ij b_j.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.state.tiles import (
    decay_of_pairs,
    exp2_of,
    factor_since,
    factor_until,
    load_gate,
    load_row,
    load_rows,
    store_row,
    store_rows,
)


@triton.jit(do_not_specialize=["heads"])
def state_column_added(
    p_x, p_gate, p_sums, p_added, p_chunks, stride_t, stride_h, heads, groups, scale,
    BACKWARD: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to n, [chunks, Hv, DK], of k and b.

    BACKWARD: to the gradient of n, scale (exp(G) q)^T dw, of q and dw.
    """
    program = tl.program_id(0)
    c = program // heads
    h = program % heads
    start = tl.load(p_chunks + 2 * c)
    stop = tl.load(p_chunks + 2 * c + 1)
    row = tl.arange(0, CHUNK)
    token = start + row
    inside = token < stop
    x = load_rows(p_x, start, stop, h // groups, stride_t, stride_h, 0, CHUNK, DK, ROWS)
    factor = load_gate(p_gate, token, inside, h, heads)[:, None]
    if BACKWARD:
        factor *= factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS) * scale
    else:
        factor *= factor_until(p_sums, token, row, inside, stop - 1, h, heads, 0, DECAY, DK, ROWS)
    place = (tl.cast(c, tl.int64) * heads + h) * DK
    store_row(p_added + place, tl.sum(x.to(tl.float32) * factor, 0), 1, DK, ROWS)


@triton.jit(do_not_specialize=["heads"])
def state_column_walk(
    p_added, p_sums, p_first, p_found, p_last, p_sequences, p_chunks, heads,
    BACKWARD: tl.constexpr, DECAY: tl.constexpr, DK: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """n before each chunk [chunks, Hv, DK] of one sequence and value head, and after the last one.

    BLOCK chunks at a time.  p_first and p_last are the last columns of states [DK, WIDE].  BACKWARD: the
    gradient of n behind each chunk, from the last chunk to the first, and of the initial n.
    """
    program = tl.program_id(0)
    h = program % heads
    sequence = program // heads
    begin = tl.load(p_sequences + 2 * sequence)
    end = tl.load(p_sequences + 2 * sequence + 1)
    column = (tl.cast(sequence, tl.int64) * heads + h) * (DK * WIDE) + WIDE - 1
    n = tl.zeros([ROWS], tl.float32)
    if p_first is not None:
        n = load_row(p_first + column, WIDE, DK, ROWS)
    step = tl.arange(0, BLOCK)
    channel = tl.arange(0, ROWS)
    for i in range(0, end - begin, BLOCK):
        c = end - 1 - i - step if BACKWARD else begin + i + step
        there = i + step < end - begin
        stop = tl.load(p_chunks + 2 * c + 1, mask=there, other=0)
        if DECAY == 1:
            count = stop - tl.load(p_chunks + 2 * c, mask=there, other=0)
            whole = tl.load(p_sums + h) * count.to(tl.float32)
        elif DECAY == 2:
            p = p_sums + tl.cast(stop - 1, tl.int64) * heads + h
            whole = tl.load(p, mask=there, other=0.0)
        else:
            whole = tl.zeros([BLOCK], tl.float32)
        whole = whole.to(tl.float64)  # sums over blocks, of which small differences are needed
        upto = tl.cumsum(whole, 0)
        place = (tl.cast(c, tl.int64) * heads + h)[:, None] * DK + channel[None, :]
        mask = there[:, None] & (channel < DK)[None, :]
        added = tl.load(p_added + place, mask=mask, other=0.0)
        later = step[:, None] > step[None, :]
        kept = tl.where(later, (upto - whole)[:, None] - upto[None, :], 0.0)
        kept = tl.where(later, exp2_of(kept), 0.0)
        found = tl.dot(kept, added, input_precision="ieee")
        found += exp2_of(upto - whole)[:, None] * n[None, :]
        tl.store(p_found + place, found, mask=mask)
        total = tl.sum(whole, 0)
        n = exp2_of(total) * n + tl.sum(added * exp2_of(total - upto)[:, None], 0)
    if p_last is not None:
        store_row(p_last + column, n, WIDE, DK, ROWS)


@triton.jit(do_not_specialize=["heads"])
def state_weight_forward(
    p_q, p_k, p_sums, p_gate, p_normaliser, p_weight, p_chunks, q_stride_t, q_stride_h,
    k_stride_t, k_stride_h, heads, groups, scale,
    DECAY: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """w [T, Hv] of one chunk and value head."""
    program = tl.program_id(0)
    c = program // heads
    h = program % heads
    start = tl.load(p_chunks + 2 * c)
    stop = tl.load(p_chunks + 2 * c + 1)
    row = tl.arange(0, CHUNK)
    token = start + row
    inside = token < stop
    q = load_rows(p_q, start, stop, h // groups, q_stride_t, q_stride_h, 0, CHUNK, DK, ROWS)
    k = load_rows(p_k, start, stop, h // groups, k_stride_t, k_stride_h, 0, CHUNK, DK, ROWS)
    gate = load_gate(p_gate, token, inside, h, heads)
    n = load_row(p_normaliser + (tl.cast(c, tl.int64) * heads + h) * DK, 1, DK, ROWS)
    since = factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS)
    pairs = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    pairs *= decay_of_pairs(p_sums, token, row, inside, h, heads, DECAY) * gate[None, :]
    weight = tl.sum(q.to(tl.float32) * n[None, :], 1)[:, None] * since
    weight = (tl.sum(weight, 1) + tl.sum(pairs, 1)) * scale
    tl.store(p_weight + tl.cast(token, tl.int64) * heads + h, weight, mask=inside)


@triton.jit(do_not_specialize=["heads", "tokens"])
def state_weight_backward(
    p_o, p_do, p_weight, p_floor, p_scaled, p_dweight, o_stride_t, o_stride_h, do_stride_t,
    do_stride_h, tokens, heads, floor,
    SIGNED: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """do over the weight that o was divided by, and the gradient of that weight; TILE tokens of a head."""
    h = tl.program_id(0) % heads
    start = tl.program_id(0) // heads * TILE
    token = start + tl.arange(0, TILE)
    inside = token < tokens
    o = load_rows(p_o, start, tokens, h, o_stride_t, o_stride_h, 0, TILE, DV, WIDTH)
    do = load_rows(p_do, start, tokens, h, do_stride_t, do_stride_h, 0, TILE, DV, WIDTH)
    p = tl.cast(token, tl.int64) * heads + h
    weight = tl.load(p_weight + p, mask=inside, other=1.0)
    least = tl.full([TILE], 0.0, tl.float32) + floor
    if p_floor is not None:
        least = tl.load(p_floor + p, mask=inside, other=1.0)
    size = weight if SIGNED else tl.abs(weight)
    scaled = do.to(tl.float32) / tl.maximum(size, least)[:, None]
    sign = tl.where(weight < 0, -1.0, 1.0)
    dweight = -tl.sum(scaled * o.to(tl.float32), 1) * tl.where(size > least, sign, 0.0)
    tl.store(p_dweight + p, dweight, mask=inside)
    store_rows(p_scaled, scaled, start, tokens, h, heads * DV, DV, 0, TILE, DV, WIDTH)
