"""Kernels: the exact threshold of every row, and which tiles hold weights above zero.

In units z = c q.k with c = (alpha - 1) scale: p_j = [z_j - tau]_+ ^ a with a = 1 / (alpha - 1), and
u = p ^ (2 - alpha).
POWER says how powers are taken: 1 where a = 1 (sparsemax), 2 where a = 2, else 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.tiles import load_rows


@triton.jit
def powers(r, a, POWER: tl.constexpr):
    """p = r ^ a and u = r ^ (a - 1) of r >= 0, both 0 where r is."""
    if POWER == 1:
        return r, tl.where(r > 0.0, 1.0, 0.0)
    if POWER == 2:
        return r * r, r
    u = tl.where(r > 0.0, tl.exp2((a - 1.0) * tl.log2(tl.where(r > 0.0, r, 1.0))), 0.0)
    return u * r, u


@triton.jit
def products(
    q, p_k, k_stride, first, stop, D: tl.constexpr, D_PAD: tl.constexpr,
    K_TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """q.k of a tile of queries with the keys from `first` on, the keys, and their indices."""
    i_k = first + tl.arange(0, K_TILE)
    rows = p_k + i_k.to(tl.int64) * k_stride
    k = load_rows(rows, i_k < stop, D, D_PAD, MASKED)
    return tl.dot(q, tl.trans(k), input_precision="ieee"), k, i_k


@triton.jit
def masked_products(q, head, route, state, limits, i, SPEC: tl.constexpr):
    """z / c of the i-th tile whose pairs are tested, -inf where hidden; first key, keys, whether inside."""
    p_k, k_stride, Lk = head
    K_TILE: tl.constexpr = SPEC.k_tile
    Q_TILE: tl.constexpr = SPEC.q_tile
    KEYS: tl.constexpr = K_TILE[2]
    first, _whole, mark = SPEC.route.partial(route, state, i, K_TILE, 1)
    w, k, i_k = products(
        q, p_k, k_stride, first[2], Lk, SPEC.head_dim, SPEC.head_pad, KEYS, True
    )  # fmt: skip
    places = (i_k, i_k, i_k)
    seen = SPEC.route.sees(route, limits, mark, places, Q_TILE, K_TILE, 1) & (i_k < Lk)[None, :]
    return tl.where(seen, w, float("-inf")), k, i_k


@triton.jit
def full_products(q, head, route, state, i, SPEC: tl.constexpr):
    """The same of the i-th tile in which every pair is seen."""
    K_TILE: tl.constexpr = SPEC.k_tile
    KEYS: tl.constexpr = K_TILE[2]
    first = SPEC.route.full(route, state, i, K_TILE)
    return products(
        q, head[0], head[1], first[2], head[2], SPEC.head_dim, SPEC.head_pad, KEYS, False
    )  # fmt: skip


@triton.jit
def _newton(total, slope, a):
    """The step from a threshold that is too low to one that still is: Newton's on the a-norm."""
    safe = tl.where(slope > 0.0, slope, 1.0)
    root = tl.exp2((1.0 - 1.0 / a) * tl.log2(tl.where(total > 0.0, total, 1.0)))
    return tl.where(slope > 0.0, (total - root) / safe, 0.0)


@triton.jit
def third_order(total, slope, curve, a, POWER: tl.constexpr):
    """The step that is exact for the support at hand where a is 1 or 2, else Halley's.

    curve: the sum of r ^ (a - 2) over the support.
    """
    over = total - 1.0
    safe = tl.where(slope > 0.0, slope, 1.0)
    if POWER == 1:
        step = over / safe
    elif POWER == 2:
        root = tl.sqrt_rn(tl.maximum(slope * slope - curve * over, 0.0))
        step = over / (slope + root)
        step = tl.where(slope > 0.0, step, 0.0)
    else:
        below = 2.0 * a * slope * slope - (a - 1.0) * over * curve
        halley = 2.0 * over * slope / tl.where(below > 0.0, below, 1.0)
        step = tl.where(below > 0.0, halley, over / (a * safe))
    return tl.where(slope > 0.0, step, 0.0)


