"""Jit functions: tokens of a box of the grid, and rows of memory.

A grid has three axes, its own ones last; axes before them have length and tile 1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place_in(index, TILE: tl.constexpr):
    """Coordinates inside a box of shape TILE of raster indices."""
    TX: tl.constexpr = TILE[0]
    TY: tl.constexpr = TILE[1]
    TZ: tl.constexpr = TILE[2]
    z = index % TZ if TX * TY > 1 else index
    y = index // TZ % TY if TX * TY > 1 else index * 0
    x = index // (TY * TZ) if TX > 1 else index * 0
    return x, y, z


@triton.jit
def tile_place(tile, lengths, TILE: tl.constexpr):
    """Which tile along each axis the raster index `tile` names."""
    TY: tl.constexpr = TILE[1]
    TZ: tl.constexpr = TILE[2]
    tiles_y = tl.cdiv(lengths[1], TY)
    tiles_z = tl.cdiv(lengths[2], TZ)
    return tile // (tiles_y * tiles_z), tile // tiles_z % tiles_y, tile % tiles_z


@triton.jit
def tile_count(lengths, TILE: tl.constexpr):
    TX: tl.constexpr = TILE[0]
    TY: tl.constexpr = TILE[1]
    TZ: tl.constexpr = TILE[2]
    return tl.cdiv(lengths[0], TX) * tl.cdiv(lengths[1], TY) * tl.cdiv(lengths[2], TZ)


@triton.jit
def _within(places, stops, RANK: tl.constexpr):
    """Whether tokens lie before `stops` on every axis."""
    inside = places[2] < stops[2]
    if RANK > 1:
        inside = inside & (places[1] < stops[1])
    if RANK > 2:
        inside = inside & (places[0] < stops[0])
    return inside


@triton.jit
def tile_tokens(index, first, stops, lengths, TILE: tl.constexpr, RANK: tl.constexpr):
    """Tokens `index` of the box that starts at `first`: places (x, y, z), raster indices on the grid,
    whether they lie before `stops`."""
    x, y, z = _place_in(index, TILE)
    places = (first[0] + x, first[1] + y, first[2] + z)
    token = (places[0] * lengths[1] + places[1]) * lengths[2] + places[2]
    return places, token, _within(places, stops, RANK)


@triton.jit
def box_tokens(first, stops, lengths, TILE: tl.constexpr, RANK: tl.constexpr):
    """All tokens of the box, as `tile_tokens`."""
    TX: tl.constexpr = TILE[0]
    TY: tl.constexpr = TILE[1]
    TZ: tl.constexpr = TILE[2]
    return tile_tokens(tl.arange(0, TX * TY * TZ), first, stops, lengths, TILE, RANK)


@triton.jit
def first_token(tile, lengths, TILE: tl.constexpr):
    """Place of the first token of the tile with this raster index."""
    TX: tl.constexpr = TILE[0]
    TY: tl.constexpr = TILE[1]
    TZ: tl.constexpr = TILE[2]
    tx, ty, tz = tile_place(tile, lengths, TILE)
    return tx * TX, ty * TY, tz * TZ


@triton.jit
def _offset(x, y, z, strides, RANK: tl.constexpr):
    offset = tl.cast(z, tl.int64) * strides[3]
    if RANK > 1:
        offset += tl.cast(y, tl.int64) * strides[2]
    if RANK > 2:
        offset += tl.cast(x, tl.int64) * strides[1]
    return offset


@triton.jit
def tile_rows(index, first, strides, TILE: tl.constexpr, RANK: tl.constexpr):
    """int64 offsets of tokens `index` of a box; strides are (batch, x, y, z, head).

    All but one scalar is the same for every box: compilers keep it out of loops.
    """
    x, y, z = _place_in(index, TILE)
    return _offset(x, y, z, strides, RANK) + _offset(first[0], first[1], first[2], strides, RANK)


@triton.jit
def box_rows(first, strides, TILE: tl.constexpr, RANK: tl.constexpr):
    """int64 offsets of all tokens of a box."""
    TX: tl.constexpr = TILE[0]
    TY: tl.constexpr = TILE[1]
    TZ: tl.constexpr = TILE[2]
    return tile_rows(tl.arange(0, TX * TY * TZ), first, strides, TILE, RANK)


@triton.jit
def matrix_start(n, h, strides):
    """int64 offset of batch n and head h."""
    return tl.cast(n, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[4]


@triton.jit
def load_rows(p_rows, inside, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr):
    """[R, D_PAD] of rows of D elements at the pointers p_rows [R]; 0 outside."""
    column = tl.arange(0, D_PAD)
    p = p_rows[:, None] + column[None, :]
    if D == D_PAD:
        if MASKED:
            return tl.load(p, mask=inside[:, None], other=0.0)
        return tl.load(p)
    if MASKED:
        return tl.load(p, mask=inside[:, None] & (column < D)[None, :], other=0.0)
    return tl.load(p, mask=(column < D)[None, :], other=0.0)


@triton.jit
def store_rows(p_rows, rows, inside, D: tl.constexpr, D_PAD: tl.constexpr):
    """Writes rows [R, D_PAD] where inside [R]."""
    column = tl.arange(0, D_PAD)
    p = p_rows[:, None] + column[None, :]
    tl.store(p, rows.to(p_rows.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
