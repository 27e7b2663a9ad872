"""Backward of the portable GPU edition: two kernels without atomics, one for dQ, one for dK and dV."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.softmax import LOG2E, any_not_finite
from foveal.engines.common.tiles import (
    box_rows,
    box_tokens,
    first_token,
    load_rows,
    matrix_start,
    store_rows,
    tile_count,
)
from foveal.engines.tile.forward import load_values, scores


@triton.jit
def tile_attend_backward_shift(
    p_o, p_do, p_lse, p_dlse, p_levels, plane, o_strides, do_strides, dlse_strides, heads, Lq,
    DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """levels: what weights P and dS = P (dP - shift) of ROWS queries are measured against.

    First the lse, or inf, which makes all weights 0, for -inf; then shift = sum(o do) - dlse.
    o, do [N, Lq, heads, DV] by strides (batch, token, head); base-2 lse float32 [N, heads, Lq], levels
    [2, N, heads, Lq], `plane` apart.
    """
    tiles = tl.cdiv(Lq, ROWS)
    program = tl.program_id(0)
    n = (program // tiles // heads).to(tl.int64)
    h = (program // tiles % heads).to(tl.int64)
    i_q = program % tiles * ROWS + tl.arange(0, ROWS)
    inside = i_q < Lq
    row = i_q.to(tl.int64)
    p_rows = p_o + n * o_strides[0] + h * o_strides[2] + row * o_strides[1]
    o = load_rows(p_rows, inside, DV, DV_PAD, True).to(tl.float32)
    p_rows = p_do + n * do_strides[0] + h * do_strides[2] + row * do_strides[1]
    do = load_rows(p_rows, inside, DV, DV_PAD, True).to(tl.float32)
    shift = tl.sum(o * do, 1)
    place = (program // tiles).to(tl.int64) * Lq + row
    p_rows = p_dlse + n * dlse_strides[0] + h * dlse_strides[1] + row * dlse_strides[2]
    dlse = tl.load(p_rows, mask=inside, other=0.0)
    lse = tl.load(p_lse + place, mask=inside, other=0.0)
    nothing = lse == float("-inf")
    tl.store(p_levels + place, tl.where(nothing, float("inf"), lse), mask=inside)
    tl.store(p_levels + plane + place, shift - tl.where(nothing, 0.0, dlse), mask=inside)


@triton.jit
def own_levels(p_levels, plane, i_q, inside):
    """lse and shift of queries; inf and 0 where there is none."""
    lse = tl.load(p_levels + i_q, mask=inside, other=float("inf"))
    return lse, tl.load(p_levels + plane + i_q, mask=inside, other=0.0)


@triton.jit
def _record(p_record, term, entries, row, n, i_q, i_k, ds, seen, TERM: tl.constexpr):
    """Writes dS of every seen pair at the entry it read; a query meets no entry twice."""
    if p_record is not None:
        entry = TERM.entry(term, n, i_q, i_k, seen)
        tl.store(p_record + row * entries + entry, ds, mask=seen)


@triton.jit
def key_pairs(
    q,
    do,
    lse,
    shift,
    queries,
    keys,
    scoring,
    first,
    stops,
    SPEC: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dS of a query tile on the keys of the box at `first`, before the test.

    Returns it, whether keys are `inside`, their places and raster indices, the scores without terms, k.
    """
    s, inside, places, i_k, bare, k = scores(q, queries, keys, scoring, first, stops, SPEC, MASKED)
    p = tl.exp2(s * SPEC.shape.unit(scoring[0]) - lse[:, None])
    v = load_values(keys, first, inside, SPEC, MASKED)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=SPEC.precision) - shift[:, None])
    return ds, inside, places, i_k, bare, k


