# mypy: ignore-errors
"""Attention of tokens that list their own key blocks.

Rows of a tile are the query heads of a group, times tokens that visit the same block.  By key: a
program holds one block of keys, gathers the tokens that list it, and leaves one part per listing, which
a second kernel sums per token.  By token: a program holds one token and walks along its list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.softmax import LOG2E, row_lse, running_softmax
from foveal.engines.common.tiles import load_rows, store_rows


@triton.jit
def _segment(work, lists):
    """Batch and head, listings, and keys of a segment: (line, first, stop, start, end)."""
    program = tl.program_id(0)
    own = tl.load(work[1] + program)
    first = tl.load(work[2] + program)
    stop = tl.load(work[3] + program)
    block = own % lists[2]
    line = own // lists[2] // lists[3]
    return line, first, stop, tl.load(lists[0] + block), tl.load(lists[1] + block)


@triton.jit
def _listings(
    p_order, i, stop, groups, line, Lq, SLOTS: tl.constexpr, G_PAD: tl.constexpr, ROWS: tl.constexpr
):
    """Rows of a tile of listings: (place of the part, token, head in its group, whether it is one)."""
    row = tl.arange(0, ROWS)
    at = i + row // G_PAD
    g = row % G_PAD
    inside = (at < stop) & (g < groups)
    before = tl.cast(line, tl.int64) * Lq * SLOTS
    listing = tl.load(p_order + at, mask=inside, other=0).to(tl.int64)
    listing = tl.where(inside, listing, before)
    token = (listing - before).to(tl.int32) // SLOTS
    return listing * groups + g, token.to(tl.int64), g, inside


@triton.jit
def _store_parts(p_rows, rows, inside, D: tl.constexpr, D_PAD: tl.constexpr):
    """As `store_rows`, for what is read once: the second-level cache is for the queries."""
    column = tl.arange(0, D_PAD)
    tl.store(
        p_rows[:, None] + column[None, :],
        rows.to(p_rows.dtype.element_ty),
        mask=inside[:, None] & (column < D)[None, :],
        eviction_policy="evict_first",
    )


@triton.jit
def token_attend_by_key(
    p_q, p_k, p_v, p_part, p_level, work, lists, q_strides, k_strides, v_strides,
    heads, groups, Lq, shift, scale,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Softmax of every listing of a segment on the keys of its block: part and base-2 lse.

    work: (order, cell, first, stop) of `Segments`; lists: (starts, stops, blocks, chunks, cells).
    p_part [listings, groups, DV], p_level float32 [listings, groups].
    """
    if tl.load(work[1] + tl.program_id(0)) < lists[4]:
        line, first, stop, start, end = _segment(work, lists)
        n = (line // heads).to(tl.int64)
        h = line % heads
        key = start + tl.arange(0, BLOCK)
        key_inside = key < end
        p_rows = p_k + n * k_strides[0] + key.to(tl.int64) * k_strides[1] + h * k_strides[2]
        k = load_rows(p_rows, key_inside, D, D_PAD, True)
        p_rows = p_v + n * v_strides[0] + key.to(tl.int64) * v_strides[1] + h * v_strides[2]
        v = load_rows(p_rows, key_inside, DV, DV_PAD, True)
        p_head = p_q + n * q_strides[0] + (h * groups) * q_strides[2]
        for i in tl.range(first, stop, ROWS // G_PAD, num_stages=STAGES):
            place, token, g, inside = _listings(
                work[0], i, stop, groups, line, Lq, SLOTS, G_PAD, ROWS
            )
            p_own = p_head + token * q_strides[1] + g * q_strides[2]
            q = load_rows(p_own, inside, D, D_PAD, True)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            seen = key_inside[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= (token + shift)[:, None])
            s = tl.where(seen, s, float("-inf"))
            largest = tl.max(s, 1)
            base = tl.where(largest == float("-inf"), 0.0, largest)
            p = tl.exp2(s - base[:, None])
            total = tl.sum(p, 1)
            o = tl.dot(p.to(v.dtype), v, input_precision="ieee")
            o = o / tl.where(total == 0.0, 1.0, total)[:, None]
            _store_parts(p_part + place * DV, o, inside, DV, DV_PAD)
            tl.store(p_level + place, row_lse(largest, total), mask=inside)


@triton.jit
def gated(acc, p_gate, others, offset, inside, DV: tl.constexpr, DV_PAD: tl.constexpr):
    """acc times the gate at p_gate + 1, plus the others at `offset` times the gates at p_gate and + 2."""
    acc = acc * tl.load(p_gate + 1, mask=inside, other=0.0).to(tl.float32)[:, None]
    for i in tl.static_range(len(others)):
        gate = tl.load(p_gate + 2 * i, mask=inside, other=0.0).to(tl.float32)
        other = load_rows(others[i] + offset, inside, DV, DV_PAD, True)
        acc += gate[:, None] * other.to(tl.float32)
    return acc


@triton.jit
def store_results(
    acc, sums, p_o, p_lse, p_gates, others, o_strides, gate_strides, place, sizes, inside,
    DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Rows of o, under gates where there are some, and of lse unless p_lse is None.

    sums: largest score and sum of weights of each row; place: its batch, token and query head; sizes: key
    heads, query heads of each, and tokens.
    """
    n, token, head = place
    offset = n * o_strides[0] + token * o_strides[1] + head * o_strides[2]
    if p_gates is not None:
        p_gate = p_gates + n * gate_strides[0] + token * gate_strides[1] + head * gate_strides[2]
        acc = gated(acc, p_gate, others, offset, inside, DV, DV_PAD)
    store_rows(p_o + offset, acc, inside, DV, DV_PAD)
    if p_lse is not None:
        p_row = p_lse + (n * sizes[0] * sizes[1] + head) * sizes[2] + token
        tl.store(p_row, row_lse(sums[0], sums[1]), mask=inside)


@triton.jit
def token_attend_sum(
    p_part, p_level, p_indices, p_o, p_lse, p_gates, others, o_strides, gate_strides,
    heads, groups, Lq, rows,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """o and base-2 lse of rows (batch, key head, token, head of the group) from the parts of their lists.

    With p_gates [B, Lq, Hq, 3] o is that times gate 1, plus the `others`, which lie as o does, times gates
    0 and 2; lse is not written where p_lse is None.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    g = row % groups
    listing = row // groups * SLOTS
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for s in range(SLOTS):
        used = inside & (tl.load(p_indices + listing + s, mask=inside, other=-1) >= 0)
        level = tl.load(p_level + (listing + s) * groups + g, mask=used, other=float("-inf"))
        largest = tl.maximum(largest, level)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for s in range(SLOTS):
        used = inside & (tl.load(p_indices + listing + s, mask=inside, other=-1) >= 0)
        level = tl.load(p_level + (listing + s) * groups + g, mask=used, other=float("-inf"))
        weight = tl.exp2(level - base)
        part = load_rows(p_part + ((listing + s) * groups + g) * DV, used, DV, DV_PAD, True)
        acc += weight[:, None] * part.to(tl.float32)
        total += weight
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    token = row // groups % Lq
    line = row // groups // Lq
    n = line // heads
    head = line % heads * groups + g
    store_results(
        acc, (largest, total), p_o, p_lse, p_gates, others, o_strides, gate_strides, (n, token, head),
        (heads, groups, Lq), inside, DV, DV_PAD,
    )  # fmt: skip


@triton.jit
def _near_blocks(
    rows, q, p_k, p_v, first, stop, position, Lk, k_strides, v_strides, unit, sinks, locals_,
    BLOCK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr,
    DV_PAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The running softmax over blocks first <= b < stop, each by the rows that it is near to."""
    largest, total, acc = rows
    own = position // BLOCK
    for b in tl.range(first, stop, num_stages=STAGES):
        key = b * BLOCK + tl.arange(0, BLOCK)
        inside = key < Lk
        near = (b < sinks) | (b > own - locals_)
        seen = inside[None, :] & (key[None, :] <= position[:, None]) & near[:, None]
        k = load_rows(p_k + key.to(tl.int64) * k_strides[1], inside, D, D_PAD, True)
        s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
        p, factor, largest, total = running_softmax(s, unit, largest, total)
        v = load_rows(p_v + key.to(tl.int64) * v_strides[1], inside, DV, DV_PAD, True)
        acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
    return largest, total, acc


@triton.jit
def token_attend_sum_near(
    p_q, p_k, p_v, p_part, p_level, p_indices, p_o, p_lse, p_gates, others,
    q_strides, k_strides, v_strides, o_strides, gate_strides,
    heads, groups, Lq, Lk, tiles, shift, scale, sinks, locals_,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, G_PAD: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """As `token_attend_sum` for tokens beside each other; the blocks near to them are computed here."""
    ROWS: tl.constexpr = TOKENS * G_PAD
    line = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    n = (line // heads).to(tl.int64)
    h = line % heads
    row = tl.arange(0, ROWS)
    token = tile * TOKENS + row // G_PAD
    g = row % G_PAD
    inside = (token < Lq) & (g < groups)
    token = tl.where(token < Lq, token, Lq - 1)
    head = h * groups + tl.where(g < groups, g, 0)
    position = token + shift
    p_rows = p_q + n * q_strides[0] + token.to(tl.int64) * q_strides[1] + head * q_strides[2]
    q = load_rows(p_rows, inside, D, D_PAD, True)
    p_k = p_k + n * k_strides[0] + h * k_strides[2]
    p_v = p_v + n * v_strides[0] + h * v_strides[2]
    rows = (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, DV_PAD], tl.float32),
    )
    stop = tl.max(position, 0) // BLOCK + 1
    first = tl.maximum(tl.min(position, 0) // BLOCK + 1 - locals_, 0)
    rows = _near_blocks(
        rows, q, p_k, p_v, 0, tl.minimum(sinks, first), position, Lk, k_strides, v_strides,
        scale * LOG2E, sinks, locals_, BLOCK, D, D_PAD, DV, DV_PAD, STAGES,
    )  # fmt: skip
    rows = _near_blocks(
        rows, q, p_k, p_v, first, stop, position, Lk, k_strides, v_strides,
        scale * LOG2E, sinks, locals_, BLOCK, D, D_PAD, DV, DV_PAD, STAGES,
    )  # fmt: skip
    largest, total, acc = rows
    own = position // BLOCK
    listing = (line.to(tl.int64) * Lq + token) * SLOTS
    for s in tl.range(SLOTS, num_stages=STAGES):
        block = tl.load(p_indices + listing + s, mask=inside, other=-1)
        used = inside & (block >= sinks) & (block <= own - locals_)
        place = (listing + s) * groups + g
        level = tl.load(p_level + place, mask=used, other=float("-inf"))
        part = load_rows(p_part + place * DV, used, DV, DV_PAD, True).to(tl.float32)
        top = tl.maximum(largest, level)
        base = tl.where(top == float("-inf"), 0.0, top)
        factor = tl.exp2(largest - base)
        weight = tl.exp2(level - base)
        acc = acc * factor[:, None] + weight[:, None] * part
        total = total * factor + weight
        largest = top
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    token = token.to(tl.int64)
    store_results(
        acc, (largest, total), p_o, p_lse, p_gates, others, o_strides, gate_strides, (n, token, head),
        (heads, groups, Lq), inside, DV, DV_PAD,
    )  # fmt: skip


@triton.jit
def token_attend_by_token(
    p_q, p_k, p_v, p_o, p_lse, p_indices, lists, q_strides, k_strides, v_strides, o_strides,
    heads, groups, Lq, shift, scale, sinks, locals_,
    SLOTS: tl.constexpr, SLOTS_PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    NEAR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o and base-2 lse of the query heads of one token and key head, along its list.

    NEAR: both hold the softmax over the first `sinks` and the last `locals_` blocks already.
    """
    program = tl.program_id(0)
    token = program % Lq
    line = program // Lq
    n = (line // heads).to(tl.int64)
    h = line % heads
    g = tl.arange(0, ROWS)
    inside = g < groups
    head = h * groups + g
    p_rows = p_q + n * q_strides[0] + token.to(tl.int64) * q_strides[1] + head * q_strides[2]
    q = load_rows(p_rows, inside, D, D_PAD, True)
    p_k = p_k + n * k_strides[0] + h * k_strides[2]
    p_v = p_v + n * v_strides[0] + h * v_strides[2]
    p_list = p_indices + program.to(tl.int64) * SLOTS
    p_own = p_o + n * o_strides[0] + token.to(tl.int64) * o_strides[1] + head * o_strides[2]
    p_level = p_lse + (n * heads * groups + head) * Lq + token
    slot = tl.arange(0, SLOTS_PAD)
    blocks = tl.load(p_list + slot, mask=slot < SLOTS, other=-1)
    if NEAR:
        largest = tl.load(p_level, mask=inside, other=float("-inf"))
        total = tl.where(largest > float("-inf"), 1.0, 0.0)
        acc = load_rows(p_own, inside, DV, DV_PAD, True).to(tl.float32)
        left = (blocks >= 0) & (blocks <= (token + shift) // BLOCK - locals_)
        first = tl.sum((left & (blocks < sinks)).to(tl.int32), 0)
        count = tl.sum(left.to(tl.int32), 0)
    else:
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DV_PAD], tl.float32)
        first = 0
        count = tl.sum((blocks >= 0).to(tl.int32), 0)
    for s in tl.range(first, count, num_stages=STAGES):
        block = tl.load(p_list + s)
        if NEAR:  # far blocks lie whole in the past, one behind the other
            key = block * BLOCK + tl.arange(0, BLOCK)
            seen = key >= 0
        else:
            key = tl.load(lists[0] + block) + tl.arange(0, BLOCK)
            seen = key < tl.load(lists[1] + block)
            if CAUSAL:
                seen = seen & (key <= token + shift)
        k = load_rows(p_k + key.to(tl.int64) * k_strides[1], seen, D, D_PAD, not NEAR)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not NEAR:
            x = tl.where(seen[None, :], x, float("-inf"))
        p, factor, largest, total = running_softmax(x, scale * LOG2E, largest, total)
        v = load_rows(p_v + key.to(tl.int64) * v_strides[1], seen, DV, DV_PAD, not NEAR)
        acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    store_rows(p_own, acc, inside, DV, DV_PAD)
    tl.store(p_level, row_lse(largest, total), mask=inside)


@triton.jit
def token_attend_shift(
    p_o, p_do, p_dlse, p_shift, o_strides, do_strides, heads, Lq, rows,
    ROWS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """sum(o do) - dlse of rows (batch, query head, token); float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    token = row % Lq
    head = row // Lq % heads
    n = row // Lq // heads
    p_rows = p_o + n * o_strides[0] + token * o_strides[1] + head * o_strides[2]
    o = load_rows(p_rows, inside, DV, DV_PAD, True).to(tl.float32)
    p_rows = p_do + n * do_strides[0] + token * do_strides[1] + head * do_strides[2]
    do = load_rows(p_rows, inside, DV, DV_PAD, True).to(tl.float32)
    own = tl.sum(o * do, 1)
    if p_dlse is not None:
        own -= tl.load(p_dlse + row, mask=inside, other=0.0)
    tl.store(p_shift + row, own, mask=inside)


@triton.jit
def token_attend_backward(
    p_q, p_k, p_v, p_do, p_lse, p_shift, p_part, p_dk, p_dv, work, lists,
    q_strides, k_strides, v_strides, do_strides, heads, groups, Lq, shift, scale,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Of a segment: dq of every listing [listings, groups, D], dk and dv of its block, float32
    [segments, BLOCK, .]."""
    program = tl.program_id(0).to(tl.int64)
    if tl.load(work[1] + program) < lists[4]:
        line, first, stop, start, end = _segment(work, lists)
        n = (line // heads).to(tl.int64)
        h = line % heads
        key = start + tl.arange(0, BLOCK)
        key_inside = key < end
        p_rows = p_k + n * k_strides[0] + key.to(tl.int64) * k_strides[1] + h * k_strides[2]
        k = load_rows(p_rows, key_inside, D, D_PAD, True)
        p_rows = p_v + n * v_strides[0] + key.to(tl.int64) * v_strides[1] + h * v_strides[2]
        v = load_rows(p_rows, key_inside, DV, DV_PAD, True)
        p_head = p_q + n * q_strides[0] + (h * groups) * q_strides[2]
        p_do_head = p_do + n * do_strides[0] + (h * groups) * do_strides[2]
        p_levels = (n * heads * groups + h * groups) * Lq
        dk = tl.zeros([BLOCK, D_PAD], tl.float32)
        dv = tl.zeros([BLOCK, DV_PAD], tl.float32)
        for i in tl.range(first, stop, ROWS // G_PAD, num_stages=STAGES):
            place, token, g, inside = _listings(
                work[0], i, stop, groups, line, Lq, SLOTS, G_PAD, ROWS
            )
            q = load_rows(p_head + token * q_strides[1] + g * q_strides[2], inside, D, D_PAD, True)
            do = load_rows(
                p_do_head + token * do_strides[1] + g * do_strides[2], inside, DV, DV_PAD, True
            )
            lse = tl.load(p_lse + (p_levels + g * Lq + token), mask=inside, other=float("-inf"))
            own = tl.load(p_shift + (p_levels + g * Lq + token), mask=inside, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)  # [keys, rows]
            seen = key_inside[:, None] & (lse > float("-inf"))[None, :]
            if CAUSAL:
                seen = seen & (key[:, None] <= (token + shift)[None, :])
            p = tl.where(seen, tl.exp2(s - tl.where(lse > float("-inf"), lse, 0.0)[None, :]), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = tl.where(seen, p * (dp - own[None, :]), 0.0)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
            dq = tl.dot(tl.trans(ds.to(k.dtype)), k, input_precision="ieee") * scale
            _store_parts(p_part + place * D, dq, inside, D, D_PAD)
        slot = program * BLOCK + tl.arange(0, BLOCK)
        every = tl.arange(0, BLOCK) < BLOCK
        store_rows(p_dk + slot * D, dk * scale, every, D, D_PAD)
        store_rows(p_dv + slot * DV, dv, every, DV, DV_PAD)


@triton.jit
def token_attend_sum_q(
    p_part, p_indices, p_dq, dq_strides, heads, groups, Lq, rows,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """dq of rows (batch, key head, token, head of the group): the sum over their lists."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    g = row % groups
    listing = row // groups * SLOTS
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for s in range(SLOTS):
        used = inside & (tl.load(p_indices + listing + s, mask=inside, other=-1) >= 0)
        part = load_rows(p_part + ((listing + s) * groups + g) * D, used, D, D_PAD, True)
        acc += part.to(tl.float32)
    token = row // groups % Lq
    line = row // groups // Lq
    head = line % heads * groups + g
    p_rows = p_dq + line // heads * dq_strides[0] + token * dq_strides[1] + head * dq_strides[2]
    store_rows(p_rows, acc, inside, D, D_PAD)


@triton.jit
def token_attend_sum_kv(
    p_part, p_of_cell, lists, p_out, strides, heads,
    BLOCK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Gradient of the keys (or values) of one block and key head: the sum over its segments."""
    block = tl.program_id(0) % lists[2]
    line = tl.program_id(0) // lists[2]
    row = tl.arange(0, BLOCK)
    every = row < BLOCK
    acc = tl.zeros([BLOCK, D_PAD], tl.float32)
    for chunk in range(lists[3]):
        cell = (line * lists[3] + chunk) * lists[2] + block
        for s in range(tl.load(p_of_cell + cell), tl.load(p_of_cell + cell + 1)):
            place = tl.cast(s, tl.int64) * BLOCK + row
            acc += load_rows(p_part + place * D, every, D, D_PAD, True)
    key = tl.load(lists[0] + block) + row
    inside = key < tl.load(lists[1] + block)
    n = (line // heads).to(tl.int64)
    p_rows = p_out + n * strides[0] + key.to(tl.int64) * strides[1] + line % heads * strides[2]
    store_rows(p_rows, acc, inside, D, D_PAD)
