"""Forward of the portable GPU edition: one program per query tile and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.engines.common.softmax import (
    LOG2E,
    any_not_finite,
    row_lse,
    running_softmax,
)
from foveal.engines.common.tiles import (
    box_rows,
    box_tokens,
    first_token,
    load_rows,
    matrix_start,
    store_rows,
    tile_count,
)
from foveal.engines.tile.launch import Stage
from foveal.engines.tile.launches import Launch


@triton.jit
def scores(q, queries, keys, scoring, first, stops, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """Scores of a query tile on the keys of the box at `first`, before the test.

    Returns them, whether keys are `inside`, their places and raster indices, the scores without terms, k.
    """
    K_TILE: tl.constexpr = SPEC.k_tile
    RANK: tl.constexpr = SPEC.rank
    n, h, i_q, in_grid = queries
    p_k, k_strides, k_lengths = keys[0], keys[1], keys[4]
    scale, cap, first_term, second_term = scoring
    places, i_k, inside = box_tokens(first, stops, k_lengths, K_TILE, RANK)
    p_rows = p_k + box_rows(first, k_strides, K_TILE, RANK)
    k = load_rows(p_rows, inside, SPEC.head_dim, SPEC.head_pad, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=SPEC.precision)
    bare = SPEC.shape.value(s, scale, cap)
    here = in_grid[:, None] & inside[None, :]
    s = bare + SPEC.first.value(first_term, n, h, i_q[:, None], i_k[None, :], here) * LOG2E
    s += SPEC.second.value(second_term, n, h, i_q[:, None], i_k[None, :], here) * LOG2E
    return s, inside, places, i_k, bare, k


@triton.jit
def load_values(keys, first, inside, SPEC: tl.constexpr, MASKED: tl.constexpr):
    K_TILE: tl.constexpr = SPEC.k_tile
    p_rows = keys[2] + box_rows(first, keys[3], K_TILE, SPEC.rank)
    return load_rows(p_rows, inside, SPEC.value_dim, SPEC.value_pad, MASKED)


@triton.jit
def _add_values(s, keys, first, inside, unit, rows, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """The running softmax over one more box: largest score, sum of weights, sum of values."""
    largest, total, acc = rows
    p, factor, largest, total = running_softmax(s, unit, largest, total)
    v = load_values(keys, first, inside, SPEC, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision=SPEC.precision)
    return largest, total, acc


@triton.jit
def _test(s, route, limits, mark, places, whole, SPEC: tl.constexpr):
    """s with -inf where a pair is hidden; on a grid, nothing to do for whole boxes."""
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    if SPEC.rank == 1 or not whole:
        seen = SPEC.route.sees(route, limits, mark, places, Q_TILE, K_TILE, SPEC.rank)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def tile_attend_forward(
    p_q, p_o, p_lse, p_sink, p_suspect, q_strides, o_strides, q_lengths,
    keys, heads, groups, scoring, route, SPEC: tl.constexpr,
):  # fmt: skip
    """o and lse of one tile of queries; `suspect` where o must be repaired if it is to be trusted.

    Tensors [N, x, y, z, H, D] by strides (batch, x, y, z, head); lse float32 [N, heads, queries], in base 2.
    keys: (k, its strides, v, its strides, lengths of the key grid); scoring: (scale, cap, terms...) as
    the hooks read them; route as SPEC.route reads it.
    """
    K_TILE: tl.constexpr = SPEC.k_tile
    Q_TILE: tl.constexpr = SPEC.q_tile
    RANK: tl.constexpr = SPEC.rank
    ROWS: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2]
    VALUE_PAD: tl.constexpr = SPEC.value_pad
    tiles = tile_count(q_lengths, Q_TILE)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # of a causal pattern the longest first
    n = program // tiles // heads
    h = program // tiles % heads
    p_k = keys[0] + matrix_start(n, h // groups, keys[1])
    p_v = keys[2] + matrix_start(n, h // groups, keys[3])
    head = (p_k, keys[1], p_v, keys[3], keys[4])

    own = first_token(tile, q_lengths, Q_TILE)
    places, i_q, in_grid = box_tokens(own, q_lengths, q_lengths, Q_TILE, RANK)
    p_rows = p_q + matrix_start(n, h, q_strides) + box_rows(own, q_strides, Q_TILE, RANK)
    q = load_rows(p_rows, in_grid, SPEC.head_dim, SPEC.head_pad, True)
    queries = (n, h, i_q, in_grid)
    state = SPEC.route.open(route, tile, n, h, q_lengths, keys[4], Q_TILE, K_TILE, RANK)
    limits = SPEC.route.rows(route, places, in_grid, RANK)
    unit = SPEC.shape.unit(scoring[0])

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if p_sink is not None:
        sink = tl.load(p_sink + h).to(tl.float32) * LOG2E
        largest = tl.zeros([ROWS], tl.float32) + sink
        total = tl.where(largest == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for i in range(state[0]):
        first, whole, mark = SPEC.route.partial(route, state, i, K_TILE, RANK)
        box = scores(q, queries, head, scoring, first, state[2], SPEC, True)
        s = _test(box[0], route, limits, mark, box[2], whole, SPEC)
        rows = (largest, total, acc)
        largest, total, acc = _add_values(s, head, first, box[1], unit, rows, SPEC, True)
    if RANK == 1:
        for i in range(state[1]):
            first = SPEC.route.full(route, state, i, K_TILE)
            box = scores(q, queries, head, scoring, first, state[2], SPEC, False)
            rows = (largest, total, acc)
            largest, total, acc = _add_values(box[0], head, first, box[1], unit, rows, SPEC, False)

    lse = row_lse(largest, total)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(p_suspect + program, tl.where(state[0] > 0, any_not_finite(acc), 0))
    p_rows = p_o + matrix_start(n, h, o_strides) + box_rows(own, o_strides, Q_TILE, RANK)
    store_rows(p_rows, acc, in_grid, SPEC.value_dim, SPEC.value_pad)
    p_row_lse = (
        p_lse + tl.cast(program // tiles, tl.int64) * q_lengths[0] * q_lengths[1] * q_lengths[2]
    )
    tl.store(p_row_lse + i_q, lse, mask=in_grid)


@dataclass(frozen=True)
class Attended:
    """o [N, Lq, Hq, Dv], base-2 lse float32 [N, Hq, Lq], and int32 1 for each program whose part of o is to
    be repaired; nothing is in them before `launch`."""

    o: Tensor
    lse: Tensor
    suspect: Tensor
    launch: Launch


def forward_launch(
    stage: Stage, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, scoring: tuple[Any, ...]
) -> Attended:
    """The forward on q [N, Lq, Hq, D], k and v [N, Lk, Hkv, .].

    Strides are free but for the last axis, which is contiguous.
    """
    N, Lq, heads, _ = q.shape
    o = q.new_empty(N, Lq, heads, v.shape[-1])
    lse = q.new_empty(N, heads, Lq, dtype=torch.float32)
    layout = stage.layout
    stacks = heads // layout.packed
    programs = N * stacks * layout.q_tiles
    suspect = q.new_empty(programs, dtype=torch.int32)
    keys = (k, layout.k_strides(k), v, layout.k_strides(v), layout.k_grid)
    arguments = (
        q, o, lse, sink, suspect, layout.q_strides(q), layout.q_strides(o), layout.q_grid,
        keys, stacks, stacks // k.shape[2], scoring, layout.arguments,
    )  # fmt: skip
    options = {"SPEC": stage.spec, **stage.options}
    return Attended(o, lse, suspect, Launch(tile_attend_forward, programs, arguments, options))
