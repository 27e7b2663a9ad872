"""Forward of the portable GPU edition: one program per query tile and head."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.softmax import (
    LN2,
    LOG2E,
    any_not_finite,
    row_lse,
    running_softmax,
    visible_product,
)
from foveal.engines.common.tiles import (
    load_rows,
    matrix_start,
    place_in,
    raster,
    row_offsets,
    store_rows,
    tile_count,
    tile_place,
    within,
)


@triton.jit
def _tile_scores(
    q, p_k, k_strides, first, stops, k_lengths, n, h, i_q, in_grid, scale, cap, first_term, second_term,
    K_TILE: tl.constexpr, RANK: tl.constexpr, SHAPE: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of q on the keys of the box at `first`, before the test; and the keys' places."""
    KX: tl.constexpr = K_TILE[0]
    KY: tl.constexpr = K_TILE[1]
    KZ: tl.constexpr = K_TILE[2]
    kx, ky, kz = place_in(tl.arange(0, KX * KY * KZ), K_TILE)
    x, y, z = first[0] + kx, first[1] + ky, first[2] + kz
    inside = within(x, y, z, stops, RANK)
    p_rows = p_k + row_offsets(first[0], first[1], first[2], k_strides, RANK)
    p_rows += row_offsets(kx, ky, kz, k_strides, RANK)
    k = load_rows(p_rows, inside, D, D_PAD, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = SHAPE.value(s, scale, cap)
    i_k = raster(x, y, z, k_lengths)[None, :]
    here = in_grid[:, None] & inside[None, :]
    s += FIRST.value(first_term, n, h, i_q[:, None], i_k, here) * LOG2E
    s += SECOND.value(second_term, n, h, i_q[:, None], i_k, here) * LOG2E
    return s, x, y, z, inside


@triton.jit
def _values(p_v, v_strides, first, inside, K_TILE: tl.constexpr, RANK: tl.constexpr,
            DV: tl.constexpr, DV_PAD: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    KX: tl.constexpr = K_TILE[0]
    KY: tl.constexpr = K_TILE[1]
    KZ: tl.constexpr = K_TILE[2]
    kx, ky, kz = place_in(tl.arange(0, KX * KY * KZ), K_TILE)
    p_rows = p_v + row_offsets(first[0], first[1], first[2], v_strides, RANK)
    p_rows += row_offsets(kx, ky, kz, v_strides, RANK)
    return load_rows(p_rows, inside, DV, DV_PAD, MASKED)


@triton.jit
def tile_attend_forward(
    p_q, p_k, p_v, p_o, p_lse, p_sink,
    q_strides, k_strides, v_strides, o_strides, q_lengths, k_lengths,
    heads, groups, scale, cap, route, first_term, second_term,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, RANK: tl.constexpr, ROUTE: tl.constexpr,
    SHAPE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of queries.

    Tensors [N, x, y, z, H, D] by strides (batch, x, y, z, head); lse float32 [N, heads, queries].
    scale and cap as SHAPE reads them.
    """
    QX: tl.constexpr = Q_TILE[0]
    QY: tl.constexpr = Q_TILE[1]
    QZ: tl.constexpr = Q_TILE[2]
    ROWS: tl.constexpr = QX * QY * QZ
    tiles = tile_count(q_lengths, Q_TILE)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # causal patterns: the longest first
    n = program // tiles // heads
    h = program // tiles % heads
    p_k += matrix_start(n, h // groups, k_strides)
    p_v += matrix_start(n, h // groups, v_strides)

    tx, ty, tz = tile_place(tile, q_lengths, Q_TILE)
    rx, ry, rz = place_in(tl.arange(0, ROWS), Q_TILE)
    qx, qy, qz = tx * QX + rx, ty * QY + ry, tz * QZ + rz
    in_grid = within(qx, qy, qz, q_lengths, RANK)
    i_q = raster(qx, qy, qz, q_lengths)
    offsets = row_offsets(qx, qy, qz, q_strides, RANK)
    q = load_rows(p_q + matrix_start(n, h, q_strides) + offsets, in_grid, D, D_PAD, True)

    state = ROUTE.open(route, tile, n, h, q_lengths, k_lengths, Q_TILE, K_TILE, RANK)
    rows = ROUTE.rows(route, qx, qy, qz, in_grid, RANK)
    unit = SHAPE.unit(scale)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if p_sink is not None:
        largest += tl.load(p_sink + h).to(tl.float32) * LOG2E + float("inf")
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for i in range(state[0]):
        first, whole, mark = ROUTE.partial(route, state, i, K_TILE, RANK)
        s, x, y, z, inside = _tile_scores(
            q, p_k, k_strides, first, state[2], k_lengths, n, h, i_q, in_grid, scale, cap,
            first_term, second_term, K_TILE, RANK, SHAPE, FIRST, SECOND, D, D_PAD, True, PRECISION,
        )  # fmt: skip
        if RANK == 1:
            seen = ROUTE.sees(route, rows, mark, x, y, z, Q_TILE, K_TILE, RANK)
            s = tl.where(seen, s, float("-inf"))
        elif not whole:
            seen = ROUTE.sees(route, rows, mark, x, y, z, Q_TILE, K_TILE, RANK)
            s = tl.where(seen, s, float("-inf"))
        p, factor, largest, total = running_softmax(s, unit, largest, total)
        v = _values(p_v, v_strides, first, inside, K_TILE, RANK, DV, DV_PAD, True)
        acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)
    if RANK == 1:
        for i in range(state[1]):
            first = ROUTE.full(route, state, i, K_TILE)
            s, x, y, z, inside = _tile_scores(
                q, p_k, k_strides, first, state[2], k_lengths, n, h, i_q, in_grid, scale, cap,
                first_term, second_term, K_TILE, RANK, SHAPE, FIRST, SECOND, D, D_PAD, False,
                PRECISION,
            )  # fmt: skip
            p, factor, largest, total = running_softmax(s, unit, largest, total)
            v = _values(p_v, v_strides, first, inside, K_TILE, RANK, DV, DV_PAD, False)
            acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)

    lse = row_lse(largest, total)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(p_o, acc)
