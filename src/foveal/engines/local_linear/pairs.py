"""Jit functions: the weights of the pairs of a tile, and what is loaded and kept per row."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.tiles import box_rows, box_tokens, load_rows


@triton.jit
def finite(x):
    """x with 0 for NaN and inf."""
    return tl.where(x - x == 0.0, x, 0.0).to(x.dtype)


@triton.jit
def key_box(
    q,
    keys,
    first,
    stops,
    unit,
    route,
    limits,
    mark,
    whole,
    SPEC: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Base-2 scores [Q, K] of a query tile on the keys of the box at `first`, -inf where hidden, and k.

    keys: (k, its strides, lengths of the key grid).  k as it was loaded: where MASKED it may hold what is not
    finite, which the scores leave out.
    """
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    RANK: tl.constexpr = SPEC.rank
    places, _, inside = box_tokens(first, stops, keys[2], K_TILE, RANK)
    p_rows = keys[0] + box_rows(first, keys[1], K_TILE, RANK)
    k = load_rows(p_rows, inside, SPEC.head_dim, SPEC.head_pad, MASKED)
    clean = finite(k) if MASKED else k
    s = tl.dot(q, tl.trans(clean), input_precision=SPEC.precision) * unit
    if MASKED:
        if RANK == 1 or not whole:
            seen = SPEC.route.sees(route, limits, mark, places, Q_TILE, K_TILE, RANK)
            s = tl.where(seen, s, float("-inf"))
        else:
            s = tl.where(inside[None, :], s, float("-inf"))
    return s, k, inside


@triton.jit
def pieces(x, like):
    """Three numbers of the dtype of `like` that add up to x, within a rounding of float32."""
    first = x.to(like.dtype)
    rest = x - first.to(tl.float32)
    second = rest.to(like.dtype)
    return first, second, (rest - second.to(tl.float32)).to(like.dtype)


@triton.jit
def product_with(x, other, total, SPEC: tl.constexpr):
    """total + x @ other for float32 x, which is rounded to the dtype of `other` unless SPEC.precise."""
    first, second, third = pieces(x, other)
    total = tl.dot(first, other, total, input_precision=SPEC.precision)
    if SPEC.precise:
        total = tl.dot(second, other, total, input_precision=SPEC.precision)
        total = tl.dot(third, other, total, input_precision=SPEC.precision)
    return total


@triton.jit
def value_box(values, first, inside, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """v [K, Dv] of the box at `first`; values: (v, its strides)."""
    K_TILE: tl.constexpr = SPEC.k_tile
    p_rows = values[0] + box_rows(first, values[1], K_TILE, SPEC.rank)
    return load_rows(p_rows, inside, SPEC.value_dim, SPEC.value_pad, MASKED)


@triton.jit
def row_levels(p_lse, i_q, inside):
    """lse of queries, inf where there is no weight: of rows that see nothing, or what is not finite."""
    lse = tl.load(p_lse + i_q, mask=inside, other=float("inf"))
    return tl.where(lse - lse == 0.0, lse, float("inf"))
