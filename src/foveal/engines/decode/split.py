# mypy: ignore-errors
"""Jit functions: an equal share of all stored keys for every program, found on the device.

The keys of a sequence (or of one key head of it, where heads hold different tokens) are cut in tiles of
KV_TILE tokens; tiles are numbered sequence by sequence, head by head, row tile by row tile, and each of P
programs takes W / P consecutive ones of all W, rounded up or down.  Its share may end one segment (the tiles
of one sequence, head and row tile) and begin another: so a program leaves at most two parts of segments, and
every other segment is whole.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_range(length, after, Lq, left, sink_tokens, WINDOW: tl.constexpr, KV_TILE: tl.constexpr):
    """Tiles of sink keys, the first tile of the window, and how many tiles of both there are."""
    last = tl.cdiv(length, KV_TILE)
    if WINDOW:
        first = tl.maximum(length + after - Lq - left, 0) // KV_TILE
        first = tl.minimum(first, last)
        sinks = tl.minimum(tl.cdiv(sink_tokens, KV_TILE), first)
    else:
        first = length * 0
        sinks = length * 0
    return sinks, first, sinks + last - first


@triton.jit
def unit_tiles(
    unit, mask, p_lengths, p_after, Lq, left, sink_tokens,
    UNITS_PER_SEQUENCE: tl.constexpr, WINDOW: tl.constexpr, KV_TILE: tl.constexpr,
):  # fmt: skip
    """Tiles of one segment of `unit`: a sequence, or a key head of it."""
    length = tl.load(p_lengths + unit, mask=mask, other=0)
    after = 0
    if p_after is not None:
        after = tl.load(p_after + unit // UNITS_PER_SEQUENCE, mask=mask, other=0)
    return tile_range(length, after, Lq, left, sink_tokens, WINDOW, KV_TILE)[2]


@triton.jit
def all_ends(
    p_lengths, p_after, units, segments, Lq, left, sink_tokens,
    UNITS_PAD: tl.constexpr, UNITS_PER_SEQUENCE: tl.constexpr, WINDOW: tl.constexpr,
    KV_TILE: tl.constexpr,
):  # fmt: skip
    """The tile behind the last one of every unit [UNITS_PAD], each of `segments` segments."""
    unit = tl.arange(0, UNITS_PAD)
    tiles = unit_tiles(
        unit, unit < units, p_lengths, p_after, Lq, left, sink_tokens,
        UNITS_PER_SEQUENCE, WINDOW, KV_TILE,
    )  # fmt: skip
    return tl.cumsum(tl.where(unit < units, tiles, 0) * segments, 0)


@triton.jit
def share_start(program, programs, total, lean):
    """The first tile of a program's share of `total` tiles; no more programs than tiles take part.

    Shares differ by one tile at most: the larger ones are spread evenly or, with `lean`, come first.
    """
    programs = tl.maximum(tl.minimum(programs, total), 1)
    each = total // programs
    larger = total - each * programs
    spread = (program.to(tl.int64) * larger // programs).to(tl.int32)
    first = program * each + tl.where(lean != 0, tl.minimum(program, larger), spread)
    return tl.minimum(first, total)


@triton.jit
def share_of(tile, programs, total, lean):
    """The program whose share a tile is in."""
    programs = tl.maximum(tl.minimum(programs, total), 1)
    each = total // programs
    larger = total - each * programs
    before = larger * (each + 1)
    rest = larger + (tile - before) // tl.maximum(each, 1)
    first = tl.where(tile < before, tile // (each + 1), rest)
    # p each + floor(p larger / programs) = floor(p total / programs)
    even = (((tile + 1).to(tl.int64) * programs - 1) // tl.maximum(total, 1)).to(tl.int32)
    return tl.where(lean != 0, first, even)
