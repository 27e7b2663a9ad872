"""Where NaN or inf spread to gradients of tokens that no visible pair connects to them: those once more.

The backward multiplies hidden pairs by 0, and 0 x NaN is NaN.  It marks the tiles whose gradients are not
finite; these kernels leave all others alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.softmax import contained_product
from foveal.engines.common.tiles import (
    first_token,
    load_rows,
    matrix_start,
    store_rows,
    tile_count,
    tile_rows,
    tile_tokens,
)
from foveal.engines.tile.backward import key_pairs, own_levels, query_pairs


@triton.jit
def _visit(route, state, i, OTHER: tl.constexpr, SPEC: tl.constexpr):
    """The i-th tile that is visited, partial ones first: its first token, its mark, whether it is full."""
    last_partial = tl.maximum(state[0] - 1, 0)
    box = SPEC.route.partial(route, state, tl.minimum(i, last_partial), OTHER, SPEC.rank)
    is_full = i >= state[0]
    if SPEC.rank == 1:
        full = SPEC.route.full(route, state, tl.where(is_full, i, 0) - state[0], OTHER)
        x = tl.where(is_full, full[0], box[0][0])
        y = tl.where(is_full, full[1], box[0][1])
        z = tl.where(is_full, full[2], box[0][2])
    else:
        x, y, z = box[0]
    return (x, y, z), box[2], is_full


@triton.jit
def tile_attend_repair_q(
    p_q, p_do, p_dq, p_levels, plane, p_suspect, q_strides, do_strides, dq_strides, q_lengths,
    keys, heads, groups, product_scale, scoring, route, SPEC: tl.constexpr,
):  # fmt: skip
    """Writes dq of the tiles that are suspect; arguments as of the backward."""
    K_TILE: tl.constexpr = SPEC.k_tile
    Q_TILE: tl.constexpr = SPEC.q_tile
    RANK: tl.constexpr = SPEC.rank
    ROWS: tl.constexpr = 16
    PARTS: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2] // ROWS
    HEAD_PAD: tl.constexpr = SPEC.head_pad
    program = tl.program_id(0)
    parts = tl.where(tl.load(p_suspect + program) == 0, 0, PARTS)
    tiles = tile_count(q_lengths, Q_TILE)
    tile = tiles - 1 - program % tiles
    matrix = program // tiles
    n = matrix // heads
    h = matrix % heads
    p_k = keys[0] + matrix_start(n, h // groups, keys[1])
    p_v = keys[2] + matrix_start(n, h // groups, keys[3])
    head = (p_k, keys[1], p_v, keys[3], keys[4])
    own = first_token(tile, q_lengths, Q_TILE)
    first_query = matrix.to(tl.int64) * q_lengths[0] * q_lengths[1] * q_lengths[2]
    for part in tl.range(0, parts, num_stages=1):
        state = SPEC.route.open(route, tile, n, h, q_lengths, keys[4], Q_TILE, K_TILE, RANK)
        index = part * ROWS + tl.arange(0, ROWS)
        places, i_q, in_grid = tile_tokens(index, own, q_lengths, q_lengths, Q_TILE, RANK)
        p_rows = p_q + matrix_start(n, h, q_strides)
        p_rows += tile_rows(index, own, q_strides, Q_TILE, RANK)
        q = load_rows(p_rows, in_grid, SPEC.head_dim, SPEC.head_pad, True)
        p_rows = p_do + matrix_start(n, h, do_strides)
        p_rows += tile_rows(index, own, do_strides, Q_TILE, RANK)
        do = load_rows(p_rows, in_grid, SPEC.value_dim, SPEC.value_pad, True)
        limits = SPEC.route.rows(route, places, in_grid, RANK)
        lse, shift = own_levels(p_levels + first_query, plane, i_q, in_grid)
        queries = (n, h, i_q, in_grid)
        dq = tl.zeros([ROWS, HEAD_PAD], tl.float32)
        for i in tl.range(0, state[0] + state[1], num_stages=1):
            first, mark, full = _visit(route, state, i, K_TILE, SPEC)
            ds, inside, others, _, bare, k = key_pairs(
                q, do, lse, shift, queries, head, scoring, first, state[2], SPEC, True
            )
            test = SPEC.route.sees(route, limits, mark, others, Q_TILE, K_TILE, RANK)
            seen = (full | test) & inside[None, :] & in_grid[:, None]
            ds = tl.where(seen, ds * SPEC.shape.slope(bare, scoring[1]), 0.0)
            dq = contained_product(ds, seen, k, dq)
        p_rows = p_dq + matrix_start(n, h, dq_strides)
        p_rows += tile_rows(index, own, dq_strides, Q_TILE, RANK)
        store_rows(p_rows, dq * product_scale, in_grid, SPEC.head_dim, SPEC.head_pad)


@triton.jit
def tile_attend_repair_kv(
    p_q, p_do, p_levels, plane, p_dk, p_dv, p_suspect,
    q_strides, do_strides, dk_strides, dv_strides,
    q_lengths, keys, heads, groups, product_scale, scoring, route, SPEC: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv of the tiles that are suspect; arguments as of the backward."""
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    RANK: tl.constexpr = SPEC.rank
    ROWS: tl.constexpr = 16
    PARTS: tl.constexpr = K_TILE[0] * K_TILE[1] * K_TILE[2] // ROWS
    HEAD_PAD: tl.constexpr = SPEC.head_pad
    VALUE_PAD: tl.constexpr = SPEC.value_pad
    k_lengths = keys[4]
    program = tl.program_id(0)
    parts = tl.where(tl.load(p_suspect + program) == 0, 0, PARTS)
    tiles = tile_count(k_lengths, K_TILE)
    tile = program % tiles
    kv_heads = heads // groups
    n = program // tiles // kv_heads
    kv_h = program // tiles % kv_heads
    own = first_token(tile, k_lengths, K_TILE)
    p_k = keys[0] + matrix_start(n, kv_h, keys[1])
    p_v = keys[2] + matrix_start(n, kv_h, keys[3])
    for part in tl.range(0, parts, num_stages=1):
        index = part * ROWS + tl.arange(0, ROWS)
        places, i_k, in_grid = tile_tokens(index, own, k_lengths, k_lengths, K_TILE, RANK)
        p_rows = p_k + tile_rows(index, own, keys[1], K_TILE, RANK)
        k = load_rows(p_rows, in_grid, SPEC.head_dim, SPEC.head_pad, True)
        p_rows = p_v + tile_rows(index, own, keys[3], K_TILE, RANK)
        v = load_rows(p_rows, in_grid, SPEC.value_dim, SPEC.value_pad, True)
        limits = SPEC.route.rows(route, places, in_grid, RANK)
        dk = tl.zeros([ROWS, HEAD_PAD], tl.float32)
        dv = tl.zeros([ROWS, VALUE_PAD], tl.float32)
        for g in tl.range(0, groups, num_stages=1):
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
            for i in tl.range(0, state[0] + state[1], num_stages=1):
                first, mark, full = _visit(route, state, i, Q_TILE, SPEC)
                p, ds, inside, others, bare, q, do = query_pairs(
                    k, v, own_keys, queries, scoring, first, state[2], SPEC
                )
                test = SPEC.route.sees(route, limits, mark, others, K_TILE, Q_TILE, RANK)
                seen = (full | test) & inside[None, :] & in_grid[:, None]
                dv = contained_product(tl.where(seen, p, 0.0), seen, do, dv)
                ds = tl.where(seen, ds * SPEC.shape.slope(bare, scoring[1]), 0.0)
                dk = contained_product(ds, seen, q, dk)
        p_rows = p_dk + matrix_start(n, kv_h, dk_strides)
        p_rows += tile_rows(index, own, dk_strides, K_TILE, RANK)
        store_rows(p_rows, dk * product_scale, in_grid, SPEC.head_dim, SPEC.head_pad)
        p_rows = p_dv + matrix_start(n, kv_h, dv_strides)
        p_rows += tile_rows(index, own, dv_strides, K_TILE, RANK)
        store_rows(p_rows, dv, in_grid, SPEC.value_dim, SPEC.value_pad)
