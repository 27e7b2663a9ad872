"""Kernels of additive rules: every sequence is cut in pieces that all start at once.

A program finds what its piece adds to the state, waits for the state before it, passes the state
behind it on, and only then walks its chunks; their second reading comes from the cache.  Programs
take their piece in the order in which they start, so that whom they wait for runs already.

With a gate b and P_ij = scale exp(G_i - G_j) q_i k_j at i >= j:  o = scale exp(G) q S + P (b v),
S' = exp(G_C) S + (exp(G_C - G) k)^T (b v).  With a normaliser, o is divided by a weight w that is found
before (`normaliser`), and states have one more column, which is not read here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.state.tiles import (
    decay_of_pairs,
    factor_since,
    factor_until,
    factor_whole,
    load_gate,
    load_part,
    load_row,
    load_rows,
    store_part,
    store_rows,
    wait_for,
)


@triton.jit(do_not_specialize=["heads"])
def state_additive_forward(
    p_q, p_k, p_v, p_sums, p_gate, p_pairs, p_weight, p_floor, p_initial, p_after, p_o, p_final,
    p_ready, p_pieces,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups, scale,
    floor,
    DECAY: tl.constexpr, SIGNED: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, V_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o, the state after every piece and the final state, of one piece, value head and value tile.

    Initial and final states have WIDE columns.  Where there is a weight w [T, Hv], o is divided by
    max(|w|, floor), or by max(w, floor) where SIGNED; `p_floor` [T, Hv] where it is one per token.
    With decay 3, q and k come with their decays and P from `state_pairs_forward`.
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

    here = (tl.cast(piece, tl.int64) * heads + h) * (DK * DV)
    s_before = tl.zeros([ROWS, V_TILE], tl.float32)
    if before >= 0:
        wait_for(p_ready + 1 + (before * heads + h) * v_tiles + tile)
        p_before = p_after + (tl.cast(before, tl.int64) * heads + h) * (DK * DV)
        s_before = load_part(p_before, first, DK, DV, DV, ROWS, V_TILE)
    elif p_initial is not None:
        p_before = p_initial + (tl.cast(sequence, tl.int64) * heads + h) * (DK * WIDE)
        s_before = load_part(p_before, first, DK, DV, WIDE, ROWS, V_TILE)
    if behind >= 0:
        store_part(p_after + here, s + s_before * total, first, DK, DV, DV, ROWS, V_TILE)
        tl.debug_barrier()
        tl.atomic_xchg(p_ready + 1 + (piece * heads + h) * v_tiles + tile, 1, sem="release")

    s = s_before
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
        if p_weight is not None:
            p = tl.cast(token, tl.int64) * heads + h
            weight = tl.load(p_weight + p, mask=inside, other=1.0)
            least = floor
            if p_floor is not None:
                least = tl.load(p_floor + p, mask=inside, other=1.0)
            o = o / tl.maximum(weight if SIGNED else tl.abs(weight), least)[:, None]
        store_rows(p_o, o, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
        if (DECAY == 1) | (DECAY == 2):
            until = factor_until(p_sums, token, row, inside, last, h, heads, 0, DECAY, DK, ROWS)
            z = (z * until).to(dtype)
        whole = factor_whole(p_sums, last, stop - start, h, heads, DECAY, DK, ROWS)
        s = tl.dot(tl.trans(k), z, s * whole, input_precision=PRECISION)

    if behind < 0:
        p_last = p_final + (tl.cast(sequence, tl.int64) * heads + h) * (DK * WIDE)
        store_part(p_last, s, first, DK, DV, WIDE, ROWS, V_TILE)


@triton.jit(do_not_specialize=["heads", "tokens"])
def state_additive_queries_backward(
    p_q, p_k, p_v, p_sums, p_gate, p_do, p_dweight, p_normaliser, p_initial, p_after, p_dq,
    p_terms, p_states, p_pieces,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, tokens, heads, groups,
    scale,
    DECAY: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, V_TILE: tl.constexpr, PRECISION: tl.constexpr,
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
    s = tl.zeros([ROWS, V_TILE], tl.float32)
    if before >= 0:
        p_before = p_after + (tl.cast(before, tl.int64) * heads + h) * (DK * DV)
        s = load_part(p_before, first, DK, DV, DV, ROWS, V_TILE)
    elif p_initial is not None:
        p_before = p_initial + (tl.cast(sequence, tl.int64) * heads + h) * (DK * WIDE)
        s = load_part(p_before, first, DK, DV, WIDE, ROWS, V_TILE)
    own = tl.cast(tile, tl.int64) * tokens
    alone = tl.where(tile == 0, 1.0, 0.0)
    for c in range(begin, end):
        start = first_token + (c - begin) * CHUNK
        stop = tl.minimum(start + CHUNK, past_token)
        token = start + row
        inside = token < stop
        last = stop - 1
        if p_states is not None:
            p_state = p_states + (tl.cast(c, tl.int64) * heads + h) * (DK * DV)
            store_part(p_state, s, first, DK, DV, DV, ROWS, V_TILE)
        k = load_rows(p_k, start, stop, h // groups, k_stride_t, k_stride_h, 0, CHUNK, DK, ROWS)
        z = load_rows(p_v, start, stop, h, v_stride_t, v_stride_h, first, CHUNK, DV, V_TILE)
        do = load_rows(p_do, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
        gate = load_gate(p_gate, token, inside, h, heads)
        dpairs = tl.dot(do, tl.trans(z), input_precision=PRECISION)
        dq = tl.dot(do, tl.trans(s.to(dtype)), input_precision=PRECISION)
        if p_dweight is not None:
            p = p_dweight + tl.cast(token, tl.int64) * heads + h
            dweight = tl.load(p, mask=inside, other=0.0) * alone
            dpairs += dweight[:, None]
            n = load_row(p_normaliser + (tl.cast(c, tl.int64) * heads + h) * DK, 1, DK, ROWS)
            dq += dweight[:, None] * n[None, :]
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


@triton.jit(do_not_specialize=["heads", "pieces"])
def state_additive_walk_backward(
    p_q, p_sums, p_do, p_dfinal, p_dbefore, p_dstates, p_dinitial, p_ready, p_pieces,
    q_stride_t, q_stride_h, pieces, heads, groups, scale,
    DECAY: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, V_TILE: tl.constexpr, PRECISION: tl.constexpr,
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
    ds = tl.zeros([ROWS, V_TILE], tl.float32)
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

    ds_behind = tl.zeros([ROWS, V_TILE], tl.float32)
    if behind >= 0:
        wait_for(p_ready + 1 + (behind * heads + h) * v_tiles + tile)
        p_behind = p_dbefore + (tl.cast(behind, tl.int64) * heads + h) * (DK * DV)
        ds_behind = load_part(p_behind, first, DK, DV, DV, ROWS, V_TILE)
    else:
        p_behind = p_dfinal + (tl.cast(sequence, tl.int64) * heads + h) * (DK * WIDE)
        ds_behind = load_part(p_behind, first, DK, DV, WIDE, ROWS, V_TILE)
    if before >= 0:
        here = p_dbefore + (tl.cast(piece, tl.int64) * heads + h) * (DK * DV)
        store_part(here, ds + ds_behind * total, first, DK, DV, DV, ROWS, V_TILE)
        tl.debug_barrier()
        tl.atomic_xchg(p_ready + 1 + (piece * heads + h) * v_tiles + tile, 1, sem="release")

    ds = ds_behind
    for i in range(0, end - begin):
        c = end - 1 - i
        start = first_token + (c - begin) * CHUNK
        stop = tl.minimum(start + CHUNK, past_token)
        token = start + row
        inside = token < stop
        p_dstate = p_dstates + (tl.cast(c, tl.int64) * heads + h) * (DK * DV)
        store_part(p_dstate, ds, first, DK, DV, DV, ROWS, V_TILE)
        q = load_rows(p_q, start, stop, h // groups, q_stride_t, q_stride_h, 0, CHUNK, DK, ROWS)
        do = load_rows(p_do, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
        since = factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS) * scale
        whole = factor_whole(p_sums, stop - 1, stop - start, h, heads, DECAY, DK, ROWS)
        ds = tl.dot(tl.trans(q), (do * since).to(dtype), ds * whole, input_precision=PRECISION)

    if p_dinitial is not None:  # noqa: SIM102
        if before < 0:
            p_first = p_dinitial + (tl.cast(sequence, tl.int64) * heads + h) * (DK * WIDE)
            store_part(p_first, ds, first, DK, DV, WIDE, ROWS, V_TILE)


@triton.jit(do_not_specialize=["heads", "tokens"])
def state_additive_keys_backward(
    p_q, p_k, p_v, p_sums, p_gate, p_do, p_dweight, p_normaliser, p_dnormaliser, p_terms, p_states,
    p_dstates, p_dk, p_dv, p_dgate, p_ddecay, p_chunks,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, tokens, heads, groups,
    scale,
    DECAY: tl.constexpr, CHUNK: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    ROWS: tl.constexpr, V_TILE: tl.constexpr, PRECISION: tl.constexpr,
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
    chunk = tl.cast(c, tl.int64) * heads + h
    place = chunk * (DK * DV)
    own = tl.cast(tile, tl.int64) * tokens
    alone = tl.where(tile == 0, 1.0, 0.0)
    q = load_rows(p_q, start, stop, h // groups, q_stride_t, q_stride_h, 0, CHUNK, DK, ROWS)
    k = load_rows(p_k, start, stop, h // groups, k_stride_t, k_stride_h, 0, CHUNK, DK, ROWS)
    v = load_rows(p_v, start, stop, h, v_stride_t, v_stride_h, first, CHUNK, DV, V_TILE)
    do = load_rows(p_do, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
    ds = load_part(p_dstates + place, first, DK, DV, DV, ROWS, V_TILE)
    gate = load_gate(p_gate, token, inside, h, heads)
    between = tl.trans(decay_of_pairs(p_sums, token, row, inside, h, heads, DECAY)) * scale
    until = factor_until(p_sums, token, row, inside, last, h, heads, 0, DECAY, DK, ROWS)

    pairs = tl.dot(k, tl.trans(q), input_precision=PRECISION) * between
    dz = tl.dot(k, ds, input_precision=PRECISION) * until
    dz = tl.dot(pairs.to(dtype), do, dz, input_precision=PRECISION)
    dgate = tl.sum(dz * v, 1)
    if p_dweight is not None:
        p = p_dweight + tl.cast(token, tl.int64) * heads + h
        dweight = tl.load(p, mask=inside, other=0.0) * alone
        dn = load_row(p_dnormaliser + chunk * DK, 1, DK, ROWS) * alone
        found = tl.sum(k.to(tl.float32) * dn[None, :], 1)[:, None] * until
        dgate += tl.sum(found, 1) + tl.sum(pairs * dweight[None, :], 1)
    store_rows(p_dv, dz * gate[:, None], start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
    if p_dgate is not None:
        tl.store(p_dgate + (own + token) * heads + h, dgate, mask=inside)

    dpairs = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    dk = tl.dot(v, tl.trans(ds), input_precision=PRECISION)
    if p_dweight is not None:
        dpairs += dweight[None, :]
        dk += dn[None, :]
    dk = dk * (until * gate[:, None])
    if p_ddecay is not None:
        whole = factor_whole(p_sums, last, stop - start, h, heads, DECAY, DK, ROWS)
        s = load_part(p_states + place, first, DK, DV, DV, ROWS, V_TILE)
        kept = tl.sum(k * dk) + tl.sum(s.to(tl.float32) * ds.to(tl.float32)) * whole
        if p_dweight is not None:
            kept += tl.sum(load_row(p_normaliser + chunk * DK, 1, DK, ROWS) * dn) * whole
    dpairs *= between * gate[:, None]
    dk = tl.dot(dpairs.to(dtype), q, dk, input_precision=PRECISION)
    store_rows(p_dk, dk, own + start, own + stop, h, heads * DK, DK, 0, CHUNK, DK, ROWS)
    if p_ddecay is not None:
        at = (own + token) * heads + h
        terms = tl.load(p_terms + at, mask=inside, other=0.0) - tl.sum(k * dk, 1)
        terms += tl.where(token == last, kept, 0.0)
        tl.store(p_ddecay + at, tl.cumsum(terms, 0, reverse=True), mask=inside)