@triton.jit
def moments(r, a, sums, POWER: tl.constexpr):
    """sum r ^ a, sum r ^ (a - 1) and sum r ^ (a - 2) over the last axis with one more tile of r."""
    p, u = powers(r, a, POWER)
    slope = tl.sum(u, 1)
    if POWER == 1:
        curve = slope
    elif POWER == 2:
        curve = tl.sum(tl.where(r > 0.0, 1.0, 0.0), 1)
    else:
        curve = tl.sum(tl.where(r > 0.0, u / tl.where(r > 0.0, r, 1.0), 0.0), 1)
    return sums[0] + tl.sum(p, 1), sums[1] + slope, sums[2] + curve


@triton.jit
def most_needed(p_counts, BLOCKS: tl.constexpr):
    """The longest list among the blocks of queries of a tile."""
    return tl.max(tl.load(p_counts + tl.arange(0, BLOCKS)), 0)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def _words(r, KEYS: tl.constexpr):
    """A bit per key where r > 0.  int32 [ROWS, ceil(KEYS / 32)] of r [ROWS, KEYS]"""
    ROWS: tl.constexpr = r.shape[0]
    BITS: tl.constexpr = min(KEYS, 32)
    bit = (tl.full([KEYS], 1, tl.int32) << (tl.arange(0, KEYS) % 32))[None, :]
    bits = tl.where(r > 0.0, bit, 0)
    return tl.reduce(tl.reshape(bits, [ROWS, KEYS // BITS, BITS]), 2, either)


@triton.jit
def _ones(words):
    """The number of bits that are set, per row."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return tl.sum((x + (x >> 8) + (x >> 16) + (x >> 24)) & 0x3F, 1)


@triton.jit
def _count(w, c, a, tau, sums, p_columns, POWER: tl.constexpr, KEYS: tl.constexpr):
    """The sums with one more tile, and which rows have weights above zero in it.

    Stores a bit per key and 16 rows: whether the key weighs more than zero in one of them.
    """
    ROWS: tl.constexpr = w.shape[0]
    WORDS: tl.constexpr = (KEYS + 31) // 32
    r = tl.maximum(w * c - tau[:, None], 0.0)
    words = _words(r, KEYS)
    of_rows = tl.reduce(tl.reshape(words, [ROWS // 16, 16, WORDS]), 1, either)
    place = tl.arange(0, ROWS // 16)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    tl.store(p_columns + place, of_rows)
    found = tl.reduce(words, 1, either) != 0
    p, u = powers(r, a, POWER)
    if POWER == 0:
        return moments(r, a, sums, POWER), found
    many = _ones(words).to(tl.float32)
    if POWER == 1:
        return (sums[0] + tl.sum(p, 1), sums[1] + many, sums[2] + many), found
    return (sums[0] + tl.sum(p, 1), sums[1] + tl.sum(u, 1), sums[2] + many), found


@triton.jit
def entmax_threshold(
    p_q, p_k, p_tau, p_rows, p_columns, q_strides, k_strides, Lq, Lk, heads, groups, c, a, tolerance,
    words, width, route, SPEC: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """tau of one tile of queries (inf where a row sees nothing), and which pairs of rows and tiles, and of
    keys and 16 rows, hold weights above zero.

    q, k [N, L, H, D] by strides (batch, token, head); tau float32 [N, heads, Lq]; rows int32 [programs, 2,
    words, ROWS]: a bit per tile, tested ones in the order of their list, then full ones; columns int32
    [programs, width, ROWS / 16, KEYS / 32]: a bit per key, by the place of its tile in the list.
    A first pass keeps the largest score of each column of its tiles.  The threshold of these scores is at
    most that of all; passes over all keys then raise it until two steps of different order agree.
    """
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    ROWS: tl.constexpr = Q_TILE[2]
    KEYS: tl.constexpr = K_TILE[2]
    PER_TILE: tl.constexpr = ROWS // 16 * ((KEYS + 31) // 32)
    tiles = tl.cdiv(Lq, ROWS)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    matrix = program // tiles
    n = matrix // heads
    h = matrix % heads
    i_q = tile * ROWS + tl.arange(0, ROWS)
    inside = i_q < Lq
    rows = p_q + n.to(tl.int64) * q_strides[0] + h * q_strides[2]
    rows += i_q.to(tl.int64) * q_strides[1]
    q = load_rows(rows, inside, SPEC.head_dim, SPEC.head_pad, True)
    head = (p_k + n.to(tl.int64) * k_strides[0] + h // groups * k_strides[2], k_strides[1], Lk)
    lengths = (1, 1, Lk)
    state = SPEC.route.open(route, tile, n, h, lengths, lengths, Q_TILE, K_TILE, 1)
    limits = SPEC.route.rows(route, (i_q, i_q, i_q), inside, 1)

    largest = tl.full([ROWS, KEYS], float("-inf"), tl.float32)
    for i in range(state[0]):
        w, _k, _i_k = masked_products(q, head, route, state, limits, i, SPEC)
        largest = tl.maximum(largest, w)
    for i in range(state[1]):
        w, _k, _i_k = full_products(q, head, route, state, i, SPEC)
        largest = tl.maximum(largest, w)
    top = tl.max(largest, 1)
    blind = (top == float("-inf")) | (i_q >= Lq)
    tau = tl.where(blind, 0.0, top * c) - 1.0
    for _ in range(8):
        r = tl.maximum(largest * c - tau[:, None], 0.0)
        p, u = powers(r, a, POWER)
        tau += _newton(tl.sum(p, 1), tl.sum(u, 1), a)
    tau = tl.where(blind, float("inf"), tau)

    own = matrix.to(tl.int64) * tiles + tile
    p_bits = p_rows + own * 2 * words * ROWS + tl.arange(0, ROWS)
    p_own = p_columns + own * width * PER_TILE
    open_rows = 1
    passes = 0
    while open_rows > 0:
        zero = tl.zeros([ROWS], tl.float32)
        sums = (zero, zero, zero)
        for start in range(0, state[0], 32):
            bits = tl.zeros([ROWS], tl.int32)
            for i in range(start, tl.minimum(start + 32, state[0])):
                w, _k, _i_k = masked_products(q, head, route, state, limits, i, SPEC)
                p_tile = p_own + (i) * PER_TILE
                sums, found = _count(w, c, a, tau, sums, p_tile, POWER, KEYS)
                bits |= found.to(tl.int32) << (i - start)
            tl.store(p_bits + start // 32 * ROWS, bits)
        for start in range(0, state[1], 32):
            bits = tl.zeros([ROWS], tl.int32)
            for i in range(start, tl.minimum(start + 32, state[1])):
                w, _k, _i_k = full_products(q, head, route, state, i, SPEC)
                p_tile = p_own + (state[0] + i) * PER_TILE
                sums, found = _count(w, c, a, tau, sums, p_tile, POWER, KEYS)
                bits |= found.to(tl.int32) << (i - start)
            tl.store(p_bits + (words + start // 32) * ROWS, bits)
        low = _newton(sums[0], sums[1], a)
        high = third_order(sums[0], sums[1], sums[2], a, POWER)
        if POWER == 1:
            gap = tl.abs(sums[0] - 1.0)
        else:
            gap = tl.abs(high - low) * a * sums[1]
        gap = tl.where(sums[1] > 0.0, gap, 0.0)
        passes += 1
        open_rows = tl.max(tl.where(gap > tolerance, 1, 0), 0)
        open_rows = tl.where(passes < 24, open_rows, 0)
        tau += tl.where(open_rows > 0, low, high)
    matrix_rows = p_tau + matrix.to(tl.int64) * Lq
    tl.store(matrix_rows + i_q, tau, mask=inside)
