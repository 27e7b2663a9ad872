# mypy: ignore-errors
"""Attention of tokens beside each other that list their own key blocks, along the union of their lists.

Rows of a tile are the query heads of a group times a few tokens: enough of them for the large matrix
instructions, and a block that several tokens list is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.softmax import (
    LOG2E,
    any_not_finite,
    row_lse,
    running_softmax,
    visible_product,
)
from foveal.engines.common.tiles import load_rows, store_rows
from foveal.engines.tile.token_kernels import gated


@triton.jit
def token_unions(
    p_indices, p_unions, starts, stops, Lq, tiles, shift,
    SLOTS: tl.constexpr, SLOTS_PAD: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """The blocks that the tokens of a tile list, each once: int32 [lines tiles, 2 + TOKENS SLOTS].

    Their number, how many of them hold a key that some token of the tile does not see, which come first,
    and per block number x 2^TOKENS + a bit per token that lists it.
    """
    program = tl.program_id(0).to(tl.int64)
    line = program // tiles
    tile = tl.program_id(0) % tiles
    place = tl.arange(0, TOKENS * SLOTS_PAD)
    own = place // SLOTS_PAD
    token = tile * TOKENS + own
    slot = place % SLOTS_PAD
    inside = (token < Lq) & (slot < SLOTS)
    block = tl.load(p_indices + (line * Lq + token) * SLOTS + slot, mask=inside, other=-1)
    listed = block >= 0
    block = tl.where(listed, block, -1 - place)
    same = block[:, None] == block[None, :]
    before = same & (place[None, :] < place[:, None])
    first = listed & (tl.sum(before.to(tl.int32), 1) == 0)
    members = tl.sum(tl.where(same, 1 << own[None, :], 0), 1)
    start = tl.load(starts + block, mask=first, other=0)
    stop = tl.load(stops + block, mask=first, other=0)
    cut = stop - start < BLOCK
    if CAUSAL:
        cut = cut | (stop - 1 > tile * TOKENS + shift)
    tested = first & cut
    whole = first & (cut == 0)
    front = tl.sum(tested.to(tl.int32), 0)
    behind = front + tl.cumsum(whole.to(tl.int32), 0) - 1
    number = tl.where(tested, tl.cumsum(tested.to(tl.int32), 0) - 1, behind)
    p_union = p_unions + program * (2 + TOKENS * SLOTS)
    tl.store(p_union, tl.sum(first.to(tl.int32), 0))
    tl.store(p_union + 1, front)
    tl.store(p_union + 2 + number, block * (1 << TOKENS) + members, mask=first)


@triton.jit
def _along(
    rows, q, k_desc, v_desc, p_blocks, starts, stops, first, stop, position, member,
    before, column, value_column, unit,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, TESTED: tl.constexpr,
    CONTAINED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The running softmax over listed blocks first <= i < stop; TESTED: some of their keys are hidden.

    CONTAINED: a value that a row does not see adds nothing to it, even NaN.
    """
    largest, total, acc = rows
    for i in tl.range(first, stop, num_stages=STAGES):
        entry = tl.load(p_blocks + i)
        block = entry >> TOKENS
        start = tl.load(starts + block)
        seen = (entry & member)[:, None] > 0
        if TESTED:
            key = start + tl.arange(0, BLOCK)
            seen = seen & (key < tl.load(stops + block))[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= position[:, None])
        k = k_desc.load([before + start, column])
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where(seen, s, float("-inf"))
        p, factor, largest, total = running_softmax(s, unit, largest, total)
        v = v_desc.load([before + start, value_column])
        if CONTAINED:
            acc = visible_product(p, tl.broadcast_to(seen, s.shape), v, acc * factor[:, None])
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
    return largest, total, acc


@triton.jit
def token_attend_by_tile(
    p_q, k_desc, v_desc, p_o, p_lse, p_flags, p_unions, starts, stops, p_gates, others,
    q_strides, heads, Lq, Lk, tiles, shift, scale, shared, width,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """o and base-2 lse of the query heads of TOKENS tokens and one key head, along the union of their lists.

    o [B, Lq, heads GROUPS, DV] lies in rows; k_desc, v_desc: rows [B Lk, heads D] in boxes [BLOCK, D];
    p_unions of `token_unions`.  With p_gates [rows / shared, width] o is that times gate 1, plus the
    `others`, of the shape of o, times gates 0 and 2; lse is not written where p_lse is None.
    p_flags int8 [tiles]: whether a row is not finite.  REPAIR: such tiles anew, where a value that a
    token does not see adds nothing, even NaN.
    """
    if REPAIR:  # noqa: SIM102 - the inner one is not for constants
        if tl.load(p_flags + tl.program_id(0)) == 0:
            return
    ROWS: tl.constexpr = TOKENS * GROUPS
    line = tl.program_id(0) // tiles
    n = (line // heads).to(tl.int64)
    h = line % heads
    own = tl.arange(0, ROWS) // GROUPS
    token = tl.program_id(0) % tiles * TOKENS + own
    inside = token < Lq
    token = tl.where(inside, token, Lq - 1)
    head = h * GROUPS + tl.arange(0, ROWS) % GROUPS
    p_rows = p_q + n * q_strides[0] + token.to(tl.int64) * q_strides[1] + head * q_strides[2]
    q = load_rows(p_rows, inside, D, D, True)
    rows = (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, DV], tl.float32),
    )
    p_union = p_unions + tl.program_id(0).to(tl.int64) * (2 + TOKENS * SLOTS)
    count = tl.load(p_union)
    front = tl.load(p_union + 1)
    before = (n * Lk).to(tl.int32)
    rows = _along(
        rows, q, k_desc, v_desc, p_union + 2, starts, stops, 0, front, token + shift, 1 << own,
        before, h * D, h * DV, scale * LOG2E, TOKENS, BLOCK, CAUSAL, True, REPAIR, STAGES,
    )  # fmt: skip
    rows = _along(
        rows, q, k_desc, v_desc, p_union + 2, starts, stops, front, count, token + shift, 1 << own,
        before, h * D, h * DV, scale * LOG2E, TOKENS, BLOCK, CAUSAL, False, REPAIR, STAGES,
    )  # fmt: skip
    largest, total, acc = rows
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if not REPAIR:
        tl.store(p_flags + tl.program_id(0), any_not_finite(acc).to(tl.int8))
    at = (n * Lq + token) * (heads * GROUPS) + head
    if p_gates is not None:
        acc = gated(acc, p_gates + at // shared * width, others, at * DV, inside, DV, DV)
    store_rows(p_o + at * DV, acc, inside, DV, DV)
    if p_lse is not None:
        p_row = p_lse + (n * heads * GROUPS + head) * Lq + token
        tl.store(p_row, row_lse(largest, total), mask=inside)
