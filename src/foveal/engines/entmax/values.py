"""Kernel: weighted values over the tiles that hold weights above zero."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.tiles import load_rows, store_rows
from foveal.engines.entmax.threshold import (
    full_products,
    masked_products,
    moments,
    most_needed,
    powers,
    third_order,
)


@triton.jit
def _add_values(
    w, i_k, c, a, tau, p_v, v_stride, Lk, sums,
    SPEC: tl.constexpr, POWER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sums of p, u, p v and u v with one more tile."""
    r = tl.maximum(w * c - tau[:, None], 0.0)
    p, u = powers(r, a, POWER)
    v = load_rows(
        p_v + i_k.to(tl.int64) * v_stride, i_k < Lk, SPEC.value_dim, SPEC.value_pad, MASKED
    )
    acc = tl.dot(p.to(v.dtype), v, sums[2], input_precision="ieee")
    flat = tl.dot(u.to(v.dtype), v, sums[3], input_precision="ieee")
    return sums[0] + tl.sum(p, 1), sums[1] + tl.sum(u, 1), acc, flat


@triton.jit
def entmax_values(
    p_q, p_k, p_v, p_o, p_flat, p_tau, q_strides, k_strides, v_strides, o_strides, Lq, Lk, heads,
    groups, c, a, p_needed, room, route, SPEC: tl.constexpr, POWER: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """o = sum p v and flat = sum u v / sum u of one tile of queries; the last Newton step of tau.

    A tile whose blocks of queries all have `room` for the keys that they need is left to
    `entmax_values_gathered`.

    The weights add to 1 + f(tau) with f small: d p / d tau = -a u takes the rest off, to its square.
    """
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    ROWS: tl.constexpr = Q_TILE[2]
    VALUE_PAD: tl.constexpr = SPEC.value_pad
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
    rows = p_q + n.to(tl.int64) * q_strides[0] + h * q_strides[2]
    rows += i_q.to(tl.int64) * q_strides[1]
    q = load_rows(rows, inside, SPEC.head_dim, SPEC.head_pad, True)
    p_rows = p_tau + matrix.to(tl.int64) * Lq + i_q
    tau = tl.load(p_rows, mask=inside, other=float("inf"))
    head = (p_k + n.to(tl.int64) * k_strides[0] + h // groups * k_strides[2], k_strides[1], Lk)
    p_values = p_v + n.to(tl.int64) * v_strides[0] + h // groups * v_strides[2]
    lengths = (1, 1, Lk)
    state = SPEC.route.open(route, tile, n, h, lengths, lengths, Q_TILE, K_TILE, 1)
    limits = SPEC.route.rows(route, (i_q, i_q, i_q), inside, 1)

    zero = tl.zeros([ROWS], tl.float32)
    before = (zero, zero, zero)
    for i in range(state[0]):
        w, _k, _i_k = masked_products(q, head, route, state, limits, i, SPEC)
        before = moments(tl.maximum(w * c - tau[:, None], 0.0), a, before, POWER)
    for i in range(state[1]):
        w, _k, _i_k = full_products(q, head, route, state, i, SPEC)
        before = moments(tl.maximum(w * c - tau[:, None], 0.0), a, before, POWER)
    tau += third_order(before[0], before[1], before[2], a, POWER)
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    sums = (zero, zero, acc, acc)
    for i in range(state[0]):
        w, _k, i_k = masked_products(q, head, route, state, limits, i, SPEC)
        sums = _add_values(w, i_k, c, a, tau, p_values, v_strides[1], Lk, sums, SPEC, POWER, True)
    for i in range(state[1]):
        w, _k, i_k = full_products(q, head, route, state, i, SPEC)
        sums = _add_values(w, i_k, c, a, tau, p_values, v_strides[1], Lk, sums, SPEC, POWER, False)
    total, slope, o, flat = sums
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
