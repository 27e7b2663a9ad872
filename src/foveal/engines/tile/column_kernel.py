# mypy: ignore-errors
"""Blocks of keys at any start and single keys beside them, in one softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.softmax import LOG2E, row_lse, running_softmax
from foveal.engines.common.tiles import load_rows, store_rows


@triton.jit
def _count(p_list, length, WIDTH: tl.constexpr):
    """How many entries of an ascending list that ends in -1 are used."""
    total = 0
    for i in range(0, length, WIDTH):
        at = i + tl.arange(0, WIDTH)
        used = tl.load(p_list + at, mask=at < length, other=-1) >= 0
        total += tl.sum(used.to(tl.int32), 0)
    return total


@triton.jit
def _add(q, p_k, p_v, key, seen, rows, unit, k_stride, v_stride, SPEC: tl.constexpr):
    """The running softmax over some keys of which each row sees those that are `seen`."""
    D: tl.constexpr = SPEC[0]
    D_PAD: tl.constexpr = SPEC[1]
    DV: tl.constexpr = SPEC[2]
    DV_PAD: tl.constexpr = SPEC[3]
    largest, total, acc = rows
    some = tl.max(seen.to(tl.int32), 0) > 0
    k = load_rows(p_k + key.to(tl.int64) * k_stride, some, D, D_PAD, True)
    s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
    p, factor, largest, total = running_softmax(s, unit, largest, total)
    v = load_rows(p_v + key.to(tl.int64) * v_stride, some, DV, DV_PAD, True)
    acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
    return largest, total, acc


@triton.jit
def column_attend_forward(
    p_q, p_k, p_v, p_o, p_lse, p_starts, p_columns, q_strides, k_strides, v_strides, o_strides,
    heads, groups, per_list, lists, Lq, Lk, tiles, starts, columns, shift, scale,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, SPEC: tl.constexpr,
    CAUSAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o and base-2 lse of a tile of queries of one head; its lists hold `starts` and `columns` places.

    A block holds SPAN keys (BLOCK is the power of two above it) or fewer, if the next starts before.
    """
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    h = program // tiles % heads
    n = (program // tiles // heads).to(tl.int64)
    line = (n * lists + h // per_list) * tiles + tile
    p_starts = p_starts + line * starts
    p_columns = p_columns + line * columns
    token = tile * ROWS + tl.arange(0, ROWS)
    inside = token < Lq
    p_rows = p_q + n * q_strides[0] + token.to(tl.int64) * q_strides[1] + h * q_strides[2]
    q = load_rows(p_rows, inside, SPEC[0], SPEC[1], True)
    p_k = p_k + n * k_strides[0] + h // groups * k_strides[2]
    p_v = p_v + n * v_strides[0] + h // groups * v_strides[2]
    position = token + shift if CAUSAL else tl.full([ROWS], 2147483647, tl.int32)
    unit = scale * LOG2E
    rows = (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, SPEC[3]], tl.float32),
    )
    count = _count(p_starts, starts, 128)
    for i in tl.range(0, count, num_stages=STAGES):
        first = tl.load(p_starts + i)
        after = tl.load(p_starts + i + 1, mask=i + 1 < count, other=2147483647)
        key = first + tl.arange(0, BLOCK)
        stop = tl.minimum(tl.minimum(first + SPAN, after), Lk)
        seen = (key < stop)[None, :] & (key[None, :] <= position[:, None])
        rows = _add(q, p_k, p_v, key, seen, rows, unit, k_strides[1], v_strides[1], SPEC)
    count = _count(p_columns, columns, 128)
    for i in tl.range(0, count, BLOCK, num_stages=STAGES):
        at = i + tl.arange(0, BLOCK)
        key = tl.load(p_columns + at, mask=at < count, other=-1)
        seen = (key >= 0)[None, :] & (key[None, :] <= position[:, None])
        rows = _add(q, p_k, p_v, key, seen, rows, unit, k_strides[1], v_strides[1], SPEC)
    largest, total, acc = rows
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    p_rows = p_o + n * o_strides[0] + token.to(tl.int64) * o_strides[1] + h * o_strides[2]
    store_rows(p_rows, acc, inside, SPEC[2], SPEC[3])
    p_row = p_lse + (n * heads + h) * Lq + token
    tl.store(p_row, row_lse(largest, total), mask=inside)
