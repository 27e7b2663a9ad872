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
    either as its first token (x, y, z), `whole` and a mark; rows: limits of own tokens; sees: the test;
    levels: two numbers of every visited token, `plane` apart, 0 outside.
    """

    open: Any
    partial: Any
    full: Any
    rows: Any
    sees: Any
    levels: Any


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
def _bits_see(
    route, rows, mark, places, OWN: tl.constexpr, OTHER: tl.constexpr, RANK: tl.constexpr
):
    """mark names the tile's words [own, other // 32] at route[9]; a row loads its words once."""
    OWNS: tl.constexpr = OWN[2]
    OTHERS: tl.constexpr = OTHER[2]
    WORDS: tl.constexpr = (OTHERS + 31) // 32
    p_rows = route[9] + tl.cast(mark, tl.int64) * (OWNS * WORDS) + rows[2] % OWNS * WORDS
    other = (places[2] % OTHERS)[None, :]
    words = tl.load(p_rows)[:, None]
    for i in tl.static_range(1, WORDS):
        words = tl.where(other >= i * 32, tl.load(p_rows + i)[:, None], words)
    return ((words >> (other % 32)) & 1) == 1


@triton.jit
def _span_rows(route, places, inside, RANK: tl.constexpr):
    """Start and stop of two intervals per own token."""
    z = places[2]
    first = tl.load(route[9] + z, mask=inside, other=0)
    first_stop = tl.load(route[10] + z, mask=inside, other=0)
    second = tl.load(route[11] + z, mask=inside, other=0)
    return first, first_stop, second, tl.load(route[12] + z, mask=inside, other=0)


@triton.jit
def _spans_see(
    route, rows, mark, places, OWN: tl.constexpr, OTHER: tl.constexpr, RANK: tl.constexpr
):
    z = places[2][None, :]
    seen = (z >= rows[0][:, None]) & (z < rows[1][:, None])
    return seen | ((z >= rows[2][:, None]) & (z < rows[3][:, None]))


@triton.jit
def _box_levels(p_levels, plane, i, inside):
    """As a matrix that holds every number twice.

    Of a vector this short each thread loads all that it reads itself; from a box, which starts
    anywhere, one by one, and that took more registers than there are.
    """
    column = tl.arange(0, 4)[None, :]
    p = (p_levels + i)[:, None] + (column // 2).to(tl.int64) * plane
    both = tl.load(p, mask=inside[:, None], other=0.0)
    first = tl.sum(tl.where(column == 0, both, 0.0), 1)
    return first, tl.sum(tl.where(column == 2, both, 0.0), 1)


@triton.jit
def _list_levels(p_levels, plane, i, inside):
    first = tl.load(p_levels + i, mask=inside, other=0.0)
    return first, tl.load(p_levels + plane + i, mask=inside, other=0.0)


BOXES = Route(_box_open, _box_partial, _box_full, _box_rows, _box_sees, _box_levels)
LISTS = Route(_list_open, _list_partial, _list_full, _list_rows, _box_sees, _list_levels)
SPANS = Route(_list_open, _list_partial, _list_full, _span_rows, _spans_see, _list_levels)
BITS = Route(_list_open, _bit_partial, _list_full, _bit_rows, _bits_see, _list_levels)
