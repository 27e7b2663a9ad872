"""Kernels of the forward: moments of the keys, and the output once r is known."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.early import gdc_launch_dependents, gdc_wait
from foveal.engines.common.softmax import contained_product, row_lse, running_softmax
from foveal.engines.common.tiles import (
    box_rows,
    box_tokens,
    first_token,
    load_rows,
    matrix_start,
    store_rows,
    tile_count,
)
from foveal.engines.local_linear.pairs import finite, key_box, pieces, row_levels, value_box


@triton.jit
def _add_keys(s, k, rows, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """The running softmax over one more box: largest score, sums of weights and of keys, rows to mark."""
    largest, total, acc, bad = rows
    p, factor, largest, total = running_softmax(s, 1.0, largest, total)
    if MASKED:
        odd = tl.max(tl.where(k - k == 0.0, 0, 1), 1)
        bad = tl.maximum(bad, tl.max(tl.where(s != float("-inf"), odd[None, :], 0), 1))
        k = finite(k)
    acc = tl.dot(p.to(k.dtype), k, acc * factor[:, None], input_precision=SPEC.precision)
    return largest, total, acc, bad


@triton.jit
def local_linear_moments(
    p_q, p_mean, p_lse, p_mark, q_strides, mean_strides, q_lengths, keys, heads, groups, unit, route,
    SPEC: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Mean key and base-2 lse of one tile of queries; NaN where a row sees a key that is not finite.

    With a mark, only if it is set.
    Tensors [N, x, y, z, H, D] by strides (batch, x, y, z, head); mean and lse [N, heads, queries] float32.
    keys: (k, its strides, lengths of the key grid); route as SPEC.route reads it.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if p_mark is not None:  # noqa: SIM102
        if tl.load(p_mark) == 0:
            return
    K_TILE: tl.constexpr = SPEC.k_tile
    Q_TILE: tl.constexpr = SPEC.q_tile
    RANK: tl.constexpr = SPEC.rank
    ROWS: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2]
    HEAD_PAD: tl.constexpr = SPEC.head_pad
    tiles = tile_count(q_lengths, Q_TILE)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # of a causal pattern the longest first
    n = program // tiles // heads
    h = program // tiles % heads
    head = (keys[0] + matrix_start(n, h // groups, keys[1]), keys[1], keys[2])

    own = first_token(tile, q_lengths, Q_TILE)
    places, i_q, in_grid = box_tokens(own, q_lengths, q_lengths, Q_TILE, RANK)
    p_rows = p_q + matrix_start(n, h, q_strides) + box_rows(own, q_strides, Q_TILE, RANK)
    q = load_rows(p_rows, in_grid, SPEC.head_dim, SPEC.head_pad, True)
    state = SPEC.route.open(route, tile, n, h, q_lengths, keys[2], Q_TILE, K_TILE, RANK)
    limits = SPEC.route.rows(route, places, in_grid, RANK)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    bad = tl.zeros([ROWS], tl.int32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for i in range(state[0]):
        first, whole, mark = SPEC.route.partial(route, state, i, K_TILE, RANK)
        s, k, _ = key_box(q, head, first, state[2], unit, route, limits, mark, whole, SPEC, True)
        rows = (largest, total, acc, bad)
        largest, total, acc, bad = _add_keys(s, k, rows, SPEC, True)
    if RANK == 1:
        for i in range(state[1]):
            first = SPEC.route.full(route, state, i, K_TILE)
            s, k, _ = key_box(q, head, first, state[2], unit, route, limits, 0, True, SPEC, False)
            rows = (largest, total, acc, bad)
            largest, total, acc, bad = _add_keys(s, k, rows, SPEC, False)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    acc = tl.where(bad[:, None] > 0, float("nan"), acc)
    lse = tl.where(bad > 0, float("nan"), row_lse(largest, total))
    p_rows = p_mean + matrix_start(n, h, mean_strides) + box_rows(own, mean_strides, Q_TILE, RANK)
    store_rows(p_rows, acc, in_grid, SPEC.head_dim, SPEC.head_pad)
    Lq = q_lengths[0] * q_lengths[1] * q_lengths[2]
    tl.store(p_lse + tl.cast(program // tiles, tl.int64) * Lq + i_q, lse, mask=in_grid)


@triton.jit
def _along(r, k, SPEC: tl.constexpr):
    """r k^T of r in pieces, the first alone unless SPEC.precise."""
    product = tl.dot(r[0], tl.trans(k), input_precision=SPEC.precision)
    if SPEC.precise:
        product = tl.dot(r[1], tl.trans(k), product, input_precision=SPEC.precision)
        product = tl.dot(r[2], tl.trans(k), product, input_precision=SPEC.precision)
    return product


@triton.jit
def _add_values(s, k, v, lse, r, shift, acc, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """acc + sum_j p_j (1 - r.c_j) v_j over one more box; shift = 1 + r.mean."""
    if MASKED:
        k = finite(k)
    p = tl.exp2(s - lse[:, None])
    w = p * (shift[:, None] - _along(r, k, SPEC))
    if MASKED:
        seen = s != float("-inf")
        return contained_product(tl.where(seen, w, 0.0), tl.where(seen, 1.0, 0.0), v, acc)
    return tl.dot(w.to(v.dtype), v, acc, input_precision=SPEC.precision)


@triton.jit
def local_linear_output(
    p_q, p_mean, p_lse, p_r, p_o, q_strides, mean_strides, r_strides, o_strides, q_lengths,
    keys, values, heads, groups, unit, largest, p_mark, p_lost, route, SPEC: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """o of one tile of queries; values: (v, its strides), the rest as of `local_linear_moments`.

    A tile in which some r is longer than `largest` is left to the launch that is SPEC.precise; a negative
    `largest` leaves none.  lost [N, heads, Lq], if given: what the rounding of the mean took from r.mean.
    With two marks nothing is done unless one is set; the first is for all tiles.
    """
    K_TILE: tl.constexpr = SPEC.k_tile
    Q_TILE: tl.constexpr = SPEC.q_tile
    RANK: tl.constexpr = SPEC.rank
    ROWS: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2]
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if p_mark is not None:  # noqa: SIM102
        if (tl.load(p_mark) == 0) & (tl.load(p_mark + 1) == 0):
            return
    VALUE_PAD: tl.constexpr = SPEC.value_pad
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
    p_rows = p_mean + matrix_start(n, h, mean_strides) + box_rows(own, mean_strides, Q_TILE, RANK)
    mean = load_rows(p_rows, in_grid, SPEC.head_dim, SPEC.head_pad, True)
    p_rows = p_r + matrix_start(n, h, r_strides) + box_rows(own, r_strides, Q_TILE, RANK)
    whole_r = load_rows(p_rows, in_grid, SPEC.head_dim, SPEC.head_pad, True).to(tl.float32)
    if largest >= 0.0:
        long = tl.max(tl.sum(whole_r * whole_r, 1), 0) > largest * largest
        if p_mark is not None:
            long = long | (tl.load(p_mark) > 0)
        if long != SPEC.precise:
            return
    r = pieces(whole_r, q)
    used = whole_r if SPEC.precise else r[0].to(tl.float32)
    shift = 1.0 + tl.sum(used * mean, 1)
    Lq = q_lengths[0] * q_lengths[1] * q_lengths[2]
    p_rows_lse = p_lse + tl.cast(program // tiles, tl.int64) * Lq
    lse = row_levels(p_rows_lse, i_q, in_grid)
    if p_lost is not None:
        p_rows_lost = p_lost + tl.cast(program // tiles, tl.int64) * Lq
        shift += tl.load(p_rows_lost + i_q, mask=in_grid, other=0.0)
    state = SPEC.route.open(route, tile, n, h, q_lengths, keys[2], Q_TILE, K_TILE, RANK)
    limits = SPEC.route.rows(route, places, in_grid, RANK)

    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for i in range(state[0]):
        first, whole, mark = SPEC.route.partial(route, state, i, K_TILE, RANK)
        s, k, inside = key_box(
            q, head, first, state[2], unit, route, limits, mark, whole, SPEC, True
        )
        v = value_box(own_values, first, inside, SPEC, True)
        acc = _add_values(s, k, v, lse, r, shift, acc, SPEC, True)
    if RANK == 1:
        for i in range(state[1]):
            first = SPEC.route.full(route, state, i, K_TILE)
            s, k, inside = key_box(
                q, head, first, state[2], unit, route, limits, 0, True, SPEC, False
            )
            v = value_box(own_values, first, inside, SPEC, False)
            acc = _add_values(s, k, v, lse, r, shift, acc, SPEC, False)

    found = tl.load(p_rows_lse + i_q, mask=in_grid, other=0.0)
    acc = tl.where((found != found)[:, None] | (acc - acc != 0.0), float("nan"), acc)
    p_rows = p_o + matrix_start(n, h, o_strides) + box_rows(own, o_strides, Q_TILE, RANK)
    store_rows(p_rows, acc, in_grid, SPEC.value_dim, SPEC.value_pad)
