"""Jit functions: which tiles of the other side a tile visits, and which pairs of them are seen.

A tile of the own side (queries in the forward and for dQ, keys for dK and dV) visits tiles of the other
side: first `partial` ones, whose pairs are tested, then `full` ones, which are not.  With more than one
axis all tiles count as partial and tell in `whole` that no pair needs a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from foveal.engines.common.hooks import Hooks
from foveal.engines.common.tiles import tile_place


@dataclass(frozen=True)
class Route(Hooks):
    """open: state of an own tile, (partial tiles, full tiles, stops, ...); partial and full: the i-th of
    either as its first token (x, y, z), `whole` and a mark; rows: limits of own tokens; sees: the test.
    """

    open: Any
    partial: Any
    full: Any
    rows: Any
    sees: Any


@triton.jit
def _axis_span(p_lower, p_upper, tile, length, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Start and stop of the tokens that a tile visits on one axis, and its tiles: count, whole ones."""
    first = tile * OWN
    last = tl.minimum(first + OWN, length) - 1
    start = tl.load(p_lower + first)
    stop = tl.load(p_upper + last)
    count = tl.cdiv(tl.maximum(stop - start, 0), OTHER)
    whole_first = tl.cdiv(tl.load(p_lower + last) - start, OTHER)
    whole_stop = (tl.load(p_upper + first) - start) // OTHER
    return start, stop, count, whole_first, tl.maximum(whole_stop, whole_first)


