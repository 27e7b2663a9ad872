"""Kernels: gradients, over the tiles that hold weights above zero; no atomics.

dS = u (dP - shift) with u = p ^ (2 - alpha), shift = do . (sum u v / sum u).
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.tiles import load_rows, store_rows
from foveal.engines.entmax.threshold import full_products, masked_products, most_needed, powers


@triton.jit
def _keys_gradient(
    w, k, i_k, do, shift, c, a, tau, p_v, v_stride, Lk, dq,
    SPEC: tl.constexpr, POWER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq with the keys of one more tile."""
    r = tl.maximum(w * c - tau[:, None], 0.0)
    _p, u = powers(r, a, POWER)
    v = load_rows(
        p_v + i_k.to(tl.int64) * v_stride, i_k < Lk, SPEC.value_dim, SPEC.value_pad, MASKED
    )
    ds = u * (tl.dot(do, tl.trans(v), input_precision="ieee") - shift[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def entmax_backward_q(
    p_q, p_k, p_v, p_do, p_flat, p_tau, p_shift, p_dq, q_strides, k_strides, v_strides, do_strides,
    o_strides, dq_strides, Lq, Lk, heads, groups, c, a, scale, p_needed, room, route,
    SPEC: tl.constexpr, POWER: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """dq and shift of one tile of queries."""
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    ROWS: tl.constexpr = Q_TILE[2]
    HEAD_PAD: tl.constexpr = SPEC.head_pad
    tiles = tl.cdiv(Lq, ROWS)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    matrix = program // tiles
    if most_needed(p_needed + (matrix * tiles + tile) * BLOCKS, BLOCKS) <= room:
        return
    n = matrix // heads
    h = matrix % heads
    i_q = tile * ROWS + tl.arange(0, ROWS)
    inside = i_q < Lq
    row = i_q.to(tl.int64)
    rows = p_q + n.to(tl.int64) * q_strides[0] + h * q_strides[2] + row * q_strides[1]
    q = load_rows(rows, inside, SPEC.head_dim, SPEC.head_pad, True)
    rows = p_do + n.to(tl.int64) * do_strides[0] + h * do_strides[2] + row * do_strides[1]
    do = load_rows(rows, inside, SPEC.value_dim, SPEC.value_pad, True)
    rows = p_flat + n.to(tl.int64) * o_strides[0] + h * o_strides[2] + row * o_strides[1]
    flat = load_rows(rows, inside, SPEC.value_dim, SPEC.value_pad, True)
    shift = tl.sum(do.to(tl.float32) * flat.to(tl.float32), 1)
    place = matrix.to(tl.int64) * Lq + i_q
    tau = tl.load(p_tau + place, mask=inside, other=float("inf"))
    tl.store(p_shift + place, shift, mask=inside)
    head = (p_k + n.to(tl.int64) * k_strides[0] + h // groups * k_strides[2], k_strides[1], Lk)
    p_values = p_v + n.to(tl.int64) * v_strides[0] + h // groups * v_strides[2]
    lengths = (1, 1, Lk)
    state = SPEC.route.open(route, tile, n, h, lengths, lengths, Q_TILE, K_TILE, 1)
    limits = SPEC.route.rows(route, (i_q, i_q, i_q), inside, 1)

    dq = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for i in range(state[0]):
        w, k, i_k = masked_products(q, head, route, state, limits, i, SPEC)
        dq = _keys_gradient(
            w, k, i_k, do, shift, c, a, tau, p_values, v_strides[1], Lk, dq, SPEC, POWER, True
        )  # fmt: skip
    for i in range(state[1]):
        w, k, i_k = full_products(q, head, route, state, i, SPEC)
        dq = _keys_gradient(
            w, k, i_k, do, shift, c, a, tau, p_values, v_strides[1], Lk, dq, SPEC, POWER, False
        )  # fmt: skip
    rows = p_dq + n.to(tl.int64) * dq_strides[0] + h * dq_strides[2] + row * dq_strides[1]
    store_rows(rows, dq * scale, inside, SPEC.head_dim, SPEC.head_pad)


@triton.jit
def _queries_gradient(
    k, v, first, queries, limits, mark, route, c, a, sums,
    SPEC: tl.constexpr, POWER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk and dv with the queries of one more tile; keys stand first."""
    p_q, q_stride, p_do, do_stride, p_tau, p_shift, Lq = queries
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    QUERIES: tl.constexpr = Q_TILE[2]
    i_q = first + tl.arange(0, QUERIES)
    inside = i_q < Lq
    row = i_q.to(tl.int64)
    q = load_rows(p_q + row * q_stride, inside, SPEC.head_dim, SPEC.head_pad, True)
    do = load_rows(p_do + row * do_stride, inside, SPEC.value_dim, SPEC.value_pad, True)
    tau = tl.load(p_tau + i_q, mask=inside, other=float("inf"))
    shift = tl.load(p_shift + i_q, mask=inside, other=0.0)
    w = tl.dot(k, tl.trans(q), input_precision="ieee")
    r = tl.maximum(w * c - tau[None, :], 0.0)
    if MASKED:
        seen = SPEC.route.sees(route, limits, mark, (i_q, i_q, i_q), K_TILE, Q_TILE, 1)
        r = tl.where(seen, r, 0.0)
    p, u = powers(r, a, POWER)
    dv = tl.dot(p.to(do.dtype), do, sums[1], input_precision="ieee")
    ds = u * (tl.dot(v, tl.trans(do), input_precision="ieee") - shift[None, :])
    return tl.dot(ds.to(q.dtype), q, sums[0], input_precision="ieee"), dv


@triton.jit
def entmax_backward_kv(
    p_q, p_k, p_v, p_do, p_tau, p_shift, p_dk, p_dv, q_strides, k_strides, v_strides, do_strides,
    dk_strides, dv_strides, Lq, Lk, heads, groups, c, a, scale, p_needed, room, route,
    SPEC: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, summed over the query heads that share it."""
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    ROWS: tl.constexpr = K_TILE[2]
    HEAD_PAD: tl.constexpr = SPEC.head_pad
    VALUE_PAD: tl.constexpr = SPEC.value_pad
    tiles = tl.cdiv(Lk, ROWS)
    program = tl.program_id(0)
    tile = program % tiles  # of a causal pattern the longest first
    kv_heads = heads // groups
    n = program // tiles // kv_heads
    kv_h = program // tiles % kv_heads
    most = 0
    for g in range(groups):
        most = tl.maximum(most, tl.load(p_needed + (n * heads + kv_h * groups + g) * tiles + tile))
    if most <= room:
        return
    i_k = tile * ROWS + tl.arange(0, ROWS)
    inside = i_k < Lk
    row = i_k.to(tl.int64)
    rows = p_k + n.to(tl.int64) * k_strides[0] + kv_h * k_strides[2] + row * k_strides[1]
    k = load_rows(rows, inside, SPEC.head_dim, SPEC.head_pad, True)
    rows = p_v + n.to(tl.int64) * v_strides[0] + kv_h * v_strides[2] + row * v_strides[1]
    v = load_rows(rows, inside, SPEC.value_dim, SPEC.value_pad, True)
    limits = SPEC.route.rows(route, (i_k, i_k, i_k), inside, 1)
    lengths = (1, 1, Lq)
    sums = (tl.zeros([ROWS, HEAD_PAD], tl.float32), tl.zeros([ROWS, VALUE_PAD], tl.float32))
    for g in range(groups):
        h = kv_h * groups + g
        place = (n.to(tl.int64) * heads + h) * Lq
        queries = (
            p_q + n.to(tl.int64) * q_strides[0] + h * q_strides[2], q_strides[1],
            p_do + n.to(tl.int64) * do_strides[0] + h * do_strides[2], do_strides[1],
            p_tau + place, p_shift + place, Lq,
        )  # fmt: skip
        state = SPEC.route.open(route, tile, n, h, lengths, lengths, K_TILE, Q_TILE, 1)
        for i in range(state[0]):
            first, _whole, mark = SPEC.route.partial(route, state, i, Q_TILE, 1)
            sums = _queries_gradient(
                k, v, first[2], queries, limits, mark, route, c, a, sums, SPEC, POWER, True
            )  # fmt: skip
        for i in range(state[1]):
            first = SPEC.route.full(route, state, i, Q_TILE)
            sums = _queries_gradient(
                k, v, first[2], queries, limits, 0, route, c, a, sums, SPEC, POWER, False
            )  # fmt: skip
    rows = p_dk + n.to(tl.int64) * dk_strides[0] + kv_h * dk_strides[2] + row * dk_strides[1]
    store_rows(rows, sums[0] * scale, inside, SPEC.head_dim, SPEC.head_pad)
    rows = p_dv + n.to(tl.int64) * dv_strides[0] + kv_h * dv_strides[2] + row * dv_strides[1]
    store_rows(rows, sums[1], inside, SPEC.value_dim, SPEC.value_pad)
