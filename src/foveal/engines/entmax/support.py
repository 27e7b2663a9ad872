"""Kernels: lists of what holds weights above zero: tiles, and single keys and queries.

A block of queries (or a tile of keys) lists the single keys (queries) that it needs, up to `room` of
them; one that needs more is left to the kernels that walk whole tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.entmax.threshold import either

_CHUNK = tl.constexpr(64)
_KEYS = tl.constexpr(256)
_QUERIES = tl.constexpr(512)


@triton.jit
def entmax_support_q(
    p_rows, p_seen, p_indices, p_partial, p_counts, tiles, k_tiles, heads, words, width, route,
    SPEC: tl.constexpr,
):  # fmt: skip
    """The list of one tile of queries, tested tiles first, and its column of `seen`.

    indices int32 [N, heads, tiles, width], partial and counts [N, heads, tiles]; seen int32 [N, heads,
    k_tiles, tiles]: 1 + 2 i + full for the i-th of the tested or of the full tiles, else 0.
    """
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    ROWS: tl.constexpr = Q_TILE[2]
    program = tl.program_id(0)
    tile = program % tiles
    matrix = program // tiles
    lengths = (1, 1, k_tiles)
    state = SPEC.route.open(
        route, tile, matrix // heads, matrix % heads, lengths, lengths, Q_TILE, K_TILE, 1
    )
    p_own = p_indices + program.to(tl.int64) * width
    p_column = p_seen + matrix.to(tl.int64) * k_tiles * tiles + tile
    for start in range(0, k_tiles, _CHUNK):
        i = start + tl.arange(0, _CHUNK)
        tl.store(p_column + i.to(tl.int64) * tiles, tl.zeros([_CHUNK], tl.int32), mask=i < k_tiles)
    tl.debug_barrier()
    kept = 0
    partial = 0
    for full in tl.static_range(2):
        count = state[full]
        p_list = state[3] + full * state[0]
        p_bits = p_rows + (program.to(tl.int64) * 2 + full) * words * ROWS + tl.arange(0, ROWS)
        for start in range(0, count, 32):
            i = start + tl.arange(0, 32)
            word = tl.reduce(tl.load(p_bits + start // 32 * ROWS), 0, either)
            found = (word >> tl.arange(0, 32)) & (i < count).to(tl.int32)
            other = tl.load(p_list + i, mask=i < count, other=0)
            place = kept + tl.cumsum(found, 0) - 1
            tl.store(p_own + place, other, mask=found > 0)
            tl.store(p_column + other.to(tl.int64) * tiles, 1 + 2 * i + full, mask=found > 0)
            kept += tl.sum(found, 0)
        if full == 0:
            partial = kept
    tl.store(p_partial + program, partial)
    tl.store(p_counts + program, kept)


@triton.jit
def entmax_support_kv(p_seen, p_indices, p_partial, p_counts, tiles):
    """The list of one tile of keys: tiles of queries, tested ones first, of the row of `seen` [., tiles]."""
    row = tl.program_id(0)
    p_row = p_seen + row.to(tl.int64) * tiles
    p_own = p_indices + row.to(tl.int64) * tiles
    kept = 0
    partial = 0
    for kind in tl.static_range(2):
        for start in range(0, tiles, _CHUNK):
            i = start + tl.arange(0, _CHUNK)
            code = tl.load(p_row + i, mask=i < tiles, other=0)
            found = ((code > 0) & ((code - 1) % 2 == kind)).to(tl.int32)
            place = kept + tl.cumsum(found, 0) - 1
            tl.store(p_own + place, i, mask=found > 0)
            kept += tl.sum(found, 0)
        if kind == 0:
            partial = kept
    tl.store(p_partial + row, partial)
    tl.store(p_counts + row, kept)


@triton.jit
def entmax_keys(
    p_columns, p_keys, p_partial, p_counts, tiles, heads, width, room, route,
    SPEC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The keys that one block of queries needs, those of tested tiles first.

    keys int32 [programs, room], of which the first `counts` are written unless there is no room.
    """
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    KEYS: tl.constexpr = K_TILE[2]
    WORDS: tl.constexpr = (KEYS + 31) // 32
    GROUPS: tl.constexpr = Q_TILE[2] // 16 // BLOCKS
    program = tl.program_id(0)
    tile = program // BLOCKS % tiles
    matrix = program // BLOCKS // tiles
    lengths = (1, 1, 1)
    state = SPEC.route.open(
        route, tile, matrix // heads, matrix % heads, lengths, lengths, Q_TILE, K_TILE, 1
    )
    p_own = p_columns + (program // BLOCKS).to(tl.int64) * width * (BLOCKS * GROUPS * WORDS)
    p_own += program % BLOCKS * GROUPS * WORDS
    p_list = p_keys + program.to(tl.int64) * room
    kept = 0
    partial = 0
    for full in tl.static_range(2):
        begin = full * state[0]
        stop = (begin + state[full]) * KEYS
        for start in range(begin * KEYS, stop, _KEYS):
            at = start + tl.arange(0, _KEYS)
            entry = at // KEYS
            within = at % KEYS
            p_entry = p_own + entry * (BLOCKS * GROUPS * WORDS) + within // 32
            word = tl.load(p_entry, mask=at < stop, other=0)
            for group in tl.static_range(1, GROUPS):
                word |= tl.load(p_entry + group * WORDS, mask=at < stop, other=0)
            found = (word >> (within % 32)) & 1
            key = tl.load(state[3] + entry, mask=at < stop, other=0) * KEYS + within
            place = kept + tl.cumsum(found, 0) - 1
            tl.store(p_list + place, key, mask=(found > 0) & (place < room))
            kept += tl.sum(found, 0)
        if full == 0:
            partial = kept
    tl.store(p_partial + program, partial)
    tl.store(p_counts + program, kept)


@triton.jit
def entmax_queries(
    p_rows, p_seen, p_indices, p_tested, p_tiles, p_queries, p_partial, p_counts, tiles, k_tiles,
    words, room, SPEC: tl.constexpr,
):  # fmt: skip
    """The queries that need one tile of keys, those of tested tiles first; queries as keys above.

    indices, tested and tiles: the list of `entmax_support_kv`.
    """
    Q_TILE: tl.constexpr = SPEC.q_tile
    ROWS: tl.constexpr = Q_TILE[2]
    AT_ONCE: tl.constexpr = max(1, _QUERIES // ROWS)
    program = tl.program_id(0)
    matrix = program // k_tiles
    p_row = p_seen + program.to(tl.int64) * tiles
    p_own = p_indices + program.to(tl.int64) * tiles
    p_list = p_queries + program.to(tl.int64) * room
    tested = tl.load(p_tested + program)
    every = tl.load(p_tiles + program)
    kept = 0
    partial = 0
    for kind in tl.static_range(2):
        begin = tested if kind == 1 else 0
        stop = every if kind == 1 else tested
        for start in range(begin, stop, AT_ONCE):
            at = tl.arange(0, AT_ONCE * ROWS)
            place = start + at // ROWS
            here = place < stop
            tile = tl.load(p_own + place, mask=here, other=0)
            i = (tl.load(p_row + tile, mask=here, other=1) - 1) // 2
            own = matrix.to(tl.int64) * tiles + tile
            word = tl.load(
                p_rows + ((own * 2 + kind) * words + i // 32) * ROWS + at % ROWS, mask=here, other=0
            )
            found = (word >> (i % 32)) & 1
            found = tl.where(here, found, 0)
            to = kept + tl.cumsum(found, 0) - 1
            tl.store(p_list + to, tile * ROWS + at % ROWS, mask=(found > 0) & (to < room))
            kept += tl.sum(found, 0)
        if kind == 0:
            partial = kept
    tl.store(p_partial + program, partial)
    tl.store(p_counts + program, kept)
