"""Backward kernels of the state engine.

With dS the gradient of the state after a chunk: dZ = P^T dO + (exp(G_C - G) K) dS, Y = M^T dZ,
dV = b Y, and the gradient of the state before it is scale (exp(G) Q)^T dO + Diag(exp(G_C)) dS - w^T dZ.
With a the matrix A without its gate: dP = dO Z^T, da = -dV Z^T, db = rowsum(Y (V - exp(G) K S - a Z)).
An additive rule has Y = dZ and no a.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.state.tiles import (
    base_level,
    decay_matrix,
    exp2_of,
    factor_since,
    factor_until,
    factor_whole,
    level_factors,
    level_pairs,
    load_gate,
    load_rows,
    load_state,
    store_rows,
    store_state,
    sums_of_channels,
    sums_of_tokens,
)


@triton.jit(do_not_specialize=["heads"])
def state_walk_backward(
    p_q, p_k, p_sums, p_pairs, p_w, p_do, p_dfinal, p_dstates, p_dz, p_dinitial, p_pieces,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, heads, groups, scale,
    DELTA: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, V_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each chunk, and dZ, from the last chunk of a piece to its first.

    With decay 3, q and k come with their decays, as `state_pairs_forward` stores them.
    """
    v_tiles = tl.cdiv(DV, V_TILE)
    program = tl.program_id(0)
    first = program % v_tiles * V_TILE
    h = program // v_tiles % heads
    piece = program // v_tiles // heads
    begin = tl.load(p_pieces + 7 * piece)
    end = tl.load(p_pieces + 7 * piece + 1)
    first_token = tl.load(p_pieces + 7 * piece + 2)
    past_token = tl.load(p_pieces + 7 * piece + 3)
    row = tl.arange(0, CHUNK)
    dtype = p_k.dtype.element_ty
    place = (tl.cast(piece, tl.int64) * heads + h) * (DK * DV)
    if p_dfinal is not None:
        ds = load_state(p_dfinal + place, first, DK, DV, ROWS, V_TILE).to(tl.float32)
    else:
        ds = tl.zeros([ROWS, V_TILE], tl.float32)

    for i in range(0, end - begin):
        c = end - 1 - i
        start = first_token + (c - begin) * CHUNK
        stop = tl.minimum(start + CHUNK, past_token)
        token = start + row
        inside = token < stop
        last = stop - 1
        if p_dstates is not None:
            p_dstate = p_dstates + (tl.cast(c, tl.int64) * heads + h) * (DK * DV)
            store_state(p_dstate, ds, first, DK, DV, ROWS, V_TILE)
        q = load_rows(p_q, start, stop, h // groups, q_stride_t, q_stride_h, 0, CHUNK, DK, ROWS)
        k = load_rows(p_k, start, stop, h // groups, k_stride_t, k_stride_h, 0, CHUNK, DK, ROWS)
        do = load_rows(p_do, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
        pairs = load_rows(p_pairs, start, stop, h, heads * CHUNK, CHUNK, 0, CHUNK, CHUNK, CHUNK)
        if DECAY == 3:
            dz = tl.dot(k, ds.to(dtype), input_precision=PRECISION)
            faded = do
        else:
            since = factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS)
            until = factor_until(p_sums, token, row, inside, last, h, heads, 0, DECAY, DK, ROWS)
            dz = tl.dot(k, ds.to(dtype), input_precision=PRECISION) * until
            faded = (do * (since * scale)).to(dtype)
        dz = tl.dot(tl.trans(pairs), do, dz, input_precision=PRECISION)
        if p_dz is not None:
            store_rows(p_dz, dz, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
        ds = ds * factor_whole(p_sums, last, stop - start, h, heads, DECAY, DK, ROWS)
        ds = tl.dot(tl.trans(q), faded, ds, input_precision=PRECISION)
        if DELTA:
            w = load_rows(p_w, start, stop, h, heads * DK, DK, 0, CHUNK, DK, ROWS)
            ds -= tl.dot(tl.trans(w), dz.to(dtype), input_precision=PRECISION)
    if p_dinitial is not None:
        store_state(p_dinitial + place, ds, first, DK, DV, ROWS, V_TILE)


@triton.jit(do_not_specialize=["heads"])
def state_values_backward(
    p_k, p_v, p_sums, p_gate, p_keys, p_inverse, p_z, p_dz, p_do, p_states,
    p_dv, p_dgate, p_dpairs, p_dkeys, p_chunks,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups, scale,
    DELTA: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, V_TILE: tl.constexpr, V_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dV, db, scale dP and da of one chunk and value head."""
    program = tl.program_id(0)
    c = program // heads
    h = program % heads
    start = tl.load(p_chunks + 2 * c)
    stop = tl.load(p_chunks + 2 * c + 1)
    row = tl.arange(0, CHUNK)
    token = start + row
    inside = token < stop
    dtype = p_k.dtype.element_ty
    gate = load_gate(p_gate, token, inside, h, heads)
    own_v = heads * DV
    own_c = heads * CHUNK
    dpairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    dkeys = tl.zeros([CHUNK, CHUNK], tl.float32)
    dgate = tl.zeros([CHUNK], tl.float32)
    if DELTA:
        k = load_rows(p_k, start, stop, h // groups, k_stride_t, k_stride_h, 0, CHUNK, DK, ROWS)
        since = factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS)
        if DECAY == 3:
            k = (k * since).to(dtype)
        keys = load_rows(p_keys, start, stop, h, own_c, CHUNK, 0, CHUNK, CHUNK, CHUNK)
        solve = load_rows(p_inverse, start, stop, h, own_c, CHUNK, 0, CHUNK, CHUNK, CHUNK)
    for i in tl.static_range(V_TILES):
        first = i * V_TILE
        v = load_rows(p_v, start, stop, h, v_stride_t, v_stride_h, first, CHUNK, DV, V_TILE)
        do = load_rows(p_do, start, stop, h, own_v, DV, first, CHUNK, DV, V_TILE)
        dz = load_rows(p_dz, start, stop, h, own_v, DV, first, CHUNK, DV, V_TILE)
        if DELTA:
            z = load_rows(p_z, start, stop, h, own_v, DV, first, CHUNK, DV, V_TILE)
            s = load_state(
                p_states + (tl.cast(c, tl.int64) * heads + h) * (DK * DV),
                first, DK, DV, ROWS, V_TILE,
            )  # fmt: skip
            y = tl.dot(tl.trans(solve), dz, input_precision=PRECISION)
            seen = tl.dot(k, s, input_precision=PRECISION)
            if DECAY != 3:
                seen = seen * since
            seen = tl.dot(keys, z, seen, input_precision=PRECISION)
            dgate += tl.sum(y * (v.to(tl.float32) - seen), 1)
            dv = (y * gate[:, None]).to(dtype)
            dkeys -= tl.dot(dv, tl.trans(z), input_precision=PRECISION)
        else:
            z = (v * gate[:, None]).to(dtype)
            dgate += tl.sum(dz.to(tl.float32) * v.to(tl.float32), 1)
            dv = (dz * gate[:, None]).to(dtype)
        dpairs = tl.dot(do, tl.trans(z), dpairs, input_precision=PRECISION)
        store_rows(p_dv, dv, start, stop, h, own_v, DV, first, CHUNK, DV, V_TILE)
    lower = row[:, None] >= row[None, :]
    dpairs = tl.where(lower, dpairs * scale, 0.0)
    store_rows(p_dpairs, dpairs, start, stop, h, own_c, CHUNK, 0, CHUNK, CHUNK, CHUNK)
    if DELTA:
        dkeys = tl.where(row[:, None] > row[None, :], dkeys, 0.0)
        store_rows(p_dkeys, dkeys, start, stop, h, own_c, CHUNK, 0, CHUNK, CHUNK, CHUNK)
    if p_dgate is not None:
        p = p_dgate + tl.cast(token, tl.int64) * heads + h
        tl.store(p, dgate, mask=inside)


@triton.jit(do_not_specialize=["heads", "tokens"])
def state_keys_backward(
    p_q, p_k, p_v, p_sums, p_gate, p_z, p_dv, p_do, p_states, p_dstates, p_dpairs, p_dkeys,
    p_dq, p_dk, p_ddecay, p_chunks,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, tokens, heads, groups,
    scale,
    DELTA: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr,
    V_TILES: tl.constexpr, REACH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and the gradient of log_decay of one chunk, value head and tile of key channels.

    Decays 1 and 2 get a gradient per tile of key channels, [tiles, T, Hv], to be summed.
    """
    k_tiles = tl.cdiv(DK, K_TILE)
    program = tl.program_id(0)
    tile = program % k_tiles
    first_k = tile * K_TILE
    h = program // k_tiles % heads
    c = program // k_tiles // heads
    start = tl.load(p_chunks + 2 * c)
    stop = tl.load(p_chunks + 2 * c + 1)
    row = tl.arange(0, CHUNK)
    token = start + row
    inside = token < stop
    last = stop - 1
    dtype = p_k.dtype.element_ty
    gate = load_gate(p_gate, token, inside, h, heads)
    own_v = heads * DV
    own_c = heads * CHUNK
    place = (tl.cast(c, tl.int64) * heads + h) * (DK * DV)
    channel = first_k + tl.arange(0, K_TILE)
    dq = tl.zeros([CHUNK, K_TILE], tl.float32)
    read = tl.zeros([CHUNK, K_TILE], tl.float32)
    wrote = tl.zeros([CHUNK, K_TILE], tl.float32)
    kept = tl.zeros([K_TILE], tl.float32)
    for i in tl.static_range(V_TILES):
        first = i * V_TILE
        column = first + tl.arange(0, V_TILE)
        do = load_rows(p_do, start, stop, h, own_v, DV, first, CHUNK, DV, V_TILE)
        offset = channel[:, None] * DV + column[None, :]
        mask = (channel < DK)[:, None] & (column < DV)[None, :]
        s = tl.load(p_states + place + offset, mask=mask, other=0.0)
        ds = tl.load(p_dstates + place + offset, mask=mask, other=0.0)
        if DELTA:
            z = load_rows(p_z, start, stop, h, own_v, DV, first, CHUNK, DV, V_TILE)
            dv = load_rows(p_dv, start, stop, h, own_v, DV, first, CHUNK, DV, V_TILE)
            read -= tl.dot(dv, tl.trans(s), input_precision=PRECISION)
        else:
            z = load_rows(p_v, start, stop, h, v_stride_t, v_stride_h, first, CHUNK, DV, V_TILE)
            z = (z * gate[:, None]).to(dtype)
        dq = tl.dot(do, tl.trans(s), dq, input_precision=PRECISION)
        wrote = tl.dot(z, tl.trans(ds), wrote, input_precision=PRECISION)
        kept += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)

    q = load_rows(p_q, start, stop, h // groups, q_stride_t, q_stride_h, first_k, CHUNK, DK, K_TILE)
    k = load_rows(p_k, start, stop, h // groups, k_stride_t, k_stride_h, first_k, CHUNK, DK, K_TILE)
    since = factor_since(p_sums, token, row, inside, h, heads, first_k, DECAY, DK, K_TILE)
    until = factor_until(p_sums, token, row, inside, last, h, heads, first_k, DECAY, DK, K_TILE)
    dq = dq * (since * scale)
    read = read * since
    wrote = wrote * until
    if DECAY == 3:
        p_last = p_sums + (tl.cast(last, tl.int64) * heads + h) * DK + channel
        kept = kept * exp2_of(tl.load(p_last, mask=channel < DK, other=0.0))
    else:
        kept = kept * factor_whole(p_sums, last, stop - start, h, heads, DECAY, DK, K_TILE)
    kept += tl.sum(k.to(tl.float32) * wrote, 0)

    dpairs = load_rows(p_dpairs, start, stop, h, own_c, CHUNK, 0, CHUNK, CHUNK, CHUNK)
    if DELTA:
        dkeys = load_rows(p_dkeys, start, stop, h, own_c, CHUNK, 0, CHUNK, CHUNK, CHUNK)
    if DECAY < 3:
        if DECAY > 0:
            between = decay_matrix(sums_of_tokens(p_sums, token, row, inside, h, heads, DECAY), row)
            dpairs = (dpairs * between).to(dtype)
        dq = tl.dot(dpairs, k, dq, input_precision=PRECISION)
        wrote = tl.dot(tl.trans(dpairs), q, wrote, input_precision=PRECISION)
        if DELTA:
            if DECAY > 0:
                dkeys = (dkeys * between).to(dtype)
            read = tl.dot(dkeys, k, read, input_precision=PRECISION)
            wrote = tl.dot(tl.trans(dkeys), k, wrote, input_precision=PRECISION)
    else:
        sums = sums_of_channels(p_sums, token, inside, h, heads, first_k, DK, K_TILE)
        own = tl.sum(tl.where(row[:, None] == row[None, :], dpairs, 0.0).to(tl.float32), 1)[:, None]
        dq += own * k
        wrote += own * q
        base = base_level(p_sums, start, last, h, heads, first_k, LEVELS, REACH, DK, K_TILE)
        for level in range(tl.maximum(base - 1, 0), LEVELS):
            later, earlier = level_factors(
                p_sums, sums, start, row, inside, last, h, heads, first_k, level, base, DK, K_TILE
            )
            met = level_pairs(row, level, base)
            k_earlier = (k * earlier).to(dtype)
            here = tl.where(met, dpairs, 0.0).to(dtype)
            dq += tl.dot(here, k_earlier, input_precision=PRECISION) * later
            back = tl.dot(tl.trans(here), (q * later).to(dtype), input_precision=PRECISION)
            if DELTA:
                here = tl.where(met, dkeys, 0.0).to(dtype)
                read += tl.dot(here, k_earlier, input_precision=PRECISION) * later
                k_later = (k * later).to(dtype)
                back = tl.dot(tl.trans(here), k_later, back, input_precision=PRECISION)
            wrote += back * earlier

    own_k = heads * DK
    store_rows(p_dq, dq, start, stop, h, own_k, DK, first_k, CHUNK, DK, K_TILE)
    store_rows(p_dk, read + wrote, start, stop, h, own_k, DK, first_k, CHUNK, DK, K_TILE)
    if p_ddecay is not None:
        dsum = q * dq + k * (read - wrote)
        dsum += tl.where((token == last)[:, None], kept[None, :], 0.0)
        if DECAY == 3:
            dsum = tl.cumsum(dsum, 0, reverse=True)
            store_rows(p_ddecay, dsum, start, stop, h, own_k, DK, first_k, CHUNK, DK, K_TILE)
        else:
            dsums = tl.cumsum(tl.sum(dsum, 1), 0, reverse=True)
            offset = (tl.cast(tile, tl.int64) * tokens + token) * heads + h
            tl.store(p_ddecay + offset, dsums, mask=inside)