@triton.jit
def _box_open(
    route, tile, n, h, own_lengths, other_lengths,
    OWN: tl.constexpr, OTHER: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    OX: tl.constexpr = OWN[0]
    OY: tl.constexpr = OWN[1]
    OZ: tl.constexpr = OWN[2]
    KX: tl.constexpr = OTHER[0]
    KY: tl.constexpr = OTHER[1]
    KZ: tl.constexpr = OTHER[2]
    tx, ty, tz = tile_place(tile, own_lengths, OWN)
    z = _axis_span(route[2], route[5], tz, own_lengths[2], OZ, KZ)
    if RANK == 1:
        whole = z[4] - z[3]
        none = tz * 0
        return z[2] - whole, whole, (none, none, z[1]), z, z, z
    y = _axis_span(route[1], route[4], ty, own_lengths[1], OY, KY)
    if RANK == 2:
        return z[2] * y[2], tz * 0, (tz * 0, y[1], z[1]), y, y, z
    x = _axis_span(route[0], route[3], tx, own_lengths[0], OX, KX)
    return z[2] * y[2] * x[2], tz * 0, (x[1], y[1], z[1]), x, y, z


@triton.jit
def _box_partial(route, state, i, OTHER: tl.constexpr, RANK: tl.constexpr):
    KX: tl.constexpr = OTHER[0]
    KY: tl.constexpr = OTHER[1]
    KZ: tl.constexpr = OTHER[2]
    x, y, z = state[3], state[4], state[5]
    if RANK == 1:
        j = i + tl.where(i >= z[3], z[4] - z[3], 0)
        return (i * 0, i * 0, z[0] + j * KZ), False, i
    jz = i % z[2]
    whole = (jz >= z[3]) & (jz < z[4])
    jy = i // z[2]
    jx = i * 0
    if RANK > 2:
        jx = jy // y[2]
        jy = jy % y[2]
        whole = whole & (jx >= x[3]) & (jx < x[4])
    whole = whole & (jy >= y[3]) & (jy < y[4])
    first_x = x[0] + jx * KX if RANK > 2 else jx
    return (first_x, y[0] + jy * KY, z[0] + jz * KZ), whole, i


@triton.jit
def _box_full(route, state, i, OTHER: tl.constexpr):
    KZ: tl.constexpr = OTHER[2]
    z = state[5]
    return i * 0, i * 0, z[0] + (z[3] + i) * KZ


@triton.jit
def _box_rows(route, places, inside, RANK: tl.constexpr):
    """Per own token and axis, the first token it sees and the one after the last."""
    x, y, z = places
    lower_z = tl.load(route[2] + z, mask=inside, other=0)
    upper_z = tl.load(route[5] + z, mask=inside, other=0)
    lower_y, upper_y, lower_x, upper_x = lower_z, upper_z, lower_z, upper_z
    if RANK > 1:
        lower_y = tl.load(route[1] + y, mask=inside, other=0)
        upper_y = tl.load(route[4] + y, mask=inside, other=0)
    if RANK > 2:
        lower_x = tl.load(route[0] + x, mask=inside, other=0)
        upper_x = tl.load(route[3] + x, mask=inside, other=0)
    return lower_x, lower_y, lower_z, upper_x, upper_y, upper_z


@triton.jit
def _box_sees(
    route, rows, mark, places, OWN: tl.constexpr, OTHER: tl.constexpr, RANK: tl.constexpr
):
    x, y, z = places
    seen = (z[None, :] >= rows[2][:, None]) & (z[None, :] < rows[5][:, None])
    if RANK > 1:
        seen = seen & (y[None, :] >= rows[1][:, None]) & (y[None, :] < rows[4][:, None])
    if RANK > 2:
        seen = seen & (x[None, :] >= rows[0][:, None]) & (x[None, :] < rows[3][:, None])
    return seen


@triton.jit
def _list_open(
    route, tile, n, h, own_lengths, other_lengths,
    OWN: tl.constexpr, OTHER: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Lists of flat tiles: route is (indices, partial counts, counts, batch stride, head stride, query
    heads per list, width of a list, marks, tiles of the other side, lower, upper)."""
    index = tl.cast(n, tl.int64) * route[3] + h // route[5] * route[4] + tile
    partial = tl.load(route[1] + index)
    p_list = route[0] + index * route[6]
    p_marks = route[7] + tl.cast(tile, tl.int64) * route[8]
    stops = (tile * 0, tile * 0, tile * 0 + other_lengths[2])
    return partial, tl.load(route[2] + index) - partial, stops, p_list, p_marks, partial


@triton.jit
def _list_partial(route, state, i, OTHER: tl.constexpr, RANK: tl.constexpr):
    KZ: tl.constexpr = OTHER[2]
    tile = tl.load(state[3] + i)
    return (i * 0, i * 0, tile * KZ), False, tile


@triton.jit
def _bit_partial(route, state, i, OTHER: tl.constexpr, RANK: tl.constexpr):
    KZ: tl.constexpr = OTHER[2]
    tile = tl.load(state[3] + i)
    return (i * 0, i * 0, tile * KZ), False, tl.load(state[4] + tile)


@triton.jit
def _list_full(route, state, i, OTHER: tl.constexpr):
    KZ: tl.constexpr = OTHER[2]
    return i * 0, i * 0, tl.load(state[3] + state[5] + i) * KZ


@triton.jit
def _list_rows(route, places, inside, RANK: tl.constexpr):
    lower = tl.load(route[9] + places[2], mask=inside, other=0)
    upper = tl.load(route[10] + places[2], mask=inside, other=0)
    return lower, lower, lower, upper, upper, upper


@triton.jit
def _bit_rows(route, places, inside, RANK: tl.constexpr):
    return places


@triton.jit
def _bits_of_queries(
    route, rows, mark, places, OWN: tl.constexpr, OTHER: tl.constexpr, RANK: tl.constexpr
):
    """Own tokens are queries; mark names the tile's words [query, key // 32] at route[9]."""
    Q: tl.constexpr = OWN[2]
    K: tl.constexpr = OTHER[2]
    WORDS: tl.constexpr = (K + 31) // 32
    query = (rows[2] % Q)[:, None]
    key = (places[2] % K)[None, :]
    p_words = route[9] + tl.cast(mark, tl.int64) * (Q * WORDS)
    return ((tl.load(p_words + query * WORDS + key // 32) >> (key % 32)) & 1) == 1


@triton.jit
def _bits_of_keys(
    route, rows, mark, places, OWN: tl.constexpr, OTHER: tl.constexpr, RANK: tl.constexpr
):
    """Own tokens are keys."""
    K: tl.constexpr = OWN[2]
    Q: tl.constexpr = OTHER[2]
    WORDS: tl.constexpr = (K + 31) // 32
    key = (rows[2] % K)[:, None]
    query = (places[2] % Q)[None, :]
    p_words = route[9] + tl.cast(mark, tl.int64) * (Q * WORDS)
    return ((tl.load(p_words + query * WORDS + key // 32) >> (key % 32)) & 1) == 1


BOXES = Route(_box_open, _box_partial, _box_full, _box_rows, _box_sees)
LISTS = Route(_list_open, _list_partial, _list_full, _list_rows, _box_sees)
BITS_OF_QUERIES = Route(_list_open, _bit_partial, _list_full, _bit_rows, _bits_of_queries)
BITS_OF_KEYS = Route(_list_open, _bit_partial, _list_full, _bit_rows, _bits_of_keys)
