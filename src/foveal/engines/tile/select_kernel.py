# mypy: ignore-errors
"""Scores of blocks from compressed keys, and the best of them per token."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.softmax import LOG2E
from foveal.engines.common.tiles import load_rows


@triton.jit
def _binned(p, bins, EXACT: tl.constexpr):
    """p [rows, windows] @ bins [windows, blocks], to 16 bits of p or, if EXACT, to all."""
    if EXACT:
        found = tl.dot(p, bins, input_precision="ieee")
    else:
        high = p.to(tl.bfloat16)
        low = (p - high.to(tl.float32)).to(tl.bfloat16)
        found = tl.dot(high, bins, tl.dot(low, bins))
    return found


@triton.jit
def token_scores(
    p_q, p_k, p_lse, p_out, p_first, p_own, p_seen, q_strides, k_strides,
    heads, groups, Lq, begin, end, tiles, width, scale, sinks, locals_,
    TOKENS: tl.constexpr, G_PAD: tl.constexpr, WINDOWS: tl.constexpr, BLOCKS: tl.constexpr,
    STEP: tl.constexpr, REACH: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of the blocks of tokens begin <= t < end, as bits of float32 [B heads, end - begin, width].

    q [B, Lq, Hq, D]; compressed keys [B, W, heads, D]; lse float32 [B, Hq, Lq] of their softmax.  Token t
    may choose the blocks from p_first[t] to p_own[t] and sees the windows STEP p_first[t] <= w <
    p_seen[t].  Window w counts c times to block j, c the number of pairs (m, n), m < STEP, n <= REACH,
    with STEP j - REACH + m + n = w.  Block j lies in column j - p_first[t]; inf where it is always
    chosen; columns behind that of the own block are not written.
    """
    ROWS: tl.constexpr = TOKENS * G_PAD
    line = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    n = (line // heads).to(tl.int64)
    h = line % heads
    row = tl.arange(0, ROWS)
    token = begin + tile * TOKENS + row // G_PAD
    g = row % G_PAD
    inside = (token < end) & (g < groups)
    token = tl.where(token < end, token, end - 1)
    head = h * groups + g
    p_rows = p_q + n * q_strides[0] + token.to(tl.int64) * q_strides[1] + head * q_strides[2]
    q = load_rows(p_rows, inside, D, D_PAD, True)
    p_level = p_lse + (n * heads * groups + head) * Lq + token
    lse = tl.load(p_level, mask=inside, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    seen = tl.load(p_seen + token)
    first_window = tl.load(p_first + token) * STEP
    last_window = tl.max(seen, 0)
    own_token = begin + tile * TOKENS + tl.arange(0, TOKENS)
    own_inside = own_token < end
    first_block = tl.load(p_first + own_token, mask=own_inside, other=2147483647)
    own = tl.load(p_own + own_token, mask=own_inside, other=-1)
    p_row = p_out + (line.to(tl.int64) * (end - begin) + (own_token - begin)) * width - first_block
    x = tl.arange(0, WINDOWS)
    j = tl.arange(0, PAD)
    ahead = x[:, None] - STEP * j[None, :]
    count = tl.minimum(tl.minimum(ahead + 1, STEP + REACH - ahead), tl.minimum(STEP, REACH + 1))
    count = tl.where((j < BLOCKS)[None, :], tl.maximum(count, 0), 0)
    bins = count.to(tl.float32) if EXACT else count.to(tl.bfloat16)
    lowest = tl.min(first_block, 0)
    highest = tl.max(own, 0)
    p_keys = p_k + n * k_strides[0] + h * k_strides[2]
    for b in tl.range(lowest, highest + 1, BLOCKS, num_stages=STAGES):
        window = b * STEP - REACH + x
        there = (window >= 0) & (window < last_window)
        k = load_rows(p_keys + window.to(tl.int64) * k_strides[1], there, D, D_PAD, True)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        visible = (window[None, :] >= first_window[:, None]) & (window[None, :] < seen[:, None])
        p = tl.where(visible, tl.exp2(s - lse[:, None]), 0.0)
        if STEP == 1 and REACH == 0:
            score = tl.sum(tl.reshape(p, (TOKENS, G_PAD, PAD)), 1)
        elif TOKENS >= 16:
            score = _binned(tl.sum(tl.reshape(p, (TOKENS, G_PAD, WINDOWS)), 1), bins, EXACT)
        else:
            score = tl.sum(tl.reshape(_binned(p, bins, EXACT), (TOKENS, G_PAD, PAD)), 1)
        block = b + j
        since = block[None, :] - first_block[:, None]
        forced = (since < sinks) | (block[None, :] > own[:, None] - locals_)
        score = tl.where(forced, float("inf"), tl.maximum(score, 0.0))
        kept = (since >= 0) & (block[None, :] <= own[:, None]) & (j < BLOCKS)[None, :]
        tl.store(p_row[:, None] + block[None, :], score.to(tl.int32, bitcast=True), mask=kept)


@triton.jit
def _scores(p_row, at, used):
    """Scores of 32 columns, -1 behind the last."""
    column = at + tl.arange(0, 32)
    return tl.load(p_row + column, mask=column < used, other=-1)


@triton.jit
def _bound(p_row, used, low, count, high, BEST: tl.constexpr, FEW: tl.constexpr):
    """A bound >= low that at least BEST scores reach and, unless equal ones forbid it, at most FEW.

    Returns it and how many reach it; `count` reach low, fewer than BEST are at or above high.
    """
    while (count > FEW) & (high - low > 1):
        middle = low + (high - low) // 2
        own = tl.full([32], 0, tl.int32)
        for at in range(0, used, 256):
            for i in tl.static_range(8):
                own += (_scores(p_row, at + 32 * i, used) >= middle).to(tl.int32)
        found = tl.sum(own, 0)
        enough = found >= BEST
        low = tl.where(enough, middle, low)
        count = tl.where(enough, found, count)
        high = tl.where(enough, high, middle)
    return low, count


@triton.jit
def _offer(p_few, slot, column, x, low, FEW: tl.constexpr):
    """Writes the columns that reach `low` at their slots; returns the slots behind them."""
    chosen = x >= low
    tl.store(p_few + slot, column, mask=chosen & (slot < FEW))
    return slot + chosen.to(tl.int32)


@triton.jit
def _collect(p_row, p_few, used, low, FEW: tl.constexpr):
    """Lays the columns that reach `low` side by side, in any order; returns how many do."""
    count = tl.full([], 0, tl.int32)
    lane = tl.arange(0, 32)
    for at in range(0, used, 128):
        a = _scores(p_row, at, used)
        b = _scores(p_row, at + 32, used)
        c = _scores(p_row, at + 64, used)
        d = _scores(p_row, at + 96, used)
        own = (a >= low).to(tl.int32) + (b >= low).to(tl.int32)
        own += (c >= low).to(tl.int32) + (d >= low).to(tl.int32)
        slot = count + tl.cumsum(own, 0) - own
        slot = _offer(p_few, slot, at + lane, a, low, FEW)
        slot = _offer(p_few, slot, at + 32 + lane, b, low, FEW)
        slot = _offer(p_few, slot, at + 64 + lane, c, low, FEW)
        _offer(p_few, slot, at + 96 + lane, d, low, FEW)
        count += tl.sum(own, 0)
    return count


@triton.jit
def _write_few(
    p_row,
    p_few,
    p_list,
    first,
    count,
    BEST: tl.constexpr,
    BEST_PAD: tl.constexpr,
    FEW: tl.constexpr,
):
    """The BEST of `count` <= FEW columns by their ranks, ties to the left, ascending."""
    slot = tl.arange(0, FEW)
    place = tl.load(p_few + slot, mask=slot < count, other=0)
    x = tl.load(p_row + place, mask=slot < count, other=-1)
    rank = tl.sum((x[:, None] > x[None, :]).to(tl.int32), 0)
    chosen = (rank < BEST) & (slot < count)
    total = tl.sum(chosen.to(tl.int32), 0)
    if total > BEST:
        left = (x[:, None] == x[None, :]) & (place[:, None] < place[None, :])
        rank += tl.sum(left.to(tl.int32), 0)
        chosen = (rank < BEST) & (slot < count)
        total = tl.sum(chosen.to(tl.int32), 0)
    place = tl.where(chosen, place, 2147483647)
    number = tl.sum((place[:, None] < place[None, :]).to(tl.int32), 0)
    tl.store(p_list + number, first + place, mask=chosen)
    _write_none(p_list, total, BEST, BEST_PAD)


@triton.jit
def _write_none(p_list, total, BEST: tl.constexpr, BEST_PAD: tl.constexpr):
    slot = tl.arange(0, BEST_PAD)
    tl.store(p_list + slot, tl.full([BEST_PAD], -1, tl.int32), mask=(slot >= total) & (slot < BEST))


@triton.jit
def _write_tied(p_row, p_list, first, used, low, BEST: tl.constexpr, BEST_PAD: tl.constexpr):
    """Those above `low`, and of those that equal it the left ones, up to BEST."""
    above = tl.full([], 0, tl.int32)
    for at in range(0, used, 32):
        above += tl.sum((_scores(p_row, at, used) > low).to(tl.int32), 0)
    room = BEST - above
    total = tl.full([], 0, tl.int32)
    for at in range(0, used, 32):
        x = _scores(p_row, at, used)
        equal = (x == low).to(tl.int32)
        chosen = (x > low) | ((x == low) & (tl.cumsum(equal, 0) <= room))
        one = chosen.to(tl.int32)
        number = total + tl.cumsum(one, 0) - 1
        column = at + tl.arange(0, 32)
        tl.store(p_list + number, first + column, mask=chosen & (number < BEST))
        total += tl.sum(one, 0)
        room -= tl.sum(equal, 0)
    _write_none(p_list, total, BEST, BEST_PAD)


@triton.jit
def token_best(
    p_bits, p_few, p_out, p_first, p_own, Lq, begin, end, width,
    BEST: tl.constexpr, BEST_PAD: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The BEST largest of the scores of one token, ties to the left: ascending blocks, -1 behind.

    p_bits of `token_scores`; p_few int32 [programs, FEW], memory for a while; p_out int32 [B heads, Lq,
    BEST].  The row is streamed twice: the BEST-th of the maxima of 32 groups is a bound that few scores
    reach; these are laid side by side and ranked.
    """
    tokens = end - begin
    row = tl.program_id(0).to(tl.int64)
    line = row // tokens
    token = begin + tl.program_id(0) % tokens
    first = tl.load(p_first + token)
    used = tl.load(p_own + token) - first + 1
    p_row = p_bits + row * width
    p_few += row * FEW
    p_list = p_out + (line * Lq + token) * BEST
    low = tl.full([], 0, tl.int32)
    largest = tl.full([32], -1, tl.int32)
    if used > FEW:
        for at in range(0, used, 256):
            for i in tl.static_range(8):
                largest = tl.maximum(largest, _scores(p_row, at + 32 * i, used))
        if BEST <= 32:
            rank = tl.sum((largest[:, None] > largest[None, :]).to(tl.int32), 0)
            low = tl.maximum(tl.min(tl.where(rank < BEST, largest, 2147483647), 0), 0)
    count = _collect(p_row, p_few, used, low, FEW)
    if count > FEW:
        finite = tl.where(largest < 0x7F800000, largest, -1)
        high = tl.maximum(tl.max(finite, 0), low) + 1
        low, count = _bound(p_row, used, low, count, high, BEST, FEW)
        count = _collect(p_row, p_few, used, low, FEW)
    tl.debug_barrier()
    if count <= FEW:
        _write_few(p_row, p_few, p_list, first, count, BEST, BEST_PAD, FEW)
    else:
        _write_tied(p_row, p_list, first, used, low, BEST, BEST_PAD)
