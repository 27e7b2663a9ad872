"""Kernels of additive rules: every sequence is cut in pieces that all start at once.

A program finds what its piece adds to the state, waits for the state before it, passes the state
behind it on, and only then walks its chunks; their second reading comes from the cache.  Programs
take their piece in the order in which they start, so that whom they wait for runs already.

With a gate b and P_ij = scale exp(G_i - G_j) q_i k_j at i >= j:  o = scale exp(G) q S + P (b v),
S' = exp(G_C) S + (exp(G_C - G) k)^T (b v).  A normaliser n is the state of one more value column, of
ones, held in 16 equal columns for the matrix units; its output is the weight w.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.state.tiles import (
    decay_of_pairs,
    factor_since,
    factor_until,
    factor_whole,
    load_column,
    load_gate,
    load_part,
    load_rows,
    store_column,
    store_part,
    store_rows,
    wait_for,
)


@triton.jit(do_not_specialize=["heads"])
def state_additive_forward(
    p_q, p_k, p_v, p_sums, p_gate, p_pairs, p_floor, p_initial, p_after, p_o, p_weight, p_final,
    p_ready, p_pieces,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups, scale,
    floor,
    DECAY: tl.constexpr, ONES: tl.constexpr, SIGNED: tl.constexpr, CHUNK: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    V_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o, the state after every piece and the final state, of one piece, value head and value tile.

    States have WIDE columns, with ONES the last is n; o is then divided by max(|w|, floor), or by
    max(w, floor) where SIGNED; `p_floor` [T, Hv] where it is one per token.  With decay 3, q and k
    come with their decays and P from `state_pairs_forward`.
    """
    v_tiles = tl.cdiv(DV, V_TILE)
    ticket = tl.atomic_add(p_ready, 1)
    tile = ticket % v_tiles
    first = tile * V_TILE
    h = ticket // v_tiles % heads
    piece = ticket // v_tiles // heads
    begin = tl.load(p_pieces + 7 * piece)
    end = tl.load(p_pieces + 7 * piece + 1)
    first_token = tl.load(p_pieces + 7 * piece + 2)
    past_token = tl.load(p_pieces + 7 * piece + 3)
    sequence = tl.load(p_pieces + 7 * piece + 4)
    before = tl.load(p_pieces + 7 * piece + 5)
    behind = tl.load(p_pieces + 7 * piece + 6)
    row = tl.arange(0, CHUNK)
    dtype = p_k.dtype.element_ty
    s = tl.zeros([ROWS, V_TILE], tl.float32)
    n = tl.zeros([ROWS, 16], tl.float32)
    total = tl.full([ROWS, 1], 1.0, tl.float32)
    for c in range(begin, tl.where(behind >= 0, end, begin)):
        start = first_token + (c - begin) * CHUNK
        stop = tl.minimum(start + CHUNK, past_token)
        token = start + row
        inside = token < stop
        last = stop - 1
        k = load_rows(p_k, start, stop, h // groups, k_stride_t, k_stride_h, 0, CHUNK, DK, ROWS)
        z = load_rows(p_v, start, stop, h, v_stride_t, v_stride_h, first, CHUNK, DV, V_TILE)
        gate = load_gate(p_gate, token, inside, h, heads)[:, None]
        if DECAY < 3:
            gate *= factor_until(p_sums, token, row, inside, last, h, heads, 0, DECAY, DK, ROWS)
        z = (z * gate).to(dtype)
        whole = factor_whole(p_sums, last, stop - start, h, heads, DECAY, DK, ROWS)
        total *= whole
        s = tl.dot(tl.trans(k), z, s * whole, input_precision=PRECISION)
        if ONES:
            ones = (gate + tl.zeros([CHUNK, 16], tl.float32)).to(dtype)
            n = tl.dot(tl.trans(k), ones, n * whole, input_precision=PRECISION)

    state = DK * WIDE
    here = (tl.cast(piece, tl.int64) * heads + h) * state
    s_before = tl.zeros([ROWS, V_TILE], tl.float32)
    n_before = tl.zeros([ROWS, 16], tl.float32)
    if before >= 0:
        wait_for(p_ready + 1 + (before * heads + h) * v_tiles + tile)
        p_before = p_after + (tl.cast(before, tl.int64) * heads + h) * state
        s_before = load_part(p_before, first, DK, DV, WIDE, ROWS, V_TILE)
        if ONES:
            n_before += load_column(p_before + DV, DK, WIDE, ROWS)
    elif p_initial is not None:
        p_before = p_initial + (tl.cast(sequence, tl.int64) * heads + h) * state
        s_before = load_part(p_before, first, DK, DV, WIDE, ROWS, V_TILE)
        if ONES:
            n_before += load_column(p_before + DV, DK, WIDE, ROWS)
    if behind >= 0:
        store_part(p_after + here, s + s_before * total, first, DK, DV, WIDE, ROWS, V_TILE)
        if ONES:
            store_column(p_after + here + DV, n + n_before * total, DK, WIDE, ROWS)
        tl.debug_barrier()
        tl.atomic_xchg(p_ready + 1 + (piece * heads + h) * v_tiles + tile, 1, sem="release")

    s = s_before
    n = n_before
    for c in range(begin, end):
        start = first_token + (c - begin) * CHUNK
        stop = tl.minimum(start + CHUNK, past_token)
        token = start + row
        inside = token < stop
        last = stop - 1
        q = load_rows(p_q, start, stop, h // groups, q_stride_t, q_stride_h, 0, CHUNK, DK, ROWS)
        k = load_rows(p_k, start, stop, h // groups, k_stride_t, k_stride_h, 0, CHUNK, DK, ROWS)
        z = load_rows(p_v, start, stop, h, v_stride_t, v_stride_h, first, CHUNK, DV, V_TILE)
        gate = load_gate(p_gate, token, inside, h, heads)
        if DECAY == 3:
            pairs = load_rows(p_pairs, start, stop, h, heads * CHUNK, CHUNK, 0, CHUNK, CHUNK, CHUNK)
            since = 1.0
        else:
            pairs = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            pairs *= decay_of_pairs(p_sums, token, row, inside, h, heads, DECAY)
            since = factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS) * scale
        o = tl.dot(q, s.to(dtype), input_precision=PRECISION) * since
        if p_gate is not None:
            z = (z * gate[:, None]).to(dtype)
        o = tl.dot(pairs.to(dtype), z, o, input_precision=PRECISION)
        if ONES:
            weight = tl.dot(q, n.to(dtype), input_precision=PRECISION) * since
            weight = tl.sum(weight, 1) / 16 + tl.sum(pairs * gate[None, :], 1)
            if tile == 0:
                p = p_weight + tl.cast(token, tl.int64) * heads + h
                tl.store(p, weight, mask=inside)
            least = floor
            if p_floor is not None:
                p = p_floor + tl.cast(token, tl.int64) * heads + h
                least = tl.load(p, mask=inside, other=1.0)
            o = o / tl.maximum(weight if SIGNED else tl.abs(weight), least)[:, None]
        store_rows(p_o, o, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
        gate = gate[:, None]
        if (DECAY == 1) | (DECAY == 2):
            until = factor_until(p_sums, token, row, inside, last, h, heads, 0, DECAY, DK, ROWS)
            z = (z * until).to(dtype)
            gate *= until
        whole = factor_whole(p_sums, last, stop - start, h, heads, DECAY, DK, ROWS)
        s = tl.dot(tl.trans(k), z, s * whole, input_precision=PRECISION)
        if ONES:
            ones = (gate + tl.zeros([CHUNK, 16], tl.float32)).to(dtype)
            n = tl.dot(tl.trans(k), ones, n * whole, input_precision=PRECISION)

    if behind < 0:
        p_last = p_final + (tl.cast(sequence, tl.int64) * heads + h) * state
        store_part(p_last, s, first, DK, DV, WIDE, ROWS, V_TILE)
        if ONES:
            store_column(p_last + DV, n, DK, WIDE, ROWS)


@triton.jit(do_not_specialize=["heads", "tokens"])
def state_weight_backward(
    p_o, p_do, p_weight, p_floor, p_scaled, p_dweight, o_stride_t, o_stride_h, do_stride_t,
    do_stride_h, tokens, heads, floor,
    SIGNED: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """do over the weight that o was divided by, and the gradient of that weight; TILE tokens of a head."""
    h = tl.program_id(0) % heads
    start = tl.program_id(0) // heads * TILE
    token = start + tl.arange(0, TILE)
    inside = token < tokens
    o = load_rows(p_o, start, tokens, h, o_stride_t, o_stride_h, 0, TILE, DV, WIDTH)
    do = load_rows(p_do, start, tokens, h, do_stride_t, do_stride_h, 0, TILE, DV, WIDTH)
    p = tl.cast(token, tl.int64) * heads + h
    weight = tl.load(p_weight + p, mask=inside, other=1.0)
    least = tl.full([TILE], 0.0, tl.float32) + floor
    if p_floor is not None:
        least = tl.load(p_floor + p, mask=inside, other=1.0)
    size = weight if SIGNED else tl.abs(weight)
    scaled = do.to(tl.float32) / tl.maximum(size, least)[:, None]
    sign = tl.where(weight < 0, -1.0, 1.0)
    dweight = -tl.sum(scaled * o.to(tl.float32), 1) * tl.where(size > least, sign, 0.0)
    tl.store(p_dweight + p, dweight, mask=inside)
    store_rows(p_scaled, scaled, start, tokens, h, heads * DV, DV, 0, TILE, DV, WIDTH)


@triton.jit(do_not_specialize=["heads", "tokens"])
def state_additive_queries_backward(
    p_q, p_k, p_v, p_sums, p_gate, p_do, p_dweight, p_initial, p_after, p_dq, p_terms, p_states,
    p_pieces,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, tokens, heads, groups,
    scale,
    DECAY: tl.constexpr, ONES: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, V_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [tiles, T, Hv, DK] of one piece, value head and value tile, from the states of the forward.

    Where the gradient of the decay is wanted, also q dq [tiles, T, Hv] and the state before each chunk.
    """
    v_tiles = tl.cdiv(DV, V_TILE)
    program = tl.program_id(0)
    tile = program % v_tiles
    first = tile * V_TILE
    h = program // v_tiles % heads
    piece = program // v_tiles // heads
    begin = tl.load(p_pieces + 7 * piece)
    end = tl.load(p_pieces + 7 * piece + 1)
    first_token = tl.load(p_pieces + 7 * piece + 2)
    past_token = tl.load(p_pieces + 7 * piece + 3)
    sequence = tl.load(p_pieces + 7 * piece + 4)
    before = tl.load(p_pieces + 7 * piece + 5)
    row = tl.arange(0, CHUNK)
    dtype = p_k.dtype.element_ty
    state = DK * WIDE
    s = tl.zeros([ROWS, V_TILE], tl.float32)
    n = tl.zeros([ROWS, 16], tl.float32)
    if before >= 0:
        p_before = p_after + (tl.cast(before, tl.int64) * heads + h) * state
        s = load_part(p_before, first, DK, DV, WIDE, ROWS, V_TILE)
        if ONES:
            n += load_column(p_before + DV, DK, WIDE, ROWS)
    elif p_initial is not None:
        p_before = p_initial + (tl.cast(sequence, tl.int64) * heads + h) * state
        s = load_part(p_before, first, DK, DV, WIDE, ROWS, V_TILE)
        if ONES:
            n += load_column(p_before + DV, DK, WIDE, ROWS)
    own = tl.cast(tile, tl.int64) * tokens
    alone = tl.where(tile == 0, 1.0, 0.0)
    for c in range(begin, end):
        start = first_token + (c - begin) * CHUNK
        stop = tl.minimum(start + CHUNK, past_token)
        token = start + row
        inside = token < stop
        last = stop - 1
        if p_states is not None:
            p_state = p_states + (tl.cast(c, tl.int64) * heads + h) * state
            store_part(p_state, s, first, DK, DV, WIDE, ROWS, V_TILE)
            if ONES:
                store_column(p_state + DV, n, DK, WIDE, ROWS)
        k = load_rows(p_k, start, stop, h // groups, k_stride_t, k_stride_h, 0, CHUNK, DK, ROWS)
        z = load_rows(p_v, start, stop, h, v_stride_t, v_stride_h, first, CHUNK, DV, V_TILE)
        do = load_rows(p_do, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
        gate = load_gate(p_gate, token, inside, h, heads)
        dpairs = tl.dot(do, tl.trans(z), input_precision=PRECISION)
        dq = tl.dot(do, tl.trans(s.to(dtype)), input_precision=PRECISION)
        if ONES:
            p = p_dweight + tl.cast(token, tl.int64) * heads + h
            dweight = tl.load(p, mask=inside, other=0.0) * alone
            dpairs += dweight[:, None]
            part = (dweight[:, None] / 16 + tl.zeros([CHUNK, 16], tl.float32)).to(dtype)
            dq = tl.dot(part, tl.trans(n.to(dtype)), dq, input_precision=PRECISION)
        since = factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS)
        dpairs *= gate[None, :] * decay_of_pairs(p_sums, token, row, inside, h, heads, DECAY)
        dq = tl.dot(dpairs.to(dtype), k, dq * since, input_precision=PRECISION) * scale
        store_rows(p_dq, dq, own + start, own + stop, h, heads * DK, DK, 0, CHUNK, DK, ROWS)
        if p_terms is not None:
            q = load_rows(p_q, start, stop, h // groups, q_stride_t, q_stride_h, 0, CHUNK, DK, ROWS)
            tl.store(p_terms + (own + token) * heads + h, tl.sum(q * dq, 1), mask=inside)
        until = factor_until(p_sums, token, row, inside, last, h, heads, 0, DECAY, DK, ROWS)
        gate = gate[:, None] * until
        z = (z * gate).to(dtype)
        whole = factor_whole(p_sums, last, stop - start, h, heads, DECAY, DK, ROWS)
        s = tl.dot(tl.trans(k), z, s * whole, input_precision=PRECISION)
        if ONES:
            ones = (gate + tl.zeros([CHUNK, 16], tl.float32)).to(dtype)
            n = tl.dot(tl.trans(k), ones, n * whole, input_precision=PRECISION)


@triton.jit(do_not_specialize=["heads", "pieces"])
def state_additive_walk_backward(
    p_q, p_sums, p_do, p_dweight, p_dfinal, p_dbefore, p_dstates, p_dinitial, p_ready, p_pieces,
    q_stride_t, q_stride_h, pieces, heads, groups, scale,
    DECAY: tl.constexpr, ONES: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, V_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state behind every chunk of one piece, from the last piece to the first.

    dS' = exp(G_C) dS + scale (exp(G) q)^T do; p_dbefore takes it before every piece.
    """
    v_tiles = tl.cdiv(DV, V_TILE)
    ticket = tl.atomic_add(p_ready, 1)
    tile = ticket % v_tiles
    first = tile * V_TILE
    h = ticket // v_tiles % heads
    piece = pieces - 1 - ticket // v_tiles // heads
    begin = tl.load(p_pieces + 7 * piece)
    end = tl.load(p_pieces + 7 * piece + 1)
    first_token = tl.load(p_pieces + 7 * piece + 2)
    past_token = tl.load(p_pieces + 7 * piece + 3)
    sequence = tl.load(p_pieces + 7 * piece + 4)
    before = tl.load(p_pieces + 7 * piece + 5)
    behind = tl.load(p_pieces + 7 * piece + 6)
    row = tl.arange(0, CHUNK)
    dtype = p_q.dtype.element_ty
    state = DK * WIDE
    ds = tl.zeros([ROWS, V_TILE], tl.float32)
    dn = tl.zeros([ROWS, 16], tl.float32)
    total = tl.full([ROWS, 1], 1.0, tl.float32)
    for i in range(0, tl.where(before >= 0, end - begin, 0)):
        start = first_token + (end - 1 - i - begin) * CHUNK
        stop = tl.minimum(start + CHUNK, past_token)
        token = start + row
        inside = token < stop
        q = load_rows(p_q, start, stop, h // groups, q_stride_t, q_stride_h, 0, CHUNK, DK, ROWS)
        do = load_rows(p_do, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
        since = factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS) * scale
        whole = factor_whole(p_sums, stop - 1, stop - start, h, heads, DECAY, DK, ROWS)
        total *= whole
        ds = tl.dot(tl.trans(q), (do * since).to(dtype), ds * whole, input_precision=PRECISION)
        if ONES:
            p = p_dweight + tl.cast(token, tl.int64) * heads + h
            part = tl.load(p, mask=inside, other=0.0)[:, None] * since
            part = (part + tl.zeros([CHUNK, 16], tl.float32)).to(dtype)
            dn = tl.dot(tl.trans(q), part, dn * whole, input_precision=PRECISION)

    ds_behind = tl.zeros([ROWS, V_TILE], tl.float32)
    dn_behind = tl.zeros([ROWS, 16], tl.float32)
    if behind >= 0:
        wait_for(p_ready + 1 + (behind * heads + h) * v_tiles + tile)
        p_behind = p_dbefore + (tl.cast(behind, tl.int64) * heads + h) * state
        ds_behind = load_part(p_behind, first, DK, DV, WIDE, ROWS, V_TILE)
        if ONES:
            dn_behind += load_column(p_behind + DV, DK, WIDE, ROWS)
    else:
        p_behind = p_dfinal + (tl.cast(sequence, tl.int64) * heads + h) * state
        ds_behind = load_part(p_behind, first, DK, DV, WIDE, ROWS, V_TILE)
        if ONES:
            dn_behind += load_column(p_behind + DV, DK, WIDE, ROWS)
    if before >= 0:
        here = p_dbefore + (tl.cast(piece, tl.int64) * heads + h) * state
        store_part(here, ds + ds_behind * total, first, DK, DV, WIDE, ROWS, V_TILE)
        if ONES:
            store_column(here + DV, dn + dn_behind * total, DK, WIDE, ROWS)
        tl.debug_barrier()
        tl.atomic_xchg(p_ready + 1 + (piece * heads + h) * v_tiles + tile, 1, sem="release")

    ds = ds_behind
    dn = dn_behind
    for i in range(0, end - begin):
        c = end - 1 - i
        start = first_token + (c - begin) * CHUNK
        stop = tl.minimum(start + CHUNK, past_token)
        token = start + row
        inside = token < stop
        p_dstate = p_dstates + (tl.cast(c, tl.int64) * heads + h) * state
        store_part(p_dstate, ds, first, DK, DV, WIDE, ROWS, V_TILE)
        if ONES:
            store_column(p_dstate + DV, dn, DK, WIDE, ROWS)
        q = load_rows(p_q, start, stop, h // groups, q_stride_t, q_stride_h, 0, CHUNK, DK, ROWS)
        do = load_rows(p_do, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
        since = factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS) * scale
        whole = factor_whole(p_sums, stop - 1, stop - start, h, heads, DECAY, DK, ROWS)
        ds = tl.dot(tl.trans(q), (do * since).to(dtype), ds * whole, input_precision=PRECISION)
        if ONES:
            p = p_dweight + tl.cast(token, tl.int64) * heads + h
            part = tl.load(p, mask=inside, other=0.0)[:, None] * since
            part = (part + tl.zeros([CHUNK, 16], tl.float32)).to(dtype)
            dn = tl.dot(tl.trans(q), part, dn * whole, input_precision=PRECISION)

    if p_dinitial is not None:  # noqa: SIM102
        if before < 0:
            p_first = p_dinitial + (tl.cast(sequence, tl.int64) * heads + h) * state
            store_part(p_first, ds, first, DK, DV, WIDE, ROWS, V_TILE)
            if ONES:
                store_column(p_first + DV, dn, DK, WIDE, ROWS)


@triton.jit(do_not_specialize=["heads", "tokens"])
def state_additive_keys_backward(
    p_q, p_k, p_v, p_sums, p_gate, p_do, p_dweight, p_terms, p_states, p_dstates, p_dk, p_dv,
    p_dgate, p_ddecay, p_chunks,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, tokens, heads, groups,
    scale,
    DECAY: tl.constexpr, ONES: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, V_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [tiles, T, Hv, DK], dv, db [tiles, T, Hv] and the gradient of the decay, of one chunk.

    With dS the gradient of the state behind it and dP_ij = scale exp(G_i - G_j) do_i (b v)_j:
    dz = P^T do + exp(G_C - G) k dS, dk = dP^T q + exp(G_C - G) (b v) dS^T.
    """
    v_tiles = tl.cdiv(DV, V_TILE)
    program = tl.program_id(0)
    tile = program % v_tiles
    first = tile * V_TILE
    h = program // v_tiles % heads
    c = program // v_tiles // heads
    start = tl.load(p_chunks + 2 * c)
    stop = tl.load(p_chunks + 2 * c + 1)
    row = tl.arange(0, CHUNK)
    token = start + row
    inside = token < stop
    last = stop - 1
    dtype = p_k.dtype.element_ty
    place = (tl.cast(c, tl.int64) * heads + h) * (DK * WIDE)
    own = tl.cast(tile, tl.int64) * tokens
    alone = tl.where(tile == 0, 1.0, 0.0)
    q = load_rows(p_q, start, stop, h // groups, q_stride_t, q_stride_h, 0, CHUNK, DK, ROWS)
    k = load_rows(p_k, start, stop, h // groups, k_stride_t, k_stride_h, 0, CHUNK, DK, ROWS)
    v = load_rows(p_v, start, stop, h, v_stride_t, v_stride_h, first, CHUNK, DV, V_TILE)
    do = load_rows(p_do, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
    ds = load_part(p_dstates + place, first, DK, DV, WIDE, ROWS, V_TILE)
    gate = load_gate(p_gate, token, inside, h, heads)
    between = tl.trans(decay_of_pairs(p_sums, token, row, inside, h, heads, DECAY)) * scale
    until = factor_until(p_sums, token, row, inside, last, h, heads, 0, DECAY, DK, ROWS)

    pairs = tl.dot(k, tl.trans(q), input_precision=PRECISION) * between
    dz = tl.dot(k, ds, input_precision=PRECISION) * until
    dz = tl.dot(pairs.to(dtype), do, dz, input_precision=PRECISION)
    dgate = tl.sum(dz * v, 1)
    if ONES:
        p = p_dweight + tl.cast(token, tl.int64) * heads + h
        dweight = tl.load(p, mask=inside, other=0.0) * alone
        dn = load_column(p_dstates + place + DV, DK, WIDE, ROWS) + tl.zeros([ROWS, 16], tl.float32)
        dn = dn.to(dtype)
        found = tl.sum(tl.dot(k, dn, input_precision=PRECISION) * until, 1) / 16 * alone
        dgate += found + tl.sum(pairs * dweight[None, :], 1)
    store_rows(p_dv, dz * gate[:, None], start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
    if p_dgate is not None:
        tl.store(p_dgate + (own + token) * heads + h, dgate, mask=inside)

    dpairs = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    dk = tl.dot(v, tl.trans(ds), input_precision=PRECISION)
    if ONES:
        dpairs += dweight[None, :]
        part = tl.full([CHUNK, 16], 0.0625, tl.float32) * alone
        dk = tl.dot(part.to(dtype), tl.trans(dn), dk, input_precision=PRECISION)
    dk = dk * (until * gate[:, None])
    if p_ddecay is not None:
        whole = factor_whole(p_sums, last, stop - start, h, heads, DECAY, DK, ROWS)
        s = load_part(p_states + place, first, DK, DV, WIDE, ROWS, V_TILE)
        kept = tl.sum(k * dk) + tl.sum(s.to(tl.float32) * ds.to(tl.float32)) * whole
        if ONES:
            n = load_column(p_states + place + DV, DK, WIDE, ROWS) * (alone / 16)
            kept += tl.sum(n * dn.to(tl.float32)) * whole
    dpairs *= between * gate[:, None]
    dk = tl.dot(dpairs.to(dtype), q, dk, input_precision=PRECISION)
    store_rows(p_dk, dk, own + start, own + stop, h, heads * DK, DK, 0, CHUNK, DK, ROWS)
    if p_ddecay is not None:
        at = (own + token) * heads + h
        terms = tl.load(p_terms + at, mask=inside, other=0.0) - tl.sum(k * dk, 1)
        terms += tl.where(token == last, kept, 0.0)
        tl.store(p_ddecay + at, tl.cumsum(terms, 0, reverse=True), mask=inside)
