# mypy: ignore-errors
"""Scores of compressed keys, summed to blocks, and the best of them, in one pass."""

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
def token_select(
    p_q, p_k, p_lse, p_out, p_first, p_own, p_seen, q_strides, k_strides, heads, groups, Lq, tiles,
    scale, sinks, locals_, BEST: tl.constexpr,
    TOKENS: tl.constexpr, G_PAD: tl.constexpr, WINDOWS: tl.constexpr, BLOCKS: tl.constexpr,
    STEP: tl.constexpr, REACH: tl.constexpr, PAD: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Ascending lists of the BEST blocks per token and key head, int32 [B, heads, Lq, BEST].

    q [B, Lq, Hq, D]; compressed keys [B, W, heads, D]; lse float32 [B, Hq, Lq] of their softmax.  Token t
    chooses among the blocks from p_first[t] to p_own[t] and sees the windows STEP p_first[t] <= w <
    p_seen[t].  Window w counts c times to block j, c the number of pairs (m, n), m < STEP, n <= REACH,
    with STEP j - REACH + m + n = w.  EXACT: float32, as Triton's interpreter computes it.
    """
    ROWS: tl.constexpr = TOKENS * G_PAD
    program = tl.program_id(0)
    line = program // tiles
    tile = tiles - 1 - program % tiles
    n = (line // heads).to(tl.int64)
    h = line % heads
    row = tl.arange(0, ROWS)
    token = tile * TOKENS + row // G_PAD
    g = row % G_PAD
    inside = (token < Lq) & (g < groups)
    token = tl.where(token < Lq, token, 0)
    head = h * groups + g
    p_rows = p_q + n * q_strides[0] + token.to(tl.int64) * q_strides[1] + head * q_strides[2]
    q = load_rows(p_rows, inside, D, D_PAD, True)
    lse = tl.load(p_lse + (n * heads * groups + head) * Lq + token, mask=inside, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    seen = tl.load(p_seen + token)
    first_window = tl.load(p_first + token) * STEP
    last_window = tl.max(seen, 0)

    own_token = tile * TOKENS + tl.arange(0, TOKENS)
    own_inside = own_token < Lq
    first_block = tl.load(p_first + own_token, mask=own_inside, other=2147483647)
    own = tl.load(p_own + own_token, mask=own_inside, other=-1)

    x = tl.arange(0, WINDOWS)
    j = tl.arange(0, PAD)
    ahead = x[:, None] - STEP * j[None, :]
    count = tl.minimum(tl.minimum(ahead + 1, STEP + REACH - ahead), tl.minimum(STEP, REACH + 1))
    count = tl.where((j < BLOCKS)[None, :], tl.maximum(count, 0), 0)
    bins = count.to(tl.float32) if EXACT else count.to(tl.bfloat16)

    lowest = tl.min(first_block, 0)
    highest = tl.max(own, 0)
    best = tl.full([TOKENS, PAD], -1, tl.int64)
    p_k = p_k + n * k_strides[0] + h * k_strides[2]
    for b in tl.range(lowest, highest + 1, BLOCKS, num_stages=STAGES):
        window = b * STEP - REACH + x
        there = (window >= 0) & (window < last_window)
        k = load_rows(p_k + window.to(tl.int64) * k_strides[1], there, D, D_PAD, True)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        visible = (window[None, :] >= first_window[:, None]) & (window[None, :] < seen[:, None])
        p = tl.where(visible, tl.exp2(s - lse[:, None]), 0.0)
        score = tl.sum(tl.reshape(_binned(p, bins, EXACT), (TOKENS, G_PAD, PAD)), 1)
        block = b + j
        since = block[None, :] - first_block[:, None]
        forced = (since < sinks) | (block[None, :] > own[:, None] - locals_)
        score = tl.where(forced, float("inf"), tl.maximum(score, 0.0))
        order = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (2147483647 - block)[
            None, :
        ]
        allowed = (since >= 0) & (block[None, :] <= own[:, None]) & (j < BLOCKS)[None, :]
        order = tl.where(allowed, order, -1)
        if tl.max(tl.max(order, 1) - tl.min(best, 1), 0) > 0:
            best = tl.sort(tl.maximum(best, tl.sort(order, 1)), 1, descending=True)

    chosen = (best >= 0) & (j < BEST)[None, :]
    block = tl.where(chosen, 2147483647 - (best & 4294967295).to(tl.int32), 2147483647)
    block = tl.sort(block, 1)
    place = (line.to(tl.int64) * Lq + own_token)[:, None] * BEST + j[None, :]
    block = tl.where(block == 2147483647, -1, block)
    tl.store(p_out + place, block, mask=own_inside[:, None] & (j < BEST)[None, :])
