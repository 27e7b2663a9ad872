"""Forward kernels of the state engine: what is inside a chunk, the walk over chunks, the output."""

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
    load_part,
    load_rows,
    load_state,
    store_rows,
    store_state,
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
    x = tl.maximum(x, -1e4)  # exp(-1e4) is 0, and a difference of two infinities would be none
    tl.store(p_sums + offset, tl.cumsum(x, 0) * LOG2E, mask=mask)


@triton.jit
def _fits_float16(squares, gate):
    """Whether float16 holds (I + A)^-1 and what leads there, from |k|^2 [C] and the write gates b [C].

    For i > j both have at most |b_i| |k_i| |k_j| prod_t max(1, |1 - b_t |k_t|^2|): a token writes with
    I - b k k^T, and decays only shrink.  These limits leave 1.02^64 sqrt(1024 * 2.02 * 4096) < 2^14.
    """
    grows = tl.abs(1.0 - gate * squares) > 1.02
    large = (tl.abs(gate) > 1024.0) | (squares > 4096.0)
    return tl.max((grows | large).to(tl.int32), 0) == 0


@triton.jit
def _next_level(inverse, gated, row, level, INVERSE: tl.constexpr, SHORT: tl.constexpr):
    """(I + A)^-1 of blocks of 2^(level + 1) tokens from that of their halves; SHORT: by float16."""
    # Above the diagonal there is nothing: i and j meet where the numbers of their halves are 1 apart.
    number = row >> level
    met = number[:, None] ^ number[None, :] == 1
    if SHORT:
        short = inverse.to(tl.float16)
        half = tl.dot(short, gated.to(tl.float16))
        found = tl.dot(half.to(tl.float16), short)
    else:
        half = tl.dot(inverse, gated, input_precision=INVERSE)
        found = tl.dot(half, inverse, input_precision=INVERSE)
    return inverse - tl.where(met, found, 0.0)


