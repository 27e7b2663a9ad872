"""Jit functions that the kernels of the state engine share: chunks, gates and pairs of tokens.

Tensors of tokens are [T, H, D] by the strides of token and head, D contiguous; scratch is contiguous.
Decays: 0 none, 1 fixed per head, 2 per token, 3 per channel.  `p_sums` holds them times log2(e): for 1
the gate of each head, for 2 and 3 their running sums from the start of each chunk.  Sums are float64
where q is float32: between two large sums a difference in float32 would cost digits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_at(p, token, head, stride_t, stride_h):
    """Pointers to the rows of tokens [C] of a head."""
    return p + tl.cast(token, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h


@triton.jit
def load_tile(p_rows, inside, first, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """[C, TILE] of columns first, ..., of rows that are WIDTH wide; 0 outside."""
    column = first + tl.arange(0, TILE)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(p_rows[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(p_rows, x, inside, first, WIDTH: tl.constexpr, TILE: tl.constexpr):
    column = first + tl.arange(0, TILE)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(p_rows[:, None] + column[None, :], x.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def load_state(
    p_state, first, DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """[ROWS, TILE] of a state [DK, DV]: all its rows, columns first, ..."""
    row = tl.arange(0, ROWS)
    column = first + tl.arange(0, TILE)
    mask = (row < DK)[:, None] & (column < DV)[None, :]
    return tl.load(p_state + row[:, None] * DV + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_state(
    p_state, x, first, DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    row = tl.arange(0, ROWS)
    column = first + tl.arange(0, TILE)
    mask = (row < DK)[:, None] & (column < DV)[None, :]
    p = p_state + row[:, None] * DV + column[None, :]
    tl.store(p, x.to(p_state.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(
    p, start, stop, head, stride_t, stride_h, first,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BEYOND: tl.constexpr = False,
):  # fmt: skip
    """[ROWS, TILE] of the tokens start, ... of a head, columns first, ... of WIDTH; 0 from `stop` on.

    Tiles that lie BEYOND the last column are 0 as well.
    """
    p += tl.cast(start, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h
    row = tl.arange(0, ROWS)
    column = first + tl.arange(0, TILE)
    mask = (row < stop - start)[:, None]
    if BEYOND | (WIDTH % TILE != 0):
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(p + row[:, None] * stride_t + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    p, x, start, stop, head, stride_t, stride_h, first,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    p += tl.cast(start, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h
    row = tl.arange(0, ROWS)
    column = first + tl.arange(0, TILE)
    mask = (row < stop - start)[:, None]
    if WIDTH % TILE != 0:
        mask = mask & (column < WIDTH)[None, :]
    x = x.to(p.dtype.element_ty)
    tl.store(p + row[:, None] * stride_t + column[None, :], x, mask=mask)


@triton.jit
def load_part(
    p_state, first, DK: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """[ROWS, TILE] of the first DV columns of a state [DK, WIDE], past the first-level cache."""
    row = tl.arange(0, ROWS)
    column = first + tl.arange(0, TILE)
    mask = (row < DK)[:, None] & (column < DV)[None, :]
    p = p_state + row[:, None] * WIDE + column[None, :]
    return tl.load(p, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def store_part(
    p_state, x, first, DK: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    column = first + tl.arange(0, TILE)
    mask = (row < DK)[:, None] & (column < DV)[None, :]
    p = p_state + row[:, None] * WIDE + column[None, :]
    tl.store(p, x.to(p_state.dtype.element_ty), mask=mask)


@triton.jit
def load_row(p, stride, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """[TILE] of WIDTH numbers, every `stride`-th."""
    place = tl.arange(0, TILE)
    return tl.load(p + place * stride, mask=place < WIDTH, other=0.0)


@triton.jit
def store_row(p, x, stride, WIDTH: tl.constexpr, TILE: tl.constexpr):
    place = tl.arange(0, TILE)
    tl.store(p + place * stride, x, mask=place < WIDTH)


@triton.jit
def wait_for(p_flag):
    """Returns when another program has set the flag; what it stored before can then be read."""
    ready = tl.atomic_add(p_flag, 0, sem="acquire")
    while ready == 0:
        ready = tl.atomic_add(p_flag, 0, sem="acquire")


@triton.jit
def exp2_of(x):
    return tl.exp2(x.to(tl.float32))


@triton.jit
def load_gate(p_gate, token, inside, head, heads):
    """float32 [C] of a write gate [T, Hv]; 1 without one."""
    if p_gate is None:
        gate = tl.full(token.shape, 1.0, tl.float32)
    else:
        p = p_gate + tl.cast(token, tl.int64) * heads + head
        gate = tl.load(p, mask=inside, other=0.0).to(tl.float32)
    return gate


@triton.jit
def sums_of_tokens(p_sums, token, row, inside, head, heads, DECAY: tl.constexpr):
    """[C] running sums of decays 1 and 2, in base 2; very low outside."""
    if DECAY == 1:
        sums = tl.load(p_sums + head) * (row + 1).to(tl.float32)
    else:
        p = p_sums + tl.cast(token, tl.int64) * heads + head
        sums = tl.load(p, mask=inside, other=-1e30)
    return sums


@triton.jit
def sums_of_channels(
    p_sums, token, inside, head, heads, first, DK: tl.constexpr, TILE: tl.constexpr
):
    """[C, TILE] running sums of decay 3, in base 2."""
    rows = rows_at(p_sums, token, head, heads * DK, DK)
    return load_tile(rows, inside, first, DK, TILE)


@triton.jit
def sum_of_chunk(
    p_sums, last, count, head, heads, first,
    DECAY: tl.constexpr, DK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[TILE] (decay 3) or a number: the sum over a chunk of `count` tokens that ends with `last`."""
    if DECAY == 3:
        column = first + tl.arange(0, TILE)
        p_last = p_sums + (tl.cast(last, tl.int64) * heads + head) * DK + column
        whole = tl.load(p_last, mask=column < DK, other=0.0)
    elif DECAY == 2:
        whole = tl.load(p_sums + tl.cast(last, tl.int64) * heads + head)
    else:
        whole = tl.load(p_sums + head) * count.to(tl.float32)
    return whole


