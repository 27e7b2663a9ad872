"""Kernels: the values and the gradients over lists of single keys or queries, gathered into tiles.

Where few keys per row weigh more than zero, most columns of a tile that holds some are empty for all its
rows; tiles made of the columns that are not hold several times less.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.tiles import load_rows, store_rows
from foveal.engines.entmax.threshold import moments, powers, third_order


@triton.jit
def _gathered(p_list, start, stop, N: tl.constexpr):
    """The next N entries of a list, 0 past its end, and whether they are in it."""
    at = start + tl.arange(0, N)
    valid = at < stop
    return tl.load(p_list + at, mask=valid, other=0), valid


@triton.jit
def _key_excess(
    q, tau, head, p_list, start, stop, route, limits, c,
    SPEC: tl.constexpr, TESTED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """r = [z - tau]_+, the keys, their int64 indices and which are there."""
    p_k, k_stride, _Lk = head
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    K_TILE[2]
    i_k, valid = _gathered(p_list, start, stop, N)
    k = load_rows(p_k + i_k.to(tl.int64) * k_stride, valid, SPEC.head_dim, SPEC.head_pad, True)
    w = tl.dot(q, tl.trans(k), input_precision="ieee")
    r = tl.maximum(w * c - tau[:, None], 0.0)
    seen = valid[None, :]
    if TESTED:
        seen = seen & SPEC.route.sees(route, limits, 0, (i_k, i_k, i_k), Q_TILE, K_TILE, 1)
    return tl.where(seen, r, 0.0), k, i_k.to(tl.int64), valid


@triton.jit
def entmax_values_gathered(
    p_q, p_k, p_v, p_o, p_flat, p_tau, q_strides, k_strides, v_strides, o_strides, Lq, Lk, heads,
    groups, c, a, tiles, p_keys, p_partial, p_counts, room, route,
    SPEC: tl.constexpr, POWER: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """As `entmax_values`, of one block of queries whose keys are listed."""
    Q_TILE: tl.constexpr = SPEC.q_tile
    ROWS: tl.constexpr = Q_TILE[2] // BLOCKS
    VALUE_PAD: tl.constexpr = SPEC.value_pad
    blocks = tiles * BLOCKS
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    matrix = program // blocks
    own = matrix * blocks + block
    count = tl.load(p_counts + own)
    if count <= room:
        partial = tl.load(p_partial + own)
        n = matrix // heads
        h = matrix % heads
        i_q = block * ROWS + tl.arange(0, ROWS)
        inside = i_q < Lq
        rows = p_q + n.to(tl.int64) * q_strides[0] + h * q_strides[2]
        rows += i_q.to(tl.int64) * q_strides[1]
        q = load_rows(rows, inside, SPEC.head_dim, SPEC.head_pad, True)
        p_rows = p_tau + matrix.to(tl.int64) * Lq + i_q
        tau = tl.load(p_rows, mask=inside, other=float("inf"))
        head = (p_k + n.to(tl.int64) * k_strides[0] + h // groups * k_strides[2], k_strides[1], Lk)
        p_values = p_v + n.to(tl.int64) * v_strides[0] + h // groups * v_strides[2]
        limits = SPEC.route.rows(route, (i_q, i_q, i_q), inside, 1)
        p_list = p_keys + own.to(tl.int64) * room
        zero = tl.zeros([ROWS], tl.float32)
        sums = (zero, zero, zero)
        for start in range(0, partial, N):
            r, _k, _i_k, _valid = _key_excess(
                q, tau, head, p_list, start, partial, route, limits, c, SPEC, True, N
            )  # fmt: skip
            sums = moments(r, a, sums, POWER)
        for start in range(partial, count, N):
            r, _k, _i_k, _valid = _key_excess(
                q, tau, head, p_list, start, count, route, limits, c, SPEC, False, N
            )  # fmt: skip
            sums = moments(r, a, sums, POWER)
        tau += third_order(sums[0], sums[1], sums[2], a, POWER)

        total = zero
        slope = zero
        o = tl.zeros([ROWS, VALUE_PAD], tl.float32)
        flat = tl.zeros([ROWS, VALUE_PAD], tl.float32)
        for start in range(0, partial, N):
            r, _k, i_k, valid = _key_excess(
                q, tau, head, p_list, start, partial, route, limits, c, SPEC, True, N
            )  # fmt: skip
            p, u = powers(r, a, POWER)
            v = load_rows(
                p_values + i_k * v_strides[1], valid, SPEC.value_dim, SPEC.value_pad, True
            )
            o = tl.dot(p.to(v.dtype), v, o, input_precision="ieee")
            flat = tl.dot(u.to(v.dtype), v, flat, input_precision="ieee")
            total += tl.sum(p, 1)
            slope += tl.sum(u, 1)
        for start in range(partial, count, N):
            r, _k, i_k, valid = _key_excess(
                q, tau, head, p_list, start, count, route, limits, c, SPEC, False, N
            )  # fmt: skip
            p, u = powers(r, a, POWER)
            v = load_rows(
                p_values + i_k * v_strides[1], valid, SPEC.value_dim, SPEC.value_pad, True
            )
            o = tl.dot(p.to(v.dtype), v, o, input_precision="ieee")
            flat = tl.dot(u.to(v.dtype), v, flat, input_precision="ieee")
            total += tl.sum(p, 1)
            slope += tl.sum(u, 1)
        some = slope > 0.0
        slope = tl.where(some, slope, 1.0)
        over = tl.where(some, total - 1.0, 0.0)
        flat = flat / slope[:, None]
        o = o - over[:, None] * flat
        tl.store(p_rows, tau + over / (a * slope), mask=inside)
        offset = n.to(tl.int64) * o_strides[0] + h * o_strides[2] + i_q.to(tl.int64) * o_strides[1]
        store_rows(p_o + offset, o, inside, SPEC.value_dim, SPEC.value_pad)
        if p_flat is not None:
            store_rows(p_flat + offset, flat, inside, SPEC.value_dim, SPEC.value_pad)


@triton.jit
def entmax_backward_q_gathered(
    p_q, p_k, p_v, p_do, p_flat, p_tau, p_shift, p_dq, q_strides, k_strides, v_strides, do_strides,
    o_strides, dq_strides, Lq, Lk, heads, groups, c, a, scale, tiles, p_keys, p_partial, p_counts,
    room, route, SPEC: tl.constexpr, POWER: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """As `entmax_backward_q`, of one block of queries whose keys are listed."""
    Q_TILE: tl.constexpr = SPEC.q_tile
    ROWS: tl.constexpr = Q_TILE[2] // BLOCKS
    HEAD_PAD: tl.constexpr = SPEC.head_pad
    blocks = tiles * BLOCKS
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    matrix = program // blocks
    own = matrix * blocks + block
    count = tl.load(p_counts + own)
    if count <= room:
        partial = tl.load(p_partial + own)
        n = matrix // heads
        h = matrix % heads
        i_q = block * ROWS + tl.arange(0, ROWS)
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
        limits = SPEC.route.rows(route, (i_q, i_q, i_q), inside, 1)
        p_list = p_keys + own.to(tl.int64) * room
        dq = tl.zeros([ROWS, HEAD_PAD], tl.float32)
        for start in range(0, partial, N):
            r, k, i_k, valid = _key_excess(
                q, tau, head, p_list, start, partial, route, limits, c, SPEC, True, N
            )  # fmt: skip
            _p, u = powers(r, a, POWER)
            v = load_rows(
                p_values + i_k * v_strides[1], valid, SPEC.value_dim, SPEC.value_pad, True
            )
            ds = u * (tl.dot(do, tl.trans(v), input_precision="ieee") - shift[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        for start in range(partial, count, N):
            r, k, i_k, valid = _key_excess(
                q, tau, head, p_list, start, count, route, limits, c, SPEC, False, N
            )  # fmt: skip
            _p, u = powers(r, a, POWER)
            v = load_rows(
                p_values + i_k * v_strides[1], valid, SPEC.value_dim, SPEC.value_pad, True
            )
            ds = u * (tl.dot(do, tl.trans(v), input_precision="ieee") - shift[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        rows = p_dq + n.to(tl.int64) * dq_strides[0] + h * dq_strides[2] + row * dq_strides[1]
        store_rows(rows, dq * scale, inside, SPEC.head_dim, SPEC.head_pad)


@triton.jit
def _query_gradients(
    k, v, p_list, start, stop, queries, limits, route, c, a, dk, dv,
    SPEC: tl.constexpr, POWER: tl.constexpr, TESTED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv with the next queries of a list; keys stand first."""
    p_q, q_stride, p_do, do_stride, p_tau, p_shift = queries
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    i_q, valid = _gathered(p_list, start, stop, N)
    row = i_q.to(tl.int64)
    q = load_rows(p_q + row * q_stride, valid, SPEC.head_dim, SPEC.head_pad, True)
    do = load_rows(p_do + row * do_stride, valid, SPEC.value_dim, SPEC.value_pad, True)
    tau = tl.load(p_tau + i_q, mask=valid, other=float("inf"))
    shift = tl.load(p_shift + i_q, mask=valid, other=0.0)
    w = tl.dot(k, tl.trans(q), input_precision="ieee")
    r = tl.maximum(w * c - tau[None, :], 0.0)
    if TESTED:
        seen = SPEC.route.sees(route, limits, 0, (i_q, i_q, i_q), K_TILE, Q_TILE, 1)
        r = tl.where(seen, r, 0.0)
    p, u = powers(r, a, POWER)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = u * (tl.dot(v, tl.trans(do), input_precision="ieee") - shift[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit
def entmax_backward_kv_gathered(
    p_q, p_k, p_v, p_do, p_tau, p_shift, p_dk, p_dv, q_strides, k_strides, v_strides, do_strides,
    dk_strides, dv_strides, Lq, Lk, heads, groups, c, a, scale, p_queries, p_partial, p_counts, room,
    route, SPEC: tl.constexpr, POWER: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """As `entmax_backward_kv`, of one tile of keys whose queries are listed for every query head."""
    K_TILE: tl.constexpr = SPEC.k_tile
    ROWS: tl.constexpr = K_TILE[2]
    HEAD_PAD: tl.constexpr = SPEC.head_pad
    VALUE_PAD: tl.constexpr = SPEC.value_pad
    tiles = tl.cdiv(Lk, ROWS)
    program = tl.program_id(0)
    tile = program % tiles
    kv_heads = heads // groups
    n = program // tiles // kv_heads
    kv_h = program // tiles % kv_heads
    first = (n * heads + kv_h * groups) * tiles + tile
    most = 0
    for g in range(groups):
        most = tl.maximum(most, tl.load(p_counts + first + g * tiles))
    if most <= room:
        i_k = tile * ROWS + tl.arange(0, ROWS)
        inside = i_k < Lk
        row = i_k.to(tl.int64)
        rows = p_k + n.to(tl.int64) * k_strides[0] + kv_h * k_strides[2] + row * k_strides[1]
        k = load_rows(rows, inside, SPEC.head_dim, SPEC.head_pad, True)
        rows = p_v + n.to(tl.int64) * v_strides[0] + kv_h * v_strides[2] + row * v_strides[1]
        v = load_rows(rows, inside, SPEC.value_dim, SPEC.value_pad, True)
        limits = SPEC.route.rows(route, (i_k, i_k, i_k), inside, 1)
        dk = tl.zeros([ROWS, HEAD_PAD], tl.float32)
        dv = tl.zeros([ROWS, VALUE_PAD], tl.float32)
        for g in range(groups):
            h = kv_h * groups + g
            place = (n.to(tl.int64) * heads + h) * Lq
            queries = (
                p_q + n.to(tl.int64) * q_strides[0] + h * q_strides[2], q_strides[1],
                p_do + n.to(tl.int64) * do_strides[0] + h * do_strides[2], do_strides[1],
                p_tau + place, p_shift + place,
            )  # fmt: skip
            own = first + g * tiles
            partial = tl.load(p_partial + own)
            count = tl.load(p_counts + own)
            p_list = p_queries + own.to(tl.int64) * room
            for start in range(0, partial, N):
                dk, dv = _query_gradients(
                    k, v, p_list, start, partial, queries, limits, route, c, a, dk, dv,
                    SPEC, POWER, True, N,
                )  # fmt: skip
            for start in range(partial, count, N):
                dk, dv = _query_gradients(
                    k, v, p_list, start, count, queries, limits, route, c, a, dk, dv,
                    SPEC, POWER, False, N,
                )  # fmt: skip
        rows = p_dk + n.to(tl.int64) * dk_strides[0] + kv_h * dk_strides[2] + row * dk_strides[1]
        store_rows(rows, dk * scale, inside, SPEC.head_dim, SPEC.head_pad)
        rows = p_dv + n.to(tl.int64) * dv_strides[0] + kv_h * dv_strides[2] + row * dv_strides[1]
        store_rows(rows, dv, inside, SPEC.value_dim, SPEC.value_pad)
