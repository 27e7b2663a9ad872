# mypy: ignore-errors
"""Rows of scores, masks and states turned into lists, several rows per program and no sort."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(rows, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < rows


@triton.jit
def row_best(p_scores, p_counts, p_out, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Marks the `counts` largest of each row of float32 scores, ties to the left, -inf never.

    The numbers are compared as integers of the same order, and the least that is kept is found bit by bit.
    """
    row, inside = _rows(rows, ROWS)
    column = tl.arange(0, WIDTH)
    there = inside[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(p_scores + at, mask=there, other=float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # no -0
    bits = tl.where(there & (x > float("-inf")), bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)
    wanted = tl.load(p_counts + row, mask=inside, other=0)
    enough = tl.sum((bits >= 0).to(tl.int32), 1) >= wanted
    least = tl.where(enough, 0, -0x80000000)
    for i in range(31):
        higher = least + (1 << (30 - i))
        enough = tl.sum((bits >= higher[:, None]).to(tl.int32), 1) >= wanted
        least = tl.where(enough, higher, least)
    above = bits > least[:, None]
    equal = bits == least[:, None]
    left = wanted - tl.sum(above.to(tl.int32), 1)
    kept = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= left[:, None]))
    tl.store(p_out + at, (kept & (bits > -0x80000000)).to(tl.int8), mask=there)


@triton.jit
def row_mass(p_scores, p_out, rows, width, mass, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Marks the shortest prefix of the falling scores of each row whose sum reaches `mass` of the whole.

    At least one, ties to the left; -inf never, inf always and in no sum.  Numbers >= 0 are ordered as their
    bits: the least that is kept is found bit by bit, by sums; of those that equal it as many are kept as
    it takes.
    """
    row, inside = _rows(rows, ROWS)
    column = tl.arange(0, WIDTH)
    there = inside[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(p_scores + at, mask=there, other=float("-inf"))
    allowed = x > float("-inf")
    forced = x == float("inf")
    x = tl.where(allowed & (x > 0.0) & (forced == 0), x, 0.0)  # no -0
    bits = tl.where(allowed, x.to(tl.int32, bitcast=True), -1)
    goal = mass * tl.sum(x, 1)
    least = tl.zeros([ROWS], tl.int32)
    for i in range(31):
        higher = least + (1 << (30 - i))
        reached = tl.sum(tl.where(bits >= higher[:, None], x, 0.0), 1)
        least = tl.where((reached >= goal) & (reached > 0.0), higher, least)
    above = bits > least[:, None]
    equal = bits == least[:, None]
    before = tl.sum(tl.where(above, x, 0.0), 1)
    number = tl.cumsum(equal.to(tl.int32), 1) - 1
    value = least.to(tl.float32, bitcast=True)
    wanted = before[:, None] + number.to(tl.float32) * value[:, None] < goal[:, None]
    first = (number == 0) & (tl.sum(above.to(tl.int32), 1) == 0)[:, None]
    kept = forced | (allowed & (above | (equal & (wanted | first))))
    tl.store(p_out + at, kept.to(tl.int8), mask=there)


@triton.jit
def row_places(p_mask, p_out, rows, width, most, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Ascending places of the marks of each row, int32 [rows, most], -1 behind them."""
    row, inside = _rows(rows, ROWS)
    column = tl.arange(0, WIDTH)
    there = inside[:, None] & (column < width)[None, :]
    marked = tl.load(p_mask + row[:, None] * width + column[None, :], mask=there, other=0) != 0
    number = tl.cumsum(marked.to(tl.int32), 1)
    total = tl.sum(marked.to(tl.int32), 1)
    p_row = p_out + row[:, None] * most
    place = tl.broadcast_to(column[None, :], marked.shape)
    tl.store(p_row + number - 1, place, mask=marked & (number <= most))
    behind = inside[:, None] & (column[None, :] >= total[:, None]) & (column < most)[None, :]
    tl.store(p_row + column[None, :], tl.full([ROWS, WIDTH], -1, tl.int32), mask=behind)


@triton.jit
def row_walk(
    p_states, p_order, p_out, rows, width, tiles, HEADER: tl.constexpr,
    PARTIAL: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of `WalkLists`: (tile, tested, visited, columns: tested, whole, skipped), in the order of
    p_order [lists, tiles]; states uint8 [lists, tiles, width]."""
    row, inside = _rows(rows, ROWS)
    tile = tl.load(p_order + row, mask=inside, other=0)
    column = tl.arange(0, WIDTH)
    there = inside[:, None] & (column < width)[None, :]
    source = (row // tiles * tiles + tile)[:, None] * width + column[None, :]
    state = tl.load(p_states + source, mask=there, other=0)
    tested = (there & (state == PARTIAL)).to(tl.int32)
    whole = (there & (state == FULL)).to(tl.int32)
    rest = there.to(tl.int32) - tested - whole
    count = tl.sum(tested, 1)
    visited = count + tl.sum(whole, 1)
    place = tl.where(
        tested > 0,
        tl.cumsum(tested, 1),
        tl.where(
            whole > 0,
            count[:, None] + tl.cumsum(whole, 1),
            visited[:, None] + tl.cumsum(rest, 1),
        ),
    )
    p_row = p_out + row * (HEADER + width)
    tl.store(p_row, tile.to(tl.int32), mask=inside)
    tl.store(p_row + 1, count, mask=inside)
    tl.store(p_row + 2, visited, mask=inside)
    values = tl.broadcast_to(column[None, :], state.shape)
    tl.store(p_row[:, None] + (HEADER - 1) + place, values, mask=there)
