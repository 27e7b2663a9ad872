# mypy: ignore-errors
"""Runs of keys at any start and single keys beside them, in one softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.softmax import LOG2E, row_lse, running_softmax
from foveal.engines.common.tiles import load_rows, store_rows


@triton.jit
def _count(p_list, length, WIDTH: tl.constexpr):
    """How many entries of a list that ends in -1 are used."""
    total = 0
    for i in range(0, length, WIDTH):
        at = i + tl.arange(0, WIDTH)
        used = tl.load(p_list + at, mask=at < length, other=-1) >= 0
        total += tl.sum(used.to(tl.int32), 0)
    return total


@triton.jit
def _add(
    q, p_k, p_v, key, there, position, largest, total, acc, unit, k_stride, v_stride,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """The running softmax over the keys that are `there`, by rows that stand at or behind them."""
    seen = there[None, :] & (key[None, :] <= position[:, None])
    k = load_rows(p_k + key.to(tl.int64) * k_stride, there, D, D_PAD, True)
    s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
    p, factor, largest, total = running_softmax(s, unit, largest, total)
    v = load_rows(p_v + key.to(tl.int64) * v_stride, there, DV, DV_PAD, True)
    acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
    return largest, total, acc


@triton.jit
def column_attend_forward(
    p_q, p_k, p_v, p_o, p_lse, p_starts, p_stops, p_columns, q_strides, k_strides, v_strides, o_strides,
    heads, groups, parts, lists, Lq, tiles, tile_size, runs, columns, shift, scale,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """o and base-2 lse of a tile of queries of HEADS query heads that share a list.

    p_starts, p_stops int32 [B, lists, tiles, runs], disjoint runs of keys, a start of -1 where there is
    none left; p_columns int32 [B, lists, tiles, columns], -1 behind the last.  groups: query heads of a
    key head; parts: programs that share them; heads: query heads; lists: 1, key heads or query heads.
    """
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    rest = program // tiles
    part = rest % parts
    kv = rest // parts % (heads // groups)
    n = (rest // parts // (heads // groups)).to(tl.int64)
    row = tl.arange(0, TOKENS * HEADS)
    g = part * HEADS + row % HEADS
    within = row // HEADS
    token = tile * tile_size + within
    inside = (within < tile_size) & (token < Lq) & (g < groups)
    token = tl.where(token < Lq, token, 0)
    head = kv * groups + tl.where(g < groups, g, 0)
    own = (kv * groups + part * HEADS) * lists // heads  # the list of the first head is that of all
    line = (n * lists + own) * tiles + tile
    p_starts = p_starts + line * runs
    p_stops = p_stops + line * runs
    p_columns = p_columns + line * columns
    p_rows = p_q + n * q_strides[0] + token.to(tl.int64) * q_strides[1] + head * q_strides[2]
    q = load_rows(p_rows, inside, D, D_PAD, True)
    p_k = p_k + n * k_strides[0] + kv * k_strides[2]
    p_v = p_v + n * v_strides[0] + kv * v_strides[2]
    position = token + shift if CAUSAL else token * 0 + 2147483647
    unit = scale * LOG2E
    largest = tl.full([TOKENS * HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    acc = tl.zeros([TOKENS * HEADS, DV_PAD], tl.float32)
    last = tl.max(position, 0)
    count = _count(p_starts, runs, 128)
    for i in range(0, count):
        first = tl.load(p_starts + i)
        stop = tl.minimum(tl.load(p_stops + i) - 1, last) + 1
        for at in tl.range(first, stop, BLOCK, num_stages=STAGES):
            key = at + tl.arange(0, BLOCK)
            largest, total, acc = _add(
                q, p_k, p_v, key, key < stop, position, largest, total, acc, unit,
                k_strides[1], v_strides[1], D, D_PAD, DV, DV_PAD,
            )  # fmt: skip
    count = _count(p_columns, columns, 128)
    for i in tl.range(0, count, BLOCK, num_stages=STAGES):
        at = i + tl.arange(0, BLOCK)
        there = at < count
        key = tl.load(p_columns + at, mask=there, other=0)
        largest, total, acc = _add(
            q, p_k, p_v, key, there, position, largest, total, acc, unit,
            k_strides[1], v_strides[1], D, D_PAD, DV, DV_PAD,
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    p_rows = p_o + n * o_strides[0] + token.to(tl.int64) * o_strides[1] + head * o_strides[2]
    store_rows(p_rows, acc, inside, DV, DV_PAD)
    p_row = p_lse + (n * heads + head) * Lq + token
    tl.store(p_row, row_lse(largest, total), mask=inside)