@triton.jit
def factor_since(
    p_sums, token, row, inside, head, heads, first,
    DECAY: tl.constexpr, DK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[C, TILE] (decay 3), [C, 1] or 1: decay from the start of the chunk up to each token."""
    if DECAY == 0:
        factor = 1.0
    elif DECAY == 3:
        factor = exp2_of(sums_of_channels(p_sums, token, inside, head, heads, first, DK, TILE))
    else:
        factor = exp2_of(sums_of_tokens(p_sums, token, row, inside, head, heads, DECAY))[:, None]
    return factor


@triton.jit
def factor_until(
    p_sums, token, row, inside, last, head, heads, first,
    DECAY: tl.constexpr, DK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `factor_since`: decay after each token up to the `last` of the chunk; 1 outside."""
    if DECAY == 0:
        factor = 1.0
    else:
        count = last - tl.min(token, 0) + 1
        whole = sum_of_chunk(p_sums, last, count, head, heads, first, DECAY, DK, TILE)
        if DECAY == 3:
            sums = sums_of_channels(p_sums, token, inside, head, heads, first, DK, TILE)
            factor = exp2_of(tl.where(inside[:, None], whole[None, :] - sums, 0.0))
        else:
            sums = sums_of_tokens(p_sums, token, row, inside, head, heads, DECAY)
            factor = exp2_of(tl.where(inside, whole - sums, 0.0))[:, None]
    return factor


@triton.jit
def factor_whole(
    p_sums, last, count, head, heads, DECAY: tl.constexpr, DK: tl.constexpr, ROWS: tl.constexpr
):
    """[ROWS, 1] (decay 3) or a number: decay of the state over a chunk of `count` tokens."""
    if DECAY == 0:
        factor = 1.0
    elif DECAY == 3:
        factor = exp2_of(sum_of_chunk(p_sums, last, count, head, heads, 0, DECAY, DK, ROWS))[
            :, None
        ]
    else:
        factor = exp2_of(sum_of_chunk(p_sums, last, count, head, heads, 0, DECAY, DK, ROWS))
    return factor


@triton.jit
def decay_matrix(sums, row):
    """[C, C] decay from token j to token i >= j, 0 above."""
    lower = row[:, None] >= row[None, :]
    return tl.where(lower, exp2_of(tl.where(lower, sums[:, None] - sums[None, :], 0.0)), 0.0)


@triton.jit
def decay_of_pairs(p_sums, token, row, inside, head, heads, DECAY: tl.constexpr):
    """As `decay_matrix`, of decays 0, 1 and 2."""
    if DECAY == 0:
        between = tl.where(row[:, None] >= row[None, :], 1.0, 0.0)
    else:
        between = decay_matrix(sums_of_tokens(p_sums, token, row, inside, head, heads, DECAY), row)
    return between


@triton.jit
def level_pairs(row, level, base=0):
    """Whether i is in the right half and j in the left half of the same block of 2^(level + 1) tokens.

    At a level below `base`, whether j is before i in the same block.
    """
    block = row >> (level + 1)
    right = ((row >> level) & 1) != 0
    met = (level < base) | (right[:, None] & (right == 0)[None, :])
    return (block[:, None] == block[None, :]) & (row[:, None] > row[None, :]) & met


@triton.jit
def level_factors(
    p_sums, sums, start, row, inside, last, head, heads, first, level, base,
    DK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[C, TILE], 0 outside: decay between the middle of a block of 2^(level + 1) tokens and each token.

    The factors of the later and of the earlier token of a pair; both are at most 1 where the pair meets
    across the middle.  At a level below `base` the one grows before the middle and the other behind it.
    """
    middle = tl.minimum(start + ((row >> (level + 1)) << (level + 1)) + (1 << level) - 1, last)
    at_middle = sums_of_channels(p_sums, middle, inside, head, heads, first, DK, TILE)
    since = (sums - at_middle).to(tl.float32)
    across = -tl.abs(since)
    later = tl.exp2(tl.where(level < base, since, across))
    earlier = tl.exp2(tl.where(level < base, -since, across))
    return tl.where(inside[:, None], later, 0.0), tl.where(inside[:, None], earlier, 0.0)


@triton.jit
def base_level(
    p_sums, start, last, head, heads, first,
    LEVELS: tl.constexpr, REACH: tl.constexpr, DK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """LEVELS, 4 or 0: blocks of 2^base tokens decay by at most 2^-REACH in every channel.

    A factor may undo so much, so that all pairs of such a block meet in one product.
    """
    base = 0
    if REACH > 0:
        column = first + tl.arange(0, TILE)
        block = start + tl.arange(0, 1 << (LEVELS - 4)) * 16
        there = (block <= last)[:, None] & (column < DK)[None, :]
        end = tl.cast(tl.minimum(block + 15, last), tl.int64) * heads + head
        at_end = tl.load(p_sums + end[:, None] * DK + column[None, :], mask=there, other=0.0)
        before = tl.cast(tl.maximum(block - 1, start), tl.int64) * heads + head
        follows = there & (block > start)[:, None]
        at_start = tl.load(p_sums + before[:, None] * DK + column[None, :], mask=follows, other=0.0)
        base = tl.where(tl.max(at_start - at_end) <= REACH, 4, 0)
        base = tl.where(tl.min(at_end) >= -REACH, LEVELS, base)
    return base