@triton.jit
def _key_box(
    q, do, lse, shift, queries, keys, scoring, records, box, stops, limits, route, dq, share,
    SPEC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq and share with the keys of one more box."""
    FIRST: tl.constexpr = SPEC.first
    SECOND: tl.constexpr = SPEC.second
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    first, mark = box[0], box[2]
    n, i_q, in_grid = queries[0], queries[2], queries[3]
    ds, inside, places, i_k, bare, k = key_pairs(
        q, do, lse, shift, queries, keys, scoring, first, stops, SPEC, MASKED
    )
    seen = in_grid[:, None] & inside[None, :]
    if MASKED:
        test = SPEC.route.sees(route, limits, mark, places, Q_TILE, K_TILE, SPEC.rank)
        seen = seen & test
        ds = tl.where(test, ds, 0.0)
    i_q, i_k = i_q[:, None], i_k[None, :]
    share += SPEC.first.share(scoring[2], n, ds, i_q, i_k, seen)
    share += SPEC.second.share(scoring[3], n, ds, i_q, i_k, seen)
    row = records[4].to(tl.int64) + i_q
    _record(records[0], scoring[2], records[1], row, n, i_q, i_k, ds, seen, FIRST)
    _record(records[2], scoring[3], records[3], row, n, i_q, i_k, ds, seen, SECOND)
    ds = ds * SPEC.shape.slope(bare, scoring[1])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=SPEC.precision), share


@triton.jit
def tile_attend_backward_q(
    p_q, p_do, p_dq, p_levels, plane, p_share, p_suspect, q_strides, do_strides, dq_strides, q_lengths,
    keys, heads, groups, product_scale, scoring, records, first_program, route, SPEC: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries; arguments as of the forward.

    p_share float32 [N, heads, Lq], or None: what each query adds to the gradient of its head's slope.
    records: per term (float32 [matrices, Lq, entries] or None, entries), counted from first_program.
    """
    K_TILE: tl.constexpr = SPEC.k_tile
    Q_TILE: tl.constexpr = SPEC.q_tile
    RANK: tl.constexpr = SPEC.rank
    ROWS: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2]
    HEAD_PAD: tl.constexpr = SPEC.head_pad
    tiles = tile_count(q_lengths, Q_TILE)
    program = tl.program_id(0) + first_program
    tile = tiles - 1 - program % tiles
    matrix = program // tiles
    n = matrix // heads
    h = matrix % heads
    p_k = keys[0] + matrix_start(n, h // groups, keys[1])
    p_v = keys[2] + matrix_start(n, h // groups, keys[3])
    head = (p_k, keys[1], p_v, keys[3], keys[4])

    own = first_token(tile, q_lengths, Q_TILE)
    places, i_q, in_grid = box_tokens(own, q_lengths, q_lengths, Q_TILE, RANK)
    p_rows = p_q + matrix_start(n, h, q_strides) + box_rows(own, q_strides, Q_TILE, RANK)
    q = load_rows(p_rows, in_grid, SPEC.head_dim, SPEC.head_pad, True)
    p_rows = p_do + matrix_start(n, h, do_strides) + box_rows(own, do_strides, Q_TILE, RANK)
    do = load_rows(p_rows, in_grid, SPEC.value_dim, SPEC.value_pad, True)
    first_query = matrix.to(tl.int64) * q_lengths[0] * q_lengths[1] * q_lengths[2]
    lse, shift = own_levels(p_levels + first_query, plane, i_q, in_grid)
    queries = (n, h, i_q, in_grid)
    first_row = (matrix - first_program // tiles) * q_lengths[0] * q_lengths[1] * q_lengths[2]
    rows = (records[0], records[1], records[2], records[3], first_row)
    state = SPEC.route.open(route, tile, n, h, q_lengths, keys[4], Q_TILE, K_TILE, RANK)
    limits = SPEC.route.rows(route, places, in_grid, RANK)
    stops = state[2]

    dq = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    share = tl.zeros([ROWS], tl.float32)
    for i in range(state[0]):
        box = SPEC.route.partial(route, state, i, K_TILE, RANK)
        dq, share = _key_box(
            q, do, lse, shift, queries, head, scoring, rows, box, stops, limits, route, dq, share,
            SPEC, True,
        )  # fmt: skip
    if RANK == 1:
        for i in range(state[1]):
            box = (SPEC.route.full(route, state, i, K_TILE), True, i)
            dq, share = _key_box(
                q, do, lse, shift, queries, head, scoring, rows, box, stops, limits, route, dq,
                share, SPEC, False,
            )  # fmt: skip
    tl.store(p_suspect + program, tl.where(state[0] > 0, any_not_finite(dq), 0))
    p_rows = p_dq + matrix_start(n, h, dq_strides) + box_rows(own, dq_strides, Q_TILE, RANK)
    store_rows(p_rows, dq * product_scale, in_grid, SPEC.head_dim, SPEC.head_pad)
    if p_share is not None:
        tl.store(p_share + first_query + i_q, share, mask=in_grid)


@triton.jit
def query_pairs(k, v, keys, queries, scoring, first, stops, SPEC: tl.constexpr):
    """Weights and dS, keys first, of a key tile on the queries of the box at `first`, before the test.

    Returns them, whether queries are `inside`, their places, the scores without terms, q, do.
    """
    Q_TILE: tl.constexpr = SPEC.q_tile
    RANK: tl.constexpr = SPEC.rank
    n, h, i_k, in_grid = keys
    p_q, q_strides, p_do, do_strides, p_levels, plane, q_lengths = queries
    scale, cap, first_term, second_term = scoring
    places, i_q, inside = box_tokens(first, stops, q_lengths, Q_TILE, RANK)
    p_rows = p_q + box_rows(first, q_strides, Q_TILE, RANK)
    q = load_rows(p_rows, inside, SPEC.head_dim, SPEC.head_pad, True)
    p_rows = p_do + box_rows(first, do_strides, Q_TILE, RANK)
    do = load_rows(p_rows, inside, SPEC.value_dim, SPEC.value_pad, True)
    # A query that is not there has q = do = 0, and so lse = shift = 0: its weights add nothing.
    lse, shift = SPEC.route.levels(p_levels, plane, i_q, inside)

    bare = SPEC.shape.value(tl.dot(k, tl.trans(q), input_precision=SPEC.precision), scale, cap)
    here = in_grid[:, None] & inside[None, :]
    s = bare + SPEC.first.value(first_term, n, h, i_q[None, :], i_k[:, None], here) * LOG2E
    s += SPEC.second.value(second_term, n, h, i_q[None, :], i_k[:, None], here) * LOG2E
    p = tl.exp2(s * SPEC.shape.unit(scale) - lse[None, :])
    ds = p * (tl.dot(v, tl.trans(do), input_precision=SPEC.precision) - shift[None, :])
    return p, ds, inside, places, bare, q, do


@triton.jit
def _query_box(
    k, v, keys, queries, scoring, box, stops, limits, route, dk, dv, share,
    SPEC: tl.constexpr, MASKED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """dk, dv and, if SHARED, share with the queries of one more box; weights stand keys first."""
    p, ds, _, places, bare, q, do = query_pairs(k, v, keys, queries, scoring, box[0], stops, SPEC)
    if MASKED:
        K_TILE: tl.constexpr = SPEC.k_tile
        Q_TILE: tl.constexpr = SPEC.q_tile
        seen = SPEC.route.sees(route, limits, box[2], places, K_TILE, Q_TILE, SPEC.rank)
        p = tl.where(seen, p, 0.0)
        ds = tl.where(seen, ds, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=SPEC.precision)
    if SHARED:
        share += tl.sum(ds, 1)
    ds = ds * SPEC.shape.slope(bare, scoring[1])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=SPEC.precision), dv, share


@triton.jit
def tile_attend_backward_kv(
    p_q, p_do, p_levels, plane, p_dk, p_dv, p_share, p_suspect,
    q_strides, do_strides, dk_strides, dv_strides,
    q_lengths, keys, heads, groups, product_scale, scoring, route, SPEC: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, summed over the query heads that share it.

    p_share float32 [N, heads, keys], or None: the sum over queries of dS.
    """
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    RANK: tl.constexpr = SPEC.rank
    ROWS: tl.constexpr = K_TILE[0] * K_TILE[1] * K_TILE[2]
    HEAD_PAD: tl.constexpr = SPEC.head_pad
    VALUE_PAD: tl.constexpr = SPEC.value_pad
    SHARED: tl.constexpr = p_share is not None
    k_lengths = keys[4]
    tiles = tile_count(k_lengths, K_TILE)
    program = tl.program_id(0)
    tile = program % tiles  # of a causal pattern the longest first
    kv_heads = heads // groups
    n = program // tiles // kv_heads
    kv_h = program // tiles % kv_heads
    own = first_token(tile, k_lengths, K_TILE)
    places, i_k, in_grid = box_tokens(own, k_lengths, k_lengths, K_TILE, RANK)
    p_rows = keys[0] + matrix_start(n, kv_h, keys[1]) + box_rows(own, keys[1], K_TILE, RANK)
    k = load_rows(p_rows, in_grid, SPEC.head_dim, SPEC.head_pad, True)
    p_rows = keys[2] + matrix_start(n, kv_h, keys[3]) + box_rows(own, keys[3], K_TILE, RANK)
    v = load_rows(p_rows, in_grid, SPEC.value_dim, SPEC.value_pad, True)
    limits = SPEC.route.rows(route, places, in_grid, RANK)

    dk = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    dv = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for g in range(groups):
        h = kv_h * groups + g
        state = SPEC.route.open(route, tile, n, h, k_lengths, q_lengths, K_TILE, Q_TILE, RANK)
        matrix = n.to(tl.int64) * heads + h
        first_query = matrix * q_lengths[0] * q_lengths[1] * q_lengths[2]
        queries = (
            p_q + matrix_start(n, h, q_strides), q_strides,
            p_do + matrix_start(n, h, do_strides), do_strides,
            p_levels + first_query, plane, q_lengths,
        )  # fmt: skip
        own_keys = (n, h, i_k, in_grid)
        share = tl.zeros([ROWS], tl.float32)
        for i in range(state[0]):
            box = SPEC.route.partial(route, state, i, Q_TILE, RANK)
            dk, dv, share = _query_box(
                k, v, own_keys, queries, scoring, box, state[2], limits, route, dk, dv, share,
                SPEC, True, SHARED,
            )  # fmt: skip
        if RANK == 1:
            for i in range(state[1]):
                box = (SPEC.route.full(route, state, i, Q_TILE), True, i)
                dk, dv, share = _query_box(
                    k, v, own_keys, queries, scoring, box, state[2], limits, route, dk, dv, share,
                    SPEC, False, SHARED,
                )  # fmt: skip
        if p_share is not None:
            p_sums = p_share + matrix * k_lengths[0] * k_lengths[1] * k_lengths[2]
            tl.store(p_sums + i_k, share, mask=in_grid)
    tl.store(p_suspect + program, any_not_finite(dk) | any_not_finite(dv))
    p_rows = p_dk + matrix_start(n, kv_h, dk_strides) + box_rows(own, dk_strides, K_TILE, RANK)
    store_rows(p_rows, dk * product_scale, in_grid, SPEC.head_dim, SPEC.head_pad)
    p_rows = p_dv + matrix_start(n, kv_h, dv_strides) + box_rows(own, dv_strides, K_TILE, RANK)
    store_rows(p_rows, dv, in_grid, SPEC.value_dim, SPEC.value_pad)
