"""Kernels of the backward: the right side of the adjoint system, dq by queries, dk and dv by keys.

With a_j = do.v_j, its mean under p, u_j = a_j - mean(a) + y.c_j and w_j = 1 - r.c_j, where y solves the
adjoint system, the gradient of a score is p_j (u_j w_j - sum_i p_i u_i w_i).
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.tiles import (
    box_rows,
    box_tokens,
    first_token,
    load_rows,
    matrix_start,
    store_rows,
    tile_count,
)
from foveal.engines.local_linear.pairs import finite, key_box, row_levels, value_box


@triton.jit
def _add_adjoint(s, k, v, lse, do, rows, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """sum_j p_j a_j k_j and sum_j p_j a_j over one more box."""
    acc, total = rows
    if MASKED:
        k, v = finite(k), finite(v)
    p = tl.exp2(s - lse[:, None])
    w = p * tl.dot(do, tl.trans(v), input_precision=SPEC.precision)
    return tl.dot(w.to(k.dtype), k, acc, input_precision=SPEC.precision), total + tl.sum(w, 1)


@triton.jit
def local_linear_adjoint(
    p_q, p_do, p_mean, p_lse, p_b, p_average, q_strides, do_strides, strides, q_lengths,
    keys, values, heads, groups, unit, route, SPEC: tl.constexpr,
):  # fmt: skip
    """b = -sum_j p_j a_j c_j and average = sum_j p_j a_j of one tile of queries.

    mean and b float32 share `strides`; average float32 [N, heads, Lq]; the rest as of the forward.
    """
    K_TILE: tl.constexpr = SPEC.k_tile
    Q_TILE: tl.constexpr = SPEC.q_tile
    RANK: tl.constexpr = SPEC.rank
    ROWS: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2]
    HEAD_PAD: tl.constexpr = SPEC.head_pad
    tiles = tile_count(q_lengths, Q_TILE)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    n = program // tiles // heads
    h = program // tiles % heads
    head = (keys[0] + matrix_start(n, h // groups, keys[1]), keys[1], keys[2])
    own_values = (values[0] + matrix_start(n, h // groups, values[1]), values[1])

    own = first_token(tile, q_lengths, Q_TILE)
    places, i_q, in_grid = box_tokens(own, q_lengths, q_lengths, Q_TILE, RANK)
    p_rows = p_q + matrix_start(n, h, q_strides) + box_rows(own, q_strides, Q_TILE, RANK)
    q = load_rows(p_rows, in_grid, SPEC.head_dim, SPEC.head_pad, True)
    p_rows = p_do + matrix_start(n, h, do_strides) + box_rows(own, do_strides, Q_TILE, RANK)
    do = load_rows(p_rows, in_grid, SPEC.value_dim, SPEC.value_pad, True)
    Lq = q_lengths[0] * q_lengths[1] * q_lengths[2]
    first_query = tl.cast(program // tiles, tl.int64) * Lq
    lse = row_levels(p_lse + first_query, i_q, in_grid)
    state = SPEC.route.open(route, tile, n, h, q_lengths, keys[2], Q_TILE, K_TILE, RANK)
    limits = SPEC.route.rows(route, places, in_grid, RANK)

    rows = (tl.zeros([ROWS, HEAD_PAD], tl.float32), tl.zeros([ROWS], tl.float32))
    for i in range(state[0]):
        first, whole, mark = SPEC.route.partial(route, state, i, K_TILE, RANK)
        s, k, inside = key_box(
            q, head, first, state[2], unit, route, limits, mark, whole, SPEC, True
        )
        v = value_box(own_values, first, inside, SPEC, True)
        rows = _add_adjoint(s, k, v, lse, do, rows, SPEC, True)
    if RANK == 1:
        for i in range(state[1]):
            first = SPEC.route.full(route, state, i, K_TILE)
            s, k, inside = key_box(
                q, head, first, state[2], unit, route, limits, 0, True, SPEC, False
            )
            v = value_box(own_values, first, inside, SPEC, False)
            rows = _add_adjoint(s, k, v, lse, do, rows, SPEC, False)

    acc, total = rows
    place = matrix_start(n, h, strides) + box_rows(own, strides, Q_TILE, RANK)
    mean = load_rows(p_mean + place, in_grid, SPEC.head_dim, SPEC.head_pad, True)
    seen = lse < float("inf")
    b = tl.where(seen[:, None], total[:, None] * mean - acc, 0.0)
    store_rows(p_b + place, b, in_grid, SPEC.head_dim, SPEC.head_pad)
    tl.store(p_average + first_query + i_q, tl.where(seen, total, 0.0), mask=in_grid)


@triton.jit
def _add_score(s, k, v, q_side, levels, rows, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """sum_j p_j (u_j w_j - middle) k_j, and without k_j, over one more box."""
    do, r, y = q_side
    lse, average, shift, middle = levels
    acc, total = rows
    if MASKED:
        k, v = finite(k), finite(v)
    p = tl.exp2(s - lse[:, None])
    u = tl.dot(do, tl.trans(v), input_precision=SPEC.precision)
    u = tl.dot(y, tl.trans(k), u, input_precision=SPEC.precision) - average[:, None]
    w = shift[:, None] - tl.dot(r, tl.trans(k), input_precision=SPEC.precision)
    ds = p * (u * w - middle[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=SPEC.precision), total + tl.sum(ds, 1)


@triton.jit
def local_linear_backward_q(
    p_q, p_do, p_o, p_mean, p_r, p_y, p_lse, p_average, p_dlse, p_ridge,
    p_dq, p_narrow_r, p_narrow_y, p_levels, p_share, plane,
    q_strides, do_strides, o_strides, dq_strides, strides, r_strides, dlse_strides, q_lengths,
    keys, values, heads, groups, unit, scale, route,
    SPEC: tl.constexpr, GIVEN: tl.constexpr, DETACHED: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, and what the kernel by keys reads of them.

    levels float32 [4, N, heads, Lq], `plane` apart: lse or inf, mean(a) + y.mean, 1 + r.mean, and what
    is subtracted from u w.  narrow: r and y in the dtype of k, by `strides` as mean and y.  share: -y.r.
    GIVEN: r was, and y is 0.  DETACHED: the absolute penalty is a constant.
    """
    K_TILE: tl.constexpr = SPEC.k_tile
    Q_TILE: tl.constexpr = SPEC.q_tile
    RANK: tl.constexpr = SPEC.rank
    D: tl.constexpr = SPEC.head_dim
    PAD: tl.constexpr = SPEC.head_pad
    ROWS: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2]
    tiles = tile_count(q_lengths, Q_TILE)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    n = program // tiles // heads
    h = program // tiles % heads
    head = (keys[0] + matrix_start(n, h // groups, keys[1]), keys[1], keys[2])
    own_values = (values[0] + matrix_start(n, h // groups, values[1]), values[1])

    own = first_token(tile, q_lengths, Q_TILE)
    places, i_q, in_grid = box_tokens(own, q_lengths, q_lengths, Q_TILE, RANK)
    Lq = q_lengths[0] * q_lengths[1] * q_lengths[2]
    first_query = tl.cast(program // tiles, tl.int64) * Lq
    lse = row_levels(p_lse + first_query, i_q, in_grid)
    seen = (lse < float("inf"))[:, None]
    p_rows = p_q + matrix_start(n, h, q_strides) + box_rows(own, q_strides, Q_TILE, RANK)
    q = load_rows(p_rows, in_grid, D, PAD, True)
    p_rows = p_do + matrix_start(n, h, do_strides) + box_rows(own, do_strides, Q_TILE, RANK)
    do = load_rows(p_rows, in_grid, SPEC.value_dim, SPEC.value_pad, True)
    p_rows = p_o + matrix_start(n, h, o_strides) + box_rows(own, o_strides, Q_TILE, RANK)
    o = load_rows(p_rows, in_grid, SPEC.value_dim, SPEC.value_pad, True)
    place = matrix_start(n, h, strides) + box_rows(own, strides, Q_TILE, RANK)
    mean = tl.where(seen, load_rows(p_mean + place, in_grid, D, PAD, True), 0.0)
    p_rows = p_r + matrix_start(n, h, r_strides) + box_rows(own, r_strides, Q_TILE, RANK)
    r = tl.where(seen, load_rows(p_rows, in_grid, D, PAD, True).to(tl.float32), 0.0)
    average = tl.load(p_average + first_query + i_q, mask=in_grid, other=0.0)
    p_rows = p_dlse + n.to(tl.int64) * dlse_strides[0] + h.to(tl.int64) * dlse_strides[1]
    dlse = tl.load(p_rows + i_q.to(tl.int64) * dlse_strides[2], mask=in_grid, other=0.0)
    middle = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1) - average
    narrow_r = r.to(q.dtype)
    shift = 1.0 + tl.sum(narrow_r.to(tl.float32) * mean, 1)
    store_rows(p_narrow_r + place, narrow_r, in_grid, D, PAD)
    narrow_y = tl.zeros([ROWS, PAD], q.dtype)
    penalty = dlse
    if not GIVEN:
        y = tl.where(seen, load_rows(p_y + place, in_grid, D, PAD, True), 0.0)
        narrow_y = y.to(q.dtype)
        ridge = tl.load(p_ridge + h)
        product = tl.sum(y * r, 1)
        middle += ridge * product - tl.sum(y * (mean - tl.where(seen, q, 0.0).to(tl.float32)), 1)
        average += tl.sum(narrow_y.to(tl.float32) * mean, 1)
        tl.store(p_share + first_query + i_q, -product, mask=in_grid)
        if DETACHED:
            penalty += ridge * product
    store_rows(p_narrow_y + place, narrow_y, in_grid, D, PAD)
    # Any number will do, the sum over the pairs corrects it; values that are not finite give none.
    middle = tl.where((lse < float("inf")) & (middle - middle == 0.0), middle, 0.0)
    penalty = tl.where(lse < float("inf"), penalty, 0.0)
    state = SPEC.route.open(route, tile, n, h, q_lengths, keys[2], Q_TILE, K_TILE, RANK)
    limits = SPEC.route.rows(route, places, in_grid, RANK)

    q_side = (do, narrow_r, narrow_y)
    levels = (lse, average, shift, middle)
    rows = (tl.zeros([ROWS, PAD], tl.float32), tl.zeros([ROWS], tl.float32))
    for i in range(state[0]):
        first, whole, mark = SPEC.route.partial(route, state, i, K_TILE, RANK)
        s, k, inside = key_box(
            q, head, first, state[2], unit, route, limits, mark, whole, SPEC, True
        )
        v = value_box(own_values, first, inside, SPEC, True)
        rows = _add_score(s, k, v, q_side, levels, rows, SPEC, True)
    if RANK == 1:
        for i in range(state[1]):
            first = SPEC.route.full(route, state, i, K_TILE)
            s, k, inside = key_box(
                q, head, first, state[2], unit, route, limits, 0, True, SPEC, False
            )
            v = value_box(own_values, first, inside, SPEC, False)
            rows = _add_score(s, k, v, q_side, levels, rows, SPEC, False)

    acc, total = rows
    mean = tl.where(seen, load_rows(p_mean + place, in_grid, D, PAD, True), 0.0)
    dq = scale * (acc + (penalty - total)[:, None] * mean)
    if not GIVEN:
        dq -= tl.where(seen, load_rows(p_y + place, in_grid, D, PAD, True), 0.0)
    p_rows = p_dq + matrix_start(n, h, dq_strides) + box_rows(own, dq_strides, Q_TILE, RANK)
    store_rows(p_rows, tl.where(seen, dq, 0.0), in_grid, D, PAD)
    p_row = p_levels + first_query + i_q
    tl.store(p_row, lse, mask=in_grid)
    tl.store(p_row + plane, average, mask=in_grid)
    tl.store(p_row + 2 * plane, shift, mask=in_grid)
    tl.store(p_row + 3 * plane, middle + total - penalty, mask=in_grid)


@triton.jit
def _add_queries(
    k, v, queries, unit, scale, box, stops, limits, route, rows,
    SPEC: tl.constexpr, GIVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk and dv with the queries of one more box; weights stand keys first."""
    K_TILE: tl.constexpr = SPEC.k_tile
    Q_TILE: tl.constexpr = SPEC.q_tile
    RANK: tl.constexpr = SPEC.rank
    p_q, q_strides, p_do, do_strides, p_r, p_y, strides, p_levels, plane, q_lengths = queries
    dk, dv = rows
    first = box[0]
    places, i_q, inside = box_tokens(first, stops, q_lengths, Q_TILE, RANK)
    lse = tl.load(p_levels + i_q, mask=inside, other=float("inf"))
    average = tl.load(p_levels + plane + i_q, mask=inside, other=0.0)
    shift = tl.load(p_levels + 2 * plane + i_q, mask=inside, other=0.0)
    middle = tl.load(p_levels + 3 * plane + i_q, mask=inside, other=0.0)
    counts = lse < float("inf")
    p_rows = p_q + box_rows(first, q_strides, Q_TILE, RANK)
    q = load_rows(p_rows, counts, SPEC.head_dim, SPEC.head_pad, True)
    p_rows = p_do + box_rows(first, do_strides, Q_TILE, RANK)
    do = load_rows(p_rows, counts, SPEC.value_dim, SPEC.value_pad, True)
    place = box_rows(first, strides, Q_TILE, RANK)
    r = load_rows(p_r + place, counts, SPEC.head_dim, SPEC.head_pad, True)

    s = tl.dot(k, tl.trans(q), input_precision=SPEC.precision) * unit
    p = tl.exp2(s - lse[None, :])
    if MASKED:
        seen = SPEC.route.sees(route, limits, box[2], places, K_TILE, Q_TILE, RANK)
        p = tl.where(seen, p, 0.0)
    u = tl.dot(v, tl.trans(do), input_precision=SPEC.precision)
    w = shift[None, :] - tl.dot(k, tl.trans(r), input_precision=SPEC.precision)
    kept = (p * w).to(do.dtype)
    dv = tl.dot(kept, do, dv, input_precision=SPEC.precision)
    if not GIVEN:
        y = load_rows(p_y + place, counts, SPEC.head_dim, SPEC.head_pad, True)
        u = tl.dot(k, tl.trans(y), u, input_precision=SPEC.precision)
        dk = tl.dot(kept.to(y.dtype), y, dk, input_precision=SPEC.precision)
    u = u - average[None, :]
    dk = tl.dot((-p * u).to(r.dtype), r, dk, input_precision=SPEC.precision)
    ds = p * (u * w - middle[None, :]) * scale
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=SPEC.precision), dv


@triton.jit
def local_linear_backward_kv(
    p_q, p_do, p_r, p_y, p_levels, plane, p_dk, p_dv,
    q_strides, do_strides, strides, dk_strides, dv_strides, q_lengths,
    keys, values, heads, groups, unit, scale, route, SPEC: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, summed over the query heads that share it.

    r and y as `narrow` and levels as of `local_linear_backward_q`.
    """
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    RANK: tl.constexpr = SPEC.rank
    ROWS: tl.constexpr = K_TILE[0] * K_TILE[1] * K_TILE[2]
    HEAD_PAD: tl.constexpr = SPEC.head_pad
    VALUE_PAD: tl.constexpr = SPEC.value_pad
    k_lengths = keys[2]
    tiles = tile_count(k_lengths, K_TILE)
    program = tl.program_id(0)
    tile = program % tiles  # of a causal pattern the longest first
    kv_heads = heads // groups
    n = program // tiles // kv_heads
    kv_h = program // tiles % kv_heads
    own = first_token(tile, k_lengths, K_TILE)
    places, _, in_grid = box_tokens(own, k_lengths, k_lengths, K_TILE, RANK)
    p_rows = keys[0] + matrix_start(n, kv_h, keys[1]) + box_rows(own, keys[1], K_TILE, RANK)
    k = finite(load_rows(p_rows, in_grid, SPEC.head_dim, SPEC.head_pad, True))
    p_rows = values[0] + matrix_start(n, kv_h, values[1]) + box_rows(own, values[1], K_TILE, RANK)
    v = finite(load_rows(p_rows, in_grid, SPEC.value_dim, SPEC.value_pad, True))
    limits = SPEC.route.rows(route, places, in_grid, RANK)
    Lq = q_lengths[0] * q_lengths[1] * q_lengths[2]

    rows = (tl.zeros([ROWS, HEAD_PAD], tl.float32), tl.zeros([ROWS, VALUE_PAD], tl.float32))
    for g in range(groups):
        h = kv_h * groups + g
        state = SPEC.route.open(route, tile, n, h, k_lengths, q_lengths, K_TILE, Q_TILE, RANK)
        start = matrix_start(n, h, strides)
        queries = (
            p_q + matrix_start(n, h, q_strides), q_strides,
            p_do + matrix_start(n, h, do_strides), do_strides,
            p_r + start, p_y + start, strides,
            p_levels + (n.to(tl.int64) * heads + h) * Lq, plane, q_lengths,
        )  # fmt: skip
        for i in range(state[0]):
            box = SPEC.route.partial(route, state, i, Q_TILE, RANK)
            rows = _add_queries(
                k, v, queries, unit, scale, box, state[2], limits, route, rows, SPEC, GIVEN, True
            )
        if RANK == 1:
            for i in range(state[1]):
                box = (SPEC.route.full(route, state, i, Q_TILE), True, i)
                rows = _add_queries(
                    k, v, queries, unit, scale, box, state[2], limits, route, rows,
                    SPEC, GIVEN, False,
                )  # fmt: skip
    dk, dv = rows
    p_rows = p_dk + matrix_start(n, kv_h, dk_strides) + box_rows(own, dk_strides, K_TILE, RANK)
    store_rows(p_rows, dk, in_grid, SPEC.head_dim, SPEC.head_pad)
    p_rows = p_dv + matrix_start(n, kv_h, dv_strides) + box_rows(own, dv_strides, K_TILE, RANK)
    store_rows(p_rows, dv, in_grid, SPEC.value_dim, SPEC.value_pad)
