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
def _threshold(x, low, high, BEST: tl.constexpr):
    """A number >= low that at least BEST of x reach, if so many reach low, and how many do.

    Halving ends when it is BEST of them, or when what is above it is one step away.
    """
    count = tl.sum((x >= low).to(tl.int32), 0)
    while (count > BEST) & (high - low > 1):
        middle = low + (high - low) // 2
        found = tl.sum((x >= middle).to(tl.int32), 0)
        enough = found >= BEST
        low = tl.where(enough, middle, low)
        count = tl.where(enough, found, count)
        high = tl.where(enough, high, middle)
    return low, count


@triton.jit
def _marked(x, low, count, BEST: tl.constexpr):
    """The BEST of those that reach `low`, ties to the left."""
    chosen = x >= low
    if count > BEST:  # what is left over equals `low`
        above = x > low
        equal = x == low
        places = BEST - tl.sum(above.to(tl.int32), 0)
        chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= places))
    return chosen


@triton.jit
def _write(p_list, blocks, chosen, BEST: tl.constexpr, BEST_PAD: tl.constexpr):
    number = tl.cumsum(chosen.to(tl.int32), 0)
    tl.store(p_list + number - 1, blocks, mask=chosen)
    slot = tl.arange(0, BEST_PAD)
    behind = (slot >= tl.sum(chosen.to(tl.int32), 0)) & (slot < BEST)
    tl.store(p_list + slot, tl.full([BEST_PAD], -1, tl.int32), mask=behind)


@triton.jit
def token_best(
    p_bits, p_out, p_first, p_own, Lq, begin, end, width,
    BEST: tl.constexpr, BEST_PAD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The BEST largest of the scores of one token, ties to the left: ascending blocks, -1 behind.

    p_bits of `token_scores`, which is written to; p_out int32 [B heads, Lq, BEST].  The BEST-th of the
    maxima of 32 groups is a bound that few scores reach: these are laid side by side and searched.
    """
    FEW: tl.constexpr = 64
    tokens = end - begin
    line = tl.program_id(0) // tokens
    token = begin + tl.program_id(0) % tokens
    first = tl.load(p_first + token)
    used = tl.load(p_own + token) - first + 1
    column = tl.arange(0, WIDTH)
    p_row = p_bits + (line.to(tl.int64) * tokens + (token - begin)) * width
    p_list = p_out + (line.to(tl.int64) * Lq + token) * BEST
    bits = tl.load(p_row + column, mask=column < used, other=-1)
    high = tl.max(bits, 0) + 1
    low = high * 0
    count = tl.sum((bits >= 0).to(tl.int32), 0)
    if WIDTH > 2 * FEW:
        groups = tl.max(tl.max(tl.reshape(bits, (WIDTH // 128, 32, 4)), 2), 0)
        low, _ = _threshold(groups, low, high, BEST)
        count = tl.sum((bits >= low).to(tl.int32), 0)
    if (count <= FEW) & (WIDTH > 2 * FEW):
        chosen = bits >= low
        number = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(p_row + number, bits, mask=chosen)
        tl.store(p_row + FEW + number, column, mask=chosen)
        tl.debug_barrier()
        slot = tl.arange(0, FEW)
        x = tl.load(p_row + slot, mask=slot < count, other=-1)
        place = tl.load(p_row + FEW + slot, mask=slot < count, other=0)
        low, count = _threshold(x, low, high, BEST)
        _write(p_list, first + place, _marked(x, low, count, BEST), BEST, BEST_PAD)
    else:
        low, count = _threshold(bits, low, high, BEST)
        _write(p_list, first + column, _marked(bits, low, count, BEST), BEST, BEST_PAD)
