"""The states before the pieces of one sequence, from the maps S' = P S + R of the pieces, in groups.

All groups compose their maps at once, a piece after the other; one walk over the groups finds the states
before them; all pieces apply what their group has composed before them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.state.tiles import load_part, load_state, store_part, store_state


@triton.jit
def mapped(
    p_map, s, first,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """P s + R, of a map [R, P] and of columns from `first` on; R is 0 behind the first DV of them."""
    step = load_part(p_map + DV, 0, DK, DK, DV + DK, ROWS, ROWS)
    added = load_part(p_map, first, DK, DV, DV + DK, ROWS, TILE)
    return tl.dot(step, s, added, input_precision=PRECISION)


@triton.jit(do_not_specialize=["count", "each", "heads"])
def state_compose_forward(
    p_maps, p_prefix, count, each, heads,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of every piece [R, P] [DK, DV + DK], composed with those before it in its group of `each`."""
    WIDE: tl.constexpr = DV + DK
    tiles = tl.cdiv(WIDE, TILE)
    program = tl.program_id(0)
    first = program % tiles * TILE
    h = program // tiles % heads
    begin = program // tiles // heads * each
    end = tl.minimum(begin + each, count)
    place = tl.cast(begin, tl.int64) * heads + h
    x = load_part(p_maps + place * (DK * WIDE), first, DK, WIDE, WIDE, ROWS, TILE)
    for piece in range(begin, end):
        place = tl.cast(piece, tl.int64) * heads + h
        store_part(p_prefix + place * (DK * WIDE), x, first, DK, WIDE, WIDE, ROWS, TILE)
        ahead = tl.cast(tl.minimum(piece + 1, end - 1), tl.int64) * heads + h
        x = mapped(p_maps + ahead * (DK * WIDE), x, first, DK, DV, ROWS, TILE, PRECISION)


@triton.jit(do_not_specialize=["count", "each", "heads"])
def state_groups_forward(
    p_prefix, p_initial, p_starts, p_last, count, each, heads,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each group, and behind the last one."""
    WIDE: tl.constexpr = DV + DK
    tiles = tl.cdiv(DV, TILE)
    program = tl.program_id(0)
    first = program % tiles * TILE
    h = program // tiles
    if p_initial is not None:
        s = load_state(p_initial + h * (DK * DV), first, DK, DV, ROWS, TILE).to(tl.float32)
    else:
        s = tl.zeros([ROWS, TILE], tl.float32)
    for group in range(0, tl.cdiv(count, each)):
        start = tl.cast(group, tl.int64) * heads + h
        store_state(p_starts + start * (DK * DV), s, first, DK, DV, ROWS, TILE)
        last = tl.minimum((group + 1) * each, count) - 1
        place = tl.cast(last, tl.int64) * heads + h
        s = mapped(p_prefix + place * (DK * WIDE), s, first, DK, DV, ROWS, TILE, PRECISION)
    store_state(p_last + h * (DK * DV), s, first, DK, DV, ROWS, TILE)


@triton.jit(do_not_specialize=["each", "heads"])
def state_apply_forward(
    p_prefix, p_starts, p_found, each, heads,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each piece."""
    WIDE: tl.constexpr = DV + DK
    tiles = tl.cdiv(DV, TILE)
    program = tl.program_id(0)
    first = program % tiles * TILE
    h = program // tiles % heads
    piece = program // tiles // heads
    start = tl.cast(piece // each, tl.int64) * heads + h
    s = load_state(p_starts + start * (DK * DV), first, DK, DV, ROWS, TILE).to(tl.float32)
    if piece % each > 0:
        place = tl.cast(piece - 1, tl.int64) * heads + h
        s = mapped(p_prefix + place * (DK * WIDE), s, first, DK, DV, ROWS, TILE, PRECISION)
    own = tl.cast(piece, tl.int64) * heads + h
    store_state(p_found + own * (DK * DV), s, first, DK, DV, ROWS, TILE)
