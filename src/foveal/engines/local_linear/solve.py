"""The kernel that solves: conjugate gradients for a tile of queries, its keys streamed once per iteration."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.early import gdc_launch_dependents, gdc_wait
from foveal.engines.common.tiles import (
    box_rows,
    box_tokens,
    first_token,
    load_rows,
    matrix_start,
    store_rows,
    tile_count,
)
from foveal.engines.local_linear.pairs import finite, key_box, product_with, row_levels


@triton.jit
def _add_image(s, k, lse, d, shift, rows, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """sums over one more box of w_j k_j, w_j and w_j^2, w_j = p_j d.c_j; shift = d.mean."""
    acc, total, squares = rows
    if MASKED:
        k = finite(k)
    p = tl.exp2(s - lse[:, None])
    w = p * (tl.dot(d, tl.trans(k), input_precision=SPEC.precision) - shift[:, None])
    total += tl.sum(w, 1)
    if not SPEC.precise:
        squares += tl.sum(w * w, 1)
    return product_with(w, k, acc, SPEC), total, squares


@triton.jit
def _precise_mean(q, head, unit, route, state, limits, lse, SPEC: tl.constexpr):
    """sum_j p_j k_j of a tile of queries."""
    K_TILE: tl.constexpr = SPEC.k_tile
    RANK: tl.constexpr = SPEC.rank
    PAD: tl.constexpr = SPEC.head_pad
    ROWS: tl.constexpr = q.shape[0]
    mean = tl.zeros([ROWS, PAD], tl.float32)
    for i in range(state[0]):
        first, whole, mark = SPEC.route.partial(route, state, i, K_TILE, RANK)
        s, k, _ = key_box(q, head, first, state[2], unit, route, limits, mark, whole, SPEC, True)
        mean = product_with(tl.exp2(s - lse[:, None]), finite(k), mean, SPEC)
    if RANK == 1:
        for i in range(state[1]):
            first = SPEC.route.full(route, state, i, K_TILE)
            s, k, _ = key_box(q, head, first, state[2], unit, route, limits, 0, True, SPEC, False)
            mean = product_with(tl.exp2(s - lse[:, None]), k, mean, SPEC)
    return mean


@triton.jit
def _largest(x):
    """Of every row, the largest |x|; 1 for a row that is 0 or next to it."""
    largest = tl.max(tl.abs(x), 1)
    return tl.where(largest > 1e-30, largest, 1.0)


@triton.jit
def _scaled(d):
    """Rows of length 64: in 16 bits small numbers would lose digits, and products of long rows overflow."""
    d = d / _largest(d)[:, None]
    square = tl.sum(d * d, 1)
    return d * (64.0 / tl.sqrt(tl.where(square > 1e-30, square, 1.0)))[:, None]


@triton.jit
def local_linear_solve(
    p_q, p_b, p_mean, p_lse, p_ridge, p_noise, p_x, p_residual, p_direction, p_reached, p_count, told,
    q_strides, b_strides, strides, q_lengths, keys, heads, groups, unit, tolerance, most, route,
    SPEC: tl.constexpr, ADJOINT: tl.constexpr, AGAIN: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """x with (sum_j p_j c_j c_j^T + ridge I) x = b for one tile of queries; b is mean - q, or p_b if ADJOINT.

    x and residual float32, direction in the dtype of k, and mean, share `strides`.  Directions are rounded
    before they are used at all, and steps follow from products as computed, so the recursion is exact up to
    the rounding of w: that adds noise, a variance of p_noise per squared w, to what each step subtracts.
    A row rests once its residual is at most `tolerance` times |b|, and in the forward 2 sqrt(ridge).
    reached float32 [N, heads, Lq]: residual over that limit, or noise over eight times it if that is
    more; AGAIN solves only tiles in which it is above 1, and finds their means again.
    count int32 [N, heads, Lq]: iterations of the tile of a row; in the end direction is x in the dtype of k.
    told, for AGAIN, may be (two marks, of which one is set if any tile has work, and all have if it is the
    first, and what the rounding of the mean took from x.mean [N, heads, Lq], which is 0 then).
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if len(told) > 0:  # noqa: SIM102
        if (tl.load(told[0]) == 0) & (tl.load(told[0] + 1) == 0):
            return
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

    own = first_token(tile, q_lengths, Q_TILE)
    places, i_q, in_grid = box_tokens(own, q_lengths, q_lengths, Q_TILE, RANK)
    Lq = q_lengths[0] * q_lengths[1] * q_lengths[2]
    first_query = tl.cast(program // tiles, tl.int64) * Lq
    p_row = p_reached + first_query + i_q
    if AGAIN:
        reached = tl.load(p_row, mask=in_grid, other=0.0)
        every = 0
        if len(told) > 0:
            every = tl.load(told[0])
        if (tl.max(reached, 0) <= 1.0) & (every == 0):
            return
    state = SPEC.route.open(route, tile, n, h, q_lengths, keys[2], Q_TILE, K_TILE, RANK)
    limits = SPEC.route.rows(route, places, in_grid, RANK)
    lse = row_levels(p_lse + first_query, i_q, in_grid)
    p_rows = p_q + matrix_start(n, h, q_strides) + box_rows(own, q_strides, Q_TILE, RANK)
    q = load_rows(p_rows, in_grid, D, PAD, True)
    place = matrix_start(n, h, strides) + box_rows(own, strides, Q_TILE, RANK)
    if ADJOINT:
        p_rows = p_b + matrix_start(n, h, b_strides) + box_rows(own, b_strides, Q_TILE, RANK)
        b = load_rows(p_rows, in_grid, D, PAD, True)
        # Gradients may be so small that their squares are 0.
        unit_b = _largest(b)
        b = b / unit_b[:, None]
    else:
        b = load_rows(p_mean + place, in_grid, D, PAD, True)
        if AGAIN:
            b = _precise_mean(q, head, unit, route, state, limits, lse, SPEC)
            store_rows(p_mean + place, b, in_grid, D, PAD)
        b = tl.where((lse < float("inf"))[:, None], b - q.to(tl.float32), 0.0)
    ridge = tl.load(p_ridge + h)
    noise = tl.load(p_noise)

    size = tl.sum(b * b, 1)
    allowed = size if ADJOINT else tl.minimum(size, 4.0 * ridge)
    allowed = allowed * tolerance * tolerance
    drift = tl.zeros([ROWS], tl.float32)
    store_rows(p_x + place, tl.zeros([ROWS, PAD], tl.float32), in_grid, D, PAD)
    store_rows(p_residual + place, b, in_grid, D, PAD)
    floor = allowed
    store_rows(p_direction + place, _scaled(b).to(q.dtype), in_grid, D, PAD)
    count = 0
    while (count < most) & (tl.max(tl.where(size > floor, 1, 0), 0) > 0):
        tl.debug_barrier()
        d = load_rows(p_direction + place, in_grid, D, PAD, True)
        mean = load_rows(p_mean + place, in_grid, D, PAD, True)
        shift = tl.sum(d.to(tl.float32) * mean, 1)
        rows = (
            tl.zeros([ROWS, PAD], tl.float32),
            tl.zeros([ROWS], tl.float32),
            tl.zeros([ROWS], tl.float32),
        )
        for i in range(state[0]):
            first, whole, mark = SPEC.route.partial(route, state, i, K_TILE, RANK)
            s, k, _ = key_box(
                q, head, first, state[2], unit, route, limits, mark, whole, SPEC, True
            )
            rows = _add_image(s, k, lse, d, shift, rows, SPEC, True)
        if RANK == 1:
            for i in range(state[1]):
                first = SPEC.route.full(route, state, i, K_TILE)
                s, k, _ = key_box(
                    q, head, first, state[2], unit, route, limits, 0, True, SPEC, False
                )
                rows = _add_image(s, k, lse, d, shift, rows, SPEC, False)
        image, total, squares = rows
        wide = load_rows(p_direction + place, in_grid, D, PAD, True).to(tl.float32)
        # The mean was rounded; with this the product stays symmetric.
        mean = load_rows(p_mean + place, in_grid, D, PAD, True)
        image += ridge * wide - total[:, None] * mean
        residual = load_rows(p_residual + place, in_grid, D, PAD, True)
        energy = tl.sum(wide * image, 1)
        # A product that is not positive is all noise: the row ends where it is.
        floor = tl.where(energy > 0.0, floor, float("inf"))
        energy = tl.where(energy > 0.0, energy, 1.0)
        step = tl.where(size > floor, tl.sum(residual * wide, 1) / energy, 0.0)
        residual -= step[:, None] * image
        size = tl.sum(residual * residual, 1)
        drift += step * step * noise * squares
        turn = -tl.sum(residual * image, 1) / energy
        tl.debug_barrier()
        store_rows(p_residual + place, residual, in_grid, D, PAD)
        turned = _scaled(residual + turn[:, None] * wide)
        store_rows(p_direction + place, turned.to(q.dtype), in_grid, D, PAD)
        x = load_rows(p_x + place, in_grid, D, PAD, True)
        store_rows(p_x + place, x + step[:, None] * wide, in_grid, D, PAD)
        count += 1
    tl.debug_barrier()
    x = load_rows(p_x + place, in_grid, D, PAD, True)
    if ADJOINT:
        x *= unit_b[:, None]
        tl.debug_barrier()
        store_rows(p_x + place, x, in_grid, D, PAD)
    store_rows(p_direction + place, x.to(q.dtype), in_grid, D, PAD)
    if not AGAIN:
        size = tl.maximum(size, drift / 64.0)
    counts = tl.full([ROWS], 0, tl.int32) + count
    if AGAIN:
        counts += tl.load(p_count + first_query + i_q, mask=in_grid, other=0)
    ratio = tl.sqrt(size / tl.where(allowed > 0.0, allowed, 1.0))
    if len(told) > 0:
        tl.store(told[1] + first_query + i_q, tl.zeros([ROWS], tl.float32), mask=in_grid)
    tl.store(p_count + first_query + i_q, counts, mask=in_grid)
    tl.store(p_row, ratio, mask=in_grid)
