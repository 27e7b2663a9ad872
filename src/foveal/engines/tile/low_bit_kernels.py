# mypy: ignore-errors
"""Low-bit estimates of scores: rows rounded to whole numbers, and the largest estimate of every tile."""

from __future__ import annotations

import triton
import triton.language as tl

# Added and taken away again it rounds a float32 of less than 2^22 to the nearest whole number, ties to even.
_TO_WHOLE = tl.constexpr(12582912.0)


@triton.jit
def low_bit_rows(
    p_x, p_mean, p_other, p_rows, p_unit, p_along, strides, heads, groups, tokens, scale,
    MOST: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x scale - mean of every token as whole numbers of at most MOST, int8 [B H, tokens, PAD].

    x [B, tokens, H, D], mean [B, H, D]; along = x scale . other, other [B, H / groups, D].  Their units
    and along are float32 [B H, tokens]; columns behind D are 0.
    """
    line = tl.program_id(1).to(tl.int64)
    n, h = line // heads, line % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PAD)
    inside, real = row < tokens, column < D
    p_row = p_x + n * strides[0] + h * strides[2] + row.to(tl.int64)[:, None] * strides[1]
    x = tl.load(p_row + column[None, :], mask=inside[:, None] & real[None, :], other=0.0)
    x = x.to(tl.float32) * scale
    other = tl.load(
        p_other + (n * (heads // groups) + h // groups) * D + column, mask=real, other=0.0
    )
    rest = x - tl.load(p_mean + line * D + column, mask=real, other=0.0)[None, :]
    rest = tl.where(real[None, :], rest, 0.0)
    unit = tl.max(tl.abs(rest), 1) / MOST
    whole = rest / tl.where(unit == 0.0, 1.0, unit)[:, None]
    whole = (whole + _TO_WHOLE) - _TO_WHOLE
    at = line * tokens + row
    tl.store(p_rows + at[:, None] * PAD + column[None, :], whole.to(tl.int8), mask=inside[:, None])
    tl.store(p_unit + at, unit, mask=inside)
    tl.store(p_along + at, tl.sum(x * other[None, :], 1), mask=inside)


@triton.jit
def low_bit_tiles(
    p_q, p_q_unit, p_q_level, p_k, p_k_unit, p_k_level, p_out,
    heads, groups, Lq, Lk, tiles, blocks, shift, local,
    PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest q_unit k_unit (q . k) + k_level + q_level in every tile of Q_BLOCK x KV_BLOCK pairs.

    q, k int8 [B H, tokens, PAD]; k_level [B Hq, Lk]; out float32 [B Hq, tiles, blocks].  Programs whose pairs
    all lie within `local` keys of a query or behind it leave their tiles as they are.
    """
    line = tl.program_id(1).to(tl.int64)
    n, h = line // heads, line % heads
    lines_k = n * (heads // groups) + h // groups
    across = tl.cdiv(Lk, COLUMNS)
    r = tl.cdiv(Lq, ROWS) - 1 - tl.program_id(0) // across  # long rows first
    c = tl.program_id(0) % across
    if c * COLUMNS + KV_BLOCK - 1 <= tl.minimum((r + 1) * ROWS, Lq) - 1 + shift - local:
        row = r * ROWS + tl.arange(0, ROWS)
        column = c * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, PAD)
        used, seen = row < Lq, column < Lk
        p_rows = p_q + (line * Lq + row)[:, None] * PAD + depth[None, :]
        p_columns = p_k + (lines_k * Lk + column)[:, None] * PAD + depth[None, :]
        q = tl.load(p_rows, mask=used[:, None], other=0)
        k = tl.load(p_columns, mask=seen[:, None], other=0)
        products = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
        q_unit = tl.load(p_q_unit + line * Lq + row, mask=used, other=0.0)
        q_level = tl.load(p_q_level + line * Lq + row, mask=used, other=float("-inf"))
        k_unit = tl.load(p_k_unit + lines_k * Lk + column, mask=seen, other=0.0)
        k_level = tl.load(p_k_level + line * Lk + column, mask=seen, other=float("-inf"))
        x = products * q_unit[:, None] * k_unit[None, :] + k_level[None, :] + q_level[:, None]
        x = tl.max(tl.reshape(x, (ROWS, COLUMNS // KV_BLOCK, KV_BLOCK)), 2)
        x = tl.max(tl.reshape(x, (ROWS // Q_BLOCK, Q_BLOCK, COLUMNS // KV_BLOCK)), 1)
        tile = r * (ROWS // Q_BLOCK) + tl.arange(0, ROWS // Q_BLOCK)
        block = c * (COLUMNS // KV_BLOCK) + tl.arange(0, COLUMNS // KV_BLOCK)
        p_tiles = p_out + (line * tiles + tile)[:, None] * blocks + block[None, :]
        tl.store(p_tiles, x, mask=(tile < tiles)[:, None] & (block < blocks)[None, :])
