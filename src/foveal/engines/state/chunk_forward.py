"""Forward kernels of the state engine: what is inside a chunk, the walk over chunks, the output."""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.state.tiles import (
    decay_matrix,
    exp2_of,
    factor_since,
    factor_until,
    factor_whole,
    level_factor,
    level_pairs,
    load_gate,
    load_state,
    load_tile,
    rows_at,
    store_state,
    store_tile,
    sum_of_chunk,
    sums_of_channels,
    sums_of_tokens,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def state_sums_forward(p_decay, p_sums, p_chunks, width, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Running sums of log_decay [T, width] from the start of each chunk, times log2(e)."""
    c = tl.program_id(0)
    start = tl.load(p_chunks + 2 * c)
    stop = tl.load(p_chunks + 2 * c + 1)
    token = start + tl.arange(0, CHUNK)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    offset = tl.cast(token, tl.int64)[:, None] * width + column[None, :]
    mask = (token < stop)[:, None] & (column < width)[None, :]
    x = tl.load(p_decay + offset, mask=mask, other=0.0).to(p_sums.dtype.element_ty)
    tl.store(p_sums + offset, tl.cumsum(x, 0) * LOG2E, mask=mask)


@triton.jit
def state_pairs_forward(
    p_q, p_k, p_v, p_sums, p_gate, p_pairs, p_keys, p_inverse, p_w, p_u, p_since, p_until, p_chunks,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups, scale,
    DELTA: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr,
    K_TILES: tl.constexpr, V_TILES: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """P [T, Hv, C]; with DELTA also a [T, Hv, C] = A without its gate, M = (I + A)^-1 and
    w = M (b exp(G) k), u = M (b v), one program per chunk and value head.

    a and M are stored where they are wanted: for a backward.  With decay 3 also
    p_since = scale exp(G) q and p_until = exp(G_C - G) k [T, Hv, DK], which the walks read.
    """
    program = tl.program_id(0)
    c = program // heads
    h = program % heads
    start = tl.load(p_chunks + 2 * c)
    stop = tl.load(p_chunks + 2 * c + 1)
    row = tl.arange(0, CHUNK)
    token = start + row
    inside = token < stop
    last = stop - 1
    q_rows = rows_at(p_q, token, h // groups, q_stride_t, q_stride_h)
    k_rows = rows_at(p_k, token, h // groups, k_stride_t, k_stride_h)
    gate = load_gate(p_gate, token, inside, h, heads)
    dtype = p_k.dtype.element_ty
    diagonal = row[:, None] == row[None, :]
    inverse = tl.where(diagonal, 1.0, 0.0)
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    keys = tl.zeros([CHUNK, CHUNK], tl.float32)

    if DECAY < 3:
        for i in tl.static_range(K_TILES):
            q = load_tile(q_rows, inside, i * K_TILE, DK, K_TILE)
            k = load_tile(k_rows, inside, i * K_TILE, DK, K_TILE)
            pairs = tl.dot(q, tl.trans(k), pairs, input_precision=PRECISION)
            if DELTA:
                keys = tl.dot(k, tl.trans(k), keys, input_precision=PRECISION)
        lower = row[:, None] >= row[None, :]
        if DECAY == 0:
            pairs = tl.where(lower, pairs, 0.0)
            keys = tl.where(lower & (row[:, None] > row[None, :]), keys, 0.0)
        else:
            sums = sums_of_tokens(p_sums, token, row, inside, h, heads, DECAY)
            between = decay_matrix(sums, row)
            pairs = pairs * between
            keys = tl.where(diagonal, 0.0, keys * between)
    else:
        for i in tl.static_range(K_TILES):
            q = load_tile(q_rows, inside, i * K_TILE, DK, K_TILE)
            k = load_tile(k_rows, inside, i * K_TILE, DK, K_TILE)
            sums = sums_of_channels(p_sums, token, inside, h, heads, i * K_TILE, DK, K_TILE)
            since = exp2_of(sums) * scale
            whole = sum_of_chunk(
                p_sums, last, stop - start, h, heads, i * K_TILE, DECAY, DK, K_TILE
            )
            until = exp2_of(tl.where(inside[:, None], whole[None, :] - sums, 0.0))
            since_rows = rows_at(p_since, token, h, heads * DK, DK)
            until_rows = rows_at(p_until, token, h, heads * DK, DK)
            store_tile(since_rows, q * since, inside, i * K_TILE, DK, K_TILE)
            store_tile(until_rows, k * until, inside, i * K_TILE, DK, K_TILE)
            own = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
            pairs += tl.where(diagonal, own[:, None], 0.0)
            for level in range(LEVELS):
                factor = level_factor(
                    p_sums, sums, start, row, inside, last, h, heads, i * K_TILE, level, DK, K_TILE
                )
                met = level_pairs(row, level)
                k_met = (k * factor).to(dtype)
                q_met = (q * factor).to(dtype)
                found = tl.dot(q_met, tl.trans(k_met), input_precision=PRECISION)
                pairs += tl.where(met, found, 0.0)
                if DELTA:
                    found = tl.dot(k_met, tl.trans(k_met), input_precision=PRECISION)
                    keys += tl.where(met, found, 0.0)

    wide = heads * CHUNK
    pair_rows = rows_at(p_pairs, token, h, wide, CHUNK)
    store_tile(pair_rows, pairs * scale, inside, 0, CHUNK, CHUNK)
    if DELTA:
        gated = keys * gate[:, None]
        inverse -= tl.where(level_pairs(row, 0), gated, 0.0)
        for level in range(1, LEVELS):
            here = tl.where(level_pairs(row, level), gated, 0.0)
            half = tl.dot(inverse, here, input_precision=INVERSE)
            inverse -= tl.dot(half, inverse, input_precision=INVERSE)
        if p_inverse is not None:
            store_tile(rows_at(p_inverse, token, h, wide, CHUNK), inverse, inside, 0, CHUNK, CHUNK)
            store_tile(rows_at(p_keys, token, h, wide, CHUNK), keys, inside, 0, CHUNK, CHUNK)
        solve = inverse.to(dtype)
        for i in tl.static_range(K_TILES):
            k = load_tile(k_rows, inside, i * K_TILE, DK, K_TILE)
            since = factor_since(
                p_sums, token, row, inside, h, heads, i * K_TILE, DECAY, DK, K_TILE
            )
            x = (k * (gate[:, None] * since)).to(dtype)
            w = tl.dot(solve, x, input_precision=PRECISION)
            store_tile(rows_at(p_w, token, h, heads * DK, DK), w, inside, i * K_TILE, DK, K_TILE)
        v_rows = rows_at(p_v, token, h, v_stride_t, v_stride_h)
        for i in tl.static_range(V_TILES):
            x = (load_tile(v_rows, inside, i * V_TILE, DV, V_TILE) * gate[:, None]).to(dtype)
            u = tl.dot(solve, x, input_precision=PRECISION)
            store_tile(rows_at(p_u, token, h, heads * DV, DV), u, inside, i * V_TILE, DV, V_TILE)


@triton.jit
def state_walk_forward(
    p_q, p_k, p_v, p_sums, p_gate, p_pairs, p_w, p_u, p_initial, p_states, p_o, p_final, p_total,
    p_walks,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups, scale,
    DELTA: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, V_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S over the chunks of one walk, for one value head and one tile of value channels.

    Stores, where wanted: the state before each chunk, o (of an additive rule), the final state and
    the sum of the decays of the walk; of the delta rule also Z, in place of u.  With decay 3, q and k
    come with their decays, as `state_pairs_forward` stores them.
    """
    v_tiles = tl.cdiv(DV, V_TILE)
    program = tl.program_id(0)
    first = program % v_tiles * V_TILE
    h = program // v_tiles % heads
    walk = program // v_tiles // heads
    begin = tl.load(p_walks + 4 * walk)
    end = tl.load(p_walks + 4 * walk + 1)
    first_token = tl.load(p_walks + 4 * walk + 2)
    past_token = tl.load(p_walks + 4 * walk + 3)
    row = tl.arange(0, CHUNK)
    dtype = p_k.dtype.element_ty
    place = (tl.cast(walk, tl.int64) * heads + h) * (DK * DV)
    if p_initial is not None:
        s = load_state(p_initial + place, first, DK, DV, ROWS, V_TILE).to(tl.float32)
    else:
        s = tl.zeros([ROWS, V_TILE], tl.float32)
    column = tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)

    for c in range(begin, end):
        start = first_token + (c - begin) * CHUNK
        stop = tl.minimum(start + CHUNK, past_token)
        token = start + row
        inside = token < stop
        last = stop - 1
        if p_states is not None:
            p_state = p_states + (tl.cast(c, tl.int64) * heads + h) * (DK * DV)
            store_state(p_state, s, first, DK, DV, ROWS, V_TILE)
        k_rows = rows_at(p_k, token, h // groups, k_stride_t, k_stride_h)
        k = load_tile(k_rows, inside, 0, DK, ROWS)
        if DELTA:
            w = load_tile(rows_at(p_w, token, h, heads * DK, DK), inside, 0, DK, ROWS)
            u_rows = rows_at(p_u, token, h, heads * DV, DV)
            u = load_tile(u_rows, inside, first, DV, V_TILE).to(tl.float32)
            z = (u - tl.dot(w, s.to(dtype), input_precision=PRECISION)).to(dtype)
            store_tile(u_rows, z, inside, first, DV, V_TILE)
        else:
            v_rows = rows_at(p_v, token, h, v_stride_t, v_stride_h)
            z = load_tile(v_rows, inside, first, DV, V_TILE)
            if p_gate is not None:
                z = (z * load_gate(p_gate, token, inside, h, heads)[:, None]).to(dtype)
        if p_o is not None:
            q_rows = rows_at(p_q, token, h // groups, q_stride_t, q_stride_h)
            q = load_tile(q_rows, inside, 0, DK, ROWS)
            if p_pairs is not None:
                pairs = load_tile(
                    rows_at(p_pairs, token, h, heads * CHUNK, CHUNK), inside, 0, CHUNK, CHUNK
                )
            else:
                found = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                if DECAY == 0:
                    found = tl.where(row[:, None] >= row[None, :], found, 0.0)
                else:
                    sums = sums_of_tokens(p_sums, token, row, inside, h, heads, DECAY)
                    found = found * decay_matrix(sums, row)
                pairs = found.to(dtype)
            if DECAY == 3:
                o = tl.dot(q, s.to(dtype), input_precision=PRECISION)
            else:
                since = factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS)
                o = tl.dot(q, s.to(dtype), input_precision=PRECISION) * (since * scale)
            o = tl.dot(pairs, z, o, input_precision=PRECISION)
            store_tile(rows_at(p_o, token, h, heads * DV, DV), o, inside, first, DV, V_TILE)
        if (DECAY == 1) | (DECAY == 2):
            until = factor_until(p_sums, token, row, inside, last, h, heads, 0, DECAY, DK, ROWS)
            z = (z * until).to(dtype)
        s = s * factor_whole(p_sums, last, stop - start, h, heads, DECAY, DK, ROWS)
        s = tl.dot(tl.trans(k), z, s, input_precision=PRECISION)
        if p_total is not None:
            whole = sum_of_chunk(p_sums, last, stop - start, h, heads, 0, DECAY, DK, ROWS)
            total += whole.to(tl.float32)

    if p_final is not None:
        store_state(p_final + place, s, first, DK, DV, ROWS, V_TILE)
    if p_total is not None:
        p = p_total + (tl.cast(walk, tl.int64) * heads + h) * DK + column
        tl.store(p, total, mask=column < DK)


@triton.jit
def state_join_forward(
    p_added, p_total, p_initial, p_before, p_pieces, heads,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, V_TILE: tl.constexpr,
):  # fmt: skip
    """The state before each walk of a sequence, from what every walk adds and how it decays."""
    v_tiles = tl.cdiv(DV, V_TILE)
    program = tl.program_id(0)
    first = program % v_tiles * V_TILE
    h = program // v_tiles % heads
    n = program // v_tiles // heads
    row = tl.arange(0, ROWS)
    if p_initial is not None:
        p_start = p_initial + (tl.cast(n, tl.int64) * heads + h) * (DK * DV)
        s = load_state(p_start, first, DK, DV, ROWS, V_TILE).to(tl.float32)
    else:
        s = tl.zeros([ROWS, V_TILE], tl.float32)
    for walk in range(tl.load(p_pieces + n), tl.load(p_pieces + n + 1)):
        place = tl.cast(walk, tl.int64) * heads + h
        store_state(p_before + place * (DK * DV), s, first, DK, DV, ROWS, V_TILE)
        total = tl.load(p_total + place * DK + row, mask=row < DK, other=0.0)
        added = load_state(p_added + place * (DK * DV), first, DK, DV, ROWS, V_TILE)
        s = s * tl.exp2(total)[:, None] + added


@triton.jit
def state_output_forward(
    p_q, p_sums, p_pairs, p_z, p_states, p_o, p_chunks, q_stride_t, q_stride_h, heads, groups,
    scale,
    DECAY: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    ROWS: tl.constexpr, V_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = scale (exp(G) q) S + P Z of one chunk, value head and tile of value channels.

    With decay 3, q comes with its decay and scale.
    """
    v_tiles = tl.cdiv(DV, V_TILE)
    program = tl.program_id(0)
    first = program % v_tiles * V_TILE
    h = program // v_tiles % heads
    c = program // v_tiles // heads
    start = tl.load(p_chunks + 2 * c)
    stop = tl.load(p_chunks + 2 * c + 1)
    row = tl.arange(0, CHUNK)
    token = start + row
    inside = token < stop
    q_rows = rows_at(p_q, token, h // groups, q_stride_t, q_stride_h)
    q = load_tile(q_rows, inside, 0, DK, ROWS)
    p_state = p_states + (tl.cast(c, tl.int64) * heads + h) * (DK * DV)
    s = load_state(p_state, first, DK, DV, ROWS, V_TILE)
    if DECAY == 3:
        o = tl.dot(q, s, input_precision=PRECISION)
    else:
        since = factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS)
        o = tl.dot(q, s, input_precision=PRECISION) * (since * scale)
    z = load_tile(rows_at(p_z, token, h, heads * DV, DV), inside, first, DV, V_TILE)
    pair_rows = rows_at(p_pairs, token, h, heads * CHUNK, CHUNK)
    o = tl.dot(load_tile(pair_rows, inside, 0, CHUNK, CHUNK), z, o, input_precision=PRECISION)
    store_tile(rows_at(p_o, token, h, heads * DV, DV), o, inside, first, DV, V_TILE)