@triton.jit
def pairs_of_chunk(
    program, p_q, p_k, p_v, p_sums, p_gate, p_pairs, p_keys, p_inverse, p_w, p_u, p_since, p_until, p_chunks,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups, scale,
    DELTA: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr,
    K_TILES: tl.constexpr, V_TILES: tl.constexpr, REACH: tl.constexpr, PRECISION: tl.constexpr,
    INVERSE: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """As `state_pairs_forward`, of one chunk and value head."""
    c = program // heads
    h = program % heads
    start = tl.load(p_chunks + 2 * c)
    stop = tl.load(p_chunks + 2 * c + 1)
    row = tl.arange(0, CHUNK)
    token = start + row
    inside = token < stop
    last = stop - 1
    gate = load_gate(p_gate, token, inside, h, heads)
    dtype = p_k.dtype.element_ty
    diagonal = row[:, None] == row[None, :]
    inverse = tl.where(diagonal, 1.0, 0.0)
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    keys = tl.zeros([CHUNK, CHUNK], tl.float32)

    if DECAY < 3:
        for i in tl.static_range(K_TILES):
            q = load_rows(
                p_q, start, stop, h // groups, q_stride_t, q_stride_h, i * K_TILE, CHUNK, DK, K_TILE
            )
            k = load_rows(
                p_k, start, stop, h // groups, k_stride_t, k_stride_h, i * K_TILE, CHUNK, DK, K_TILE
            )
            pairs = tl.dot(q, tl.trans(k), pairs, input_precision=PRECISION)
            if DELTA:
                keys = tl.dot(k, tl.trans(k), keys, input_precision=PRECISION)
        squares = tl.sum(tl.where(diagonal, keys, 0.0), 1)
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
        squares = tl.zeros([CHUNK], tl.float32)
        for i in tl.static_range(K_TILES):
            q = load_rows(
                p_q, start, stop, h // groups, q_stride_t, q_stride_h, i * K_TILE, CHUNK, DK, K_TILE
            )
            k = load_rows(
                p_k, start, stop, h // groups, k_stride_t, k_stride_h, i * K_TILE, CHUNK, DK, K_TILE
            )
            if SHORT:
                squares += tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
            sums = sums_of_channels(p_sums, token, inside, h, heads, i * K_TILE, DK, K_TILE)
            since = exp2_of(sums) * scale
            whole = sum_of_chunk(
                p_sums, last, stop - start, h, heads, i * K_TILE, DECAY, DK, K_TILE
            )
            until = exp2_of(tl.where(inside[:, None], whole[None, :] - sums, 0.0))
            store_rows(
                p_since, q * since, start, stop, h, heads * DK, DK, i * K_TILE, CHUNK, DK, K_TILE
            )
            store_rows(
                p_until, k * until, start, stop, h, heads * DK, DK, i * K_TILE, CHUNK, DK, K_TILE
            )
            own = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
            pairs += tl.where(diagonal, own[:, None], 0.0)
            base = base_level(p_sums, start, last, h, heads, i * K_TILE, LEVELS, REACH, DK, K_TILE)
            for level in range(tl.maximum(base - 1, 0), LEVELS):
                later, earlier = level_factors(
                    p_sums, sums, start, row, inside, last, h, heads, i * K_TILE, level, base,
                    DK, K_TILE,
                )  # fmt: skip
                met = level_pairs(row, level, base)
                k_earlier = tl.trans((k * earlier).to(dtype))
                found = tl.dot((q * later).to(dtype), k_earlier, input_precision=PRECISION)
                pairs += tl.where(met, found, 0.0)
                if DELTA:
                    found = tl.dot((k * later).to(dtype), k_earlier, input_precision=PRECISION)
                    keys += tl.where(met, found, 0.0)

    wide = heads * CHUNK
    store_rows(p_pairs, pairs * scale, start, stop, h, wide, CHUNK, 0, CHUNK, CHUNK, CHUNK)
    if DELTA:
        gated = keys * gate[:, None]
        inverse -= tl.where(row[:, None] ^ row[None, :] == 1, gated, 0.0)
        short = False
        if SHORT:
            short = _fits_float16(squares, gate)
        if short:
            for level in range(1, LEVELS):
                inverse = _next_level(inverse, gated, row, level, INVERSE, True)
        else:
            for level in range(1, LEVELS):
                inverse = _next_level(inverse, gated, row, level, INVERSE, False)
        if p_inverse is not None:
            store_rows(p_inverse, inverse, start, stop, h, wide, CHUNK, 0, CHUNK, CHUNK, CHUNK)
            store_rows(p_keys, keys, start, stop, h, wide, CHUNK, 0, CHUNK, CHUNK, CHUNK)
        # The gates of rows of k and v, and decays that all channels share, are factors of columns here.
        inverse *= gate[None, :]
        solve = inverse.to(dtype)
        reads = solve
        if (DECAY == 1) | (DECAY == 2):
            since = exp2_of(sums_of_tokens(p_sums, token, row, inside, h, heads, DECAY))
            reads = (inverse * since[None, :]).to(dtype)
        for i in tl.static_range(K_TILES):
            x = load_rows(
                p_k, start, stop, h // groups, k_stride_t, k_stride_h, i * K_TILE, CHUNK, DK, K_TILE
            )
            if DECAY == 3:
                sums = sums_of_channels(p_sums, token, inside, h, heads, i * K_TILE, DK, K_TILE)
                x = (x * exp2_of(sums)).to(dtype)
            w = tl.dot(reads, x, input_precision=PRECISION)
            store_rows(p_w, w, start, stop, h, heads * DK, DK, i * K_TILE, CHUNK, DK, K_TILE)
        for i in tl.static_range(V_TILES):
            x = load_rows(
                p_v, start, stop, h, v_stride_t, v_stride_h, i * V_TILE, CHUNK, DV, V_TILE
            )
            u = tl.dot(solve, x, input_precision=PRECISION)
            store_rows(p_u, u, start, stop, h, heads * DV, DV, i * V_TILE, CHUNK, DV, V_TILE)


@triton.jit(do_not_specialize=["heads", "count"])
def state_pairs_forward(
    p_q, p_k, p_v, p_sums, p_gate, p_pairs, p_keys, p_inverse, p_w, p_u, p_since, p_until, p_chunks, p_left,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups, scale, count,
    DELTA: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr,
    K_TILES: tl.constexpr, V_TILES: tl.constexpr, REACH: tl.constexpr, PRECISION: tl.constexpr,
    INVERSE: tl.constexpr, SHORT: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """P [T, Hv, C]; with DELTA also a [T, Hv, C] = A without its gate, M = (I + A)^-1 and
    w = M (b exp(G) k), u = M (b v), one program per chunk and value head.

    a and M are stored where they are wanted: for a backward.  SHORT: M is found by products of float16,
    whose digits are tf32's, where it fits.  With decay 3 also p_since = scale exp(G) q and
    p_until = exp(G_C - G) k [T, Hv, DK], which the walks read.
    p_left [count]: a program does those of its EACH chunks and value heads for which it is not 0.
    """
    if p_left is None:
        pairs_of_chunk(
            tl.program_id(0),
            p_q, p_k, p_v, p_sums, p_gate, p_pairs, p_keys, p_inverse, p_w, p_u, p_since,
            p_until, p_chunks, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t,
            v_stride_h, heads, groups, scale, DELTA, DECAY, CHUNK, LEVELS, DK, DV, K_TILE,
            V_TILE, K_TILES, V_TILES, REACH, PRECISION, INVERSE, SHORT,
        )  # fmt: skip
    else:
        first = tl.program_id(0) * EACH
        own = first + tl.arange(0, EACH)
        left = tl.load(p_left + own, mask=own < count, other=0)
        if tl.sum(left, 0) > 0:
            past = tl.minimum(first + EACH, count)
            # What would be kept in registers from chunk to chunk would spill others.
            for program in tl.range(first, past, disable_licm=True):
                if tl.load(p_left + program) != 0:
                    pairs_of_chunk(
                        program,
                        p_q, p_k, p_v, p_sums, p_gate, p_pairs, p_keys, p_inverse, p_w, p_u, p_since,
                        p_until, p_chunks, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t,
                        v_stride_h, heads, groups, scale, DELTA, DECAY, CHUNK, LEVELS, DK, DV, K_TILE,
                        V_TILE, K_TILES, V_TILES, REACH, PRECISION, INVERSE, SHORT,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["heads"])
def state_walk_forward(
    p_k, p_v, p_sums, p_gate, p_w, p_u, p_before, p_states, p_final, p_pieces,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, heads, groups,
    DELTA: tl.constexpr, MAPS: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, V_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """S over the chunks of one piece, for one value head and one tile of value channels, from p_before.

    Stores, where wanted, the state before each chunk, with it Z of the delta rule in place of u, and
    the final state.  With MAPS the final states are [R, P] [DK, DV + DK] of the map S' = P S + R of a
    piece.  With decay 3, k comes with its decay, as `state_pairs_forward` stores it.
    """
    WIDE: tl.constexpr = DV + DK if MAPS else DV
    v_tiles = tl.cdiv(WIDE, V_TILE)
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
    place = (tl.cast(piece, tl.int64) * heads + h) * (DK * WIDE)
    if MAPS:
        column = first + tl.arange(0, V_TILE) - DV
        s = tl.where(tl.arange(0, ROWS)[:, None] == column[None, :], 1.0, 0.0)
    elif p_before is not None:
        s = load_state(p_before + place, first, DK, DV, ROWS, V_TILE).to(tl.float32)
    else:
        s = tl.zeros([ROWS, V_TILE], tl.float32)

    for c in range(begin, end):
        start = first_token + (c - begin) * CHUNK
        stop = tl.minimum(start + CHUNK, past_token)
        token = start + row
        inside = token < stop
        last = stop - 1
        if p_states is not None:
            p_state = p_states + (tl.cast(c, tl.int64) * heads + h) * (DK * DV)
            store_state(p_state, s, first, DK, DV, ROWS, V_TILE)
        k = load_rows(p_k, start, stop, h // groups, k_stride_t, k_stride_h, 0, CHUNK, DK, ROWS)
        if DELTA:
            w = load_rows(p_w, start, stop, h, heads * DK, DK, 0, CHUNK, DK, ROWS)
            u = load_rows(p_u, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE, WIDE != DV)
            z = u.to(tl.float32) - tl.dot(w, s.to(dtype), input_precision=PRECISION)
            z = z.to(dtype)
            if p_states is not None:
                store_rows(p_u, z, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
        else:
            z = load_rows(
                p_v, start, stop, h, v_stride_t, v_stride_h, first, CHUNK, DV, V_TILE, WIDE != DV
            )
            if p_gate is not None:
                z = (z * load_gate(p_gate, token, inside, h, heads)[:, None]).to(dtype)
        if (DECAY == 1) | (DECAY == 2):
            until = factor_until(p_sums, token, row, inside, last, h, heads, 0, DECAY, DK, ROWS)
            z = (z * until).to(dtype)
        s = s * factor_whole(p_sums, last, stop - start, h, heads, DECAY, DK, ROWS)
        s = tl.dot(tl.trans(k), z, s, input_precision=PRECISION)

    if p_final is not None:
        store_state(p_final + place, s, first, DK, WIDE, ROWS, V_TILE)


@triton.jit(do_not_specialize=["heads"])
def state_join_forward(
    p_maps, p_added, p_initial, p_found, p_last, p_pieces, heads,
    BACKWARD: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
    V_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each piece, S' = P S + R, and behind the last one, from [R, P] = p_maps.

    BACKWARD: the gradient of the state behind each piece, dS' = P^T dS + p_added, from the last piece
    to the first, and of the initial state.
    """
    v_tiles = tl.cdiv(DV, V_TILE)
    program = tl.program_id(0)
    first = program % v_tiles * V_TILE
    h = program // v_tiles % heads
    n = program // v_tiles // heads
    WIDE: tl.constexpr = DV + DK
    start = (tl.cast(n, tl.int64) * heads + h) * (DK * DV)
    if p_initial is not None:
        s = load_state(p_initial + start, first, DK, DV, ROWS, V_TILE).to(tl.float32)
    else:
        s = tl.zeros([ROWS, V_TILE], tl.float32)
    piece = n
    if BACKWARD:
        behind = tl.load(p_pieces + 7 * piece + 6)
        while behind >= 0:
            piece = behind
            behind = tl.load(p_pieces + 7 * piece + 6)
    p_added = p_added if BACKWARD else p_maps
    ADDED: tl.constexpr = DV if BACKWARD else WIDE
    place = tl.cast(piece, tl.int64) * heads + h
    step = load_part(p_maps + place * (DK * WIDE) + DV, 0, DK, DK, WIDE, ROWS, ROWS)
    added = load_part(p_added + place * (DK * ADDED), first, DK, DV, ADDED, ROWS, V_TILE)
    while piece >= 0:
        store_state(p_found + place * (DK * DV), s, first, DK, DV, ROWS, V_TILE)
        piece = tl.load(p_pieces + 7 * piece + (5 if BACKWARD else 6))
        place = tl.cast(tl.maximum(piece, 0), tl.int64) * heads + h
        # Read before the product that does not wait for it.
        step_ahead = load_part(p_maps + place * (DK * WIDE) + DV, 0, DK, DK, WIDE, ROWS, ROWS)
        added_ahead = load_part(p_added + place * (DK * ADDED), first, DK, DV, ADDED, ROWS, V_TILE)
        if BACKWARD:
            s = tl.dot(tl.trans(step), s, added, input_precision=PRECISION)
        else:
            s = tl.dot(step, s, added, input_precision=PRECISION)
        step = step_ahead
        added = added_ahead
    if p_last is not None:
        store_state(p_last + start, s, first, DK, DV, ROWS, V_TILE)


@triton.jit(do_not_specialize=["heads"])
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
    q = load_rows(p_q, start, stop, h // groups, q_stride_t, q_stride_h, 0, CHUNK, DK, ROWS)
    p_state = p_states + (tl.cast(c, tl.int64) * heads + h) * (DK * DV)
    s = load_state(p_state, first, DK, DV, ROWS, V_TILE)
    if DECAY == 3:
        o = tl.dot(q, s, input_precision=PRECISION)
    else:
        since = factor_since(p_sums, token, row, inside, h, heads, 0, DECAY, DK, ROWS)
        o = tl.dot(q, s, input_precision=PRECISION) * (since * scale)
    z = load_rows(p_z, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
    o = tl.dot(
        load_rows(p_pairs, start, stop, h, heads * CHUNK, CHUNK, 0, CHUNK, CHUNK, CHUNK),
        z,
        o,
        input_precision=PRECISION,
    )
    store_rows(p_o, o, start, stop, h, heads * DV, DV, first, CHUNK, DV, V_TILE)
