# mypy: ignore-errors
"""Antidiagonal scores of blocks in two passes, without the folded copies and without the reduced map."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.softmax import LOG2E


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP tiles of rows walk along the columns side by side."""
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * column_tiles)
    # Long rows first.
    return row_tiles - 1 - (first + within % size), within // size


@triton.jit
def _store_levels(
    acc, p_out, h, r, c, rows, columns, blocks, shift, unit,
    S: tl.constexpr, PER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of 2^a over the PER columns of each block."""
    row = r * ROWS + tl.arange(0, ROWS)
    column = c * COLUMNS + tl.arange(0, COLUMNS)
    seen = (column < columns)[None, :]
    if CAUSAL:
        seen = seen & ((column * S)[None, :] <= (row * S + S - 1 + shift)[:, None])
    a = tl.where(seen, acc * unit, float("-inf"))
    a = tl.reshape(a, (ROWS, COLUMNS // PER, PER))
    largest = tl.max(a, 2)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2(a - base[:, :, None]), 2)
    level = tl.where(total > 0.0, base + tl.log2(total), float("-inf"))
    block = c * (COLUMNS // PER) + tl.arange(0, COLUMNS // PER)
    p_row = p_out + (h.to(tl.int64) * rows + row)[:, None] * blocks
    tl.store(p_row + block[None, :], level, mask=(row < rows)[:, None] & (block < blocks)[None, :])


@triton.jit
def antidiagonal_levels(
    p_q, p_k, p_out, q_strides, k_strides, groups, Lq, Lk, rows, columns, blocks, shift, unit,
    S: tl.constexpr, PER: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Levels float32 [Hq, rows, blocks] of q [Lq, Hq, D] and k [Lk, Hkv, D].

    a[r, c] = unit sum_i q[r S + S - 1 - i] . k[c S + i]: one product of depth S D per tile, read in place.
    """
    r, c = _tile(rows, columns, ROWS, COLUMNS, GROUP)
    h = tl.program_id(1)
    visible = c * COLUMNS * S <= tl.minimum((r + 1) * ROWS, rows) * S - 1 + shift
    if visible | (not CAUSAL):
        row = r * ROWS + tl.arange(0, ROWS)
        column = c * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        p_rows = p_q + h * q_strides[1]
        p_rows = p_rows + (row * S + S - 1).to(tl.int64)[:, None] * q_strides[0] + depth[None, :]
        p_columns = p_k + h // groups * k_strides[1]
        p_columns = p_columns + (column * S).to(tl.int64)[:, None] * k_strides[0] + depth[None, :]
        STEPS: tl.constexpr = D // DEPTH
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in tl.range(0, S * STEPS, num_stages=STAGES):
            token = i // STEPS
            at = i % STEPS * DEPTH
            q_inside = row * S + S - 1 - token < Lq
            k_inside = column * S + token < Lk
            q = tl.load(p_rows + (at - token * q_strides[0]), mask=q_inside[:, None], other=0.0)
            k = tl.load(p_columns + (at + token * k_strides[0]), mask=k_inside[:, None], other=0.0)
            acc = tl.dot(q, tl.trans(k), acc, input_precision="ieee")
        _store_levels(
            acc, p_out, h, r, c, rows, columns, blocks, shift, unit * LOG2E,
            S, PER, ROWS, COLUMNS, CAUSAL,
        )  # fmt: skip


@triton.jit
def _levels(p_row, first, used, visible, WIDTH: tl.constexpr):
    block = first + tl.arange(0, WIDTH)
    there = used[:, None] & (block[None, :] < visible[:, None])
    return tl.load(p_row[:, None] + block[None, :], mask=there, other=float("-inf"))


@triton.jit
def antidiagonal_shares(
    p_levels, p_out, rows, blocks, tiles, kv_block, shift,
    S: tl.constexpr, TOGETHER: tl.constexpr, TOGETHER_PAD: tl.constexpr, WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Scores float32 [Hq, tiles, blocks]: softmax over the blocks of each row, summed over the TOGETHER
    rows of a tile; 0 where no row of the tile sees the block."""
    tile = tl.program_id(0) % tiles
    line = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.arange(0, TOGETHER_PAD)
    row = tile * TOGETHER + i
    used = (i < TOGETHER) & (row < rows)
    last = row * S + S - 1 + shift
    visible = tl.where(last >= 0, last // kv_block + 1, 0) if CAUSAL else row * 0 + blocks
    visible = tl.where(used, tl.minimum(visible, blocks), 0)
    p_row = p_levels + (line * rows + row) * blocks
    most = tl.max(visible, 0)
    largest = tl.full([TOGETHER_PAD], float("-inf"), tl.float32)
    total = tl.zeros([TOGETHER_PAD], tl.float32)
    for first in range(0, most, WIDTH):
        x = _levels(p_row, first, used, visible, WIDTH)
        top = tl.maximum(largest, tl.max(x, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(x - base[:, None]), 1)
        largest = top
    unit = tl.where(total > 0.0, 1.0 / total, 0.0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    p_out = p_out + (line * tiles + tile) * blocks
    for first in range(0, blocks, WIDTH):
        x = _levels(p_row, first, used, visible, WIDTH)
        share = tl.sum(tl.exp2(x - base[:, None]) * unit[:, None], 0)
        block = first + tl.arange(0, WIDTH)
        tl.store(p_out + block, share, mask=block < blocks)
