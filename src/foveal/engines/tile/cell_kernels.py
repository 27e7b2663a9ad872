# mypy: ignore-errors
"""Listings sorted by the block that they list: counted, not compared."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cells(p_indices, sizes, near, SLOTS: tl.constexpr, FAR: tl.constexpr, ROWS: tl.constexpr):
    """Listings of a program: (place, cell, whether it is listed); see `token_cells`.

    Programs beside each other belong to different lines, so that they count in different places.
    """
    Lq, lines, chunk, chunks, blocks = sizes
    line = tl.program_id(0) % lines
    own = tl.program_id(0) // lines * ROWS + tl.arange(0, ROWS)
    at = line * (Lq * SLOTS) + own
    block = tl.load(p_indices + at, mask=own < Lq * SLOTS, other=-1)
    token = own // SLOTS
    cell = (line * chunks + token // chunk) * blocks + block
    used = block >= 0
    if FAR:
        first, last, shift, keys = near
        used = used & (block >= first) & (block <= (token + shift) // keys - last)
    return at, cell, used


@triton.jit
def token_cells(
    p_indices, p_counts, p_rank, sizes, near,
    SLOTS: tl.constexpr, FAR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Counts the listings of each cell; p_rank int32 [listings]: how many were counted before it.

    sizes: (Lq, lines, tokens of a chunk, chunks, blocks); near: (first blocks and last blocks left out
    if FAR, shift, keys of a block).  p_counts int32 [cells] starts as zeros.
    """
    at, cell, used = _cells(p_indices, sizes, near, SLOTS, FAR, ROWS)
    rank = tl.atomic_add(p_counts + cell, tl.full([ROWS], 1, tl.int32), mask=used)
    tl.store(p_rank + at, rank, mask=used)


@triton.jit
def token_order(
    p_indices, p_bounds, p_rank, p_order, sizes, near,
    SLOTS: tl.constexpr, FAR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """p_order int32 [listings]: those of a cell together, from p_bounds of it on."""
    at, cell, used = _cells(p_indices, sizes, near, SLOTS, FAR, ROWS)
    rank = tl.load(p_rank + at, mask=used, other=0)
    place = tl.load(p_bounds + cell, mask=used, other=0) + rank
    tl.store(p_order + place, at, mask=used)
