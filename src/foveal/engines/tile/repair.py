"""Where NaN or inf in keys or values spread to rows that do not see them: those rows once more.

The forward multiplies hidden pairs by 0, and 0 x NaN is NaN.  It marks the tiles whose output is not
finite; this kernel leaves all others at once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from foveal.engines.common.softmax import visible_product
from foveal.engines.common.tiles import (
    first_token,
    load_rows,
    matrix_start,
    store_rows,
    tile_count,
    tile_rows,
    tile_tokens,
)
from foveal.engines.tile.forward import Attended, load_values, scores
from foveal.engines.tile.launch import Stage, options
from foveal.engines.tile.launches import Launch


@triton.jit
def _visible_values(
    q, queries, keys, scoring, route, state, limits, lse, SPEC: tl.constexpr, ROWS: tl.constexpr
):
    """Output of some rows [ROWS, Dv], given their base-2 lse; a hidden pair adds nothing."""
    Q_TILE: tl.constexpr = SPEC.q_tile
    K_TILE: tl.constexpr = SPEC.k_tile
    VALUE_PAD: tl.constexpr = SPEC.value_pad
    unit = SPEC.shape.unit(scoring[0])
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for i in tl.range(0, state[0], num_stages=1):
        visit = SPEC.route.partial(route, state, i, K_TILE, SPEC.rank)
        box = scores(q, queries, keys, scoring, visit[0], state[2], SPEC, True)
        seen = SPEC.route.sees(route, limits, visit[2], box[2], Q_TILE, K_TILE, SPEC.rank)
        p = tl.where(seen, tl.exp2(box[0] * unit - lse[:, None]), 0.0)
        acc = visible_product(p, seen, load_values(keys, visit[0], box[1], SPEC, True), acc)
    if SPEC.rank == 1:
        for i in tl.range(0, state[1], num_stages=1):
            first = SPEC.route.full(route, state, i, K_TILE)
            box = scores(q, queries, keys, scoring, first, state[2], SPEC, True)
            v = load_values(keys, first, box[1], SPEC, True)
            p = tl.exp2(box[0] * unit - lse[:, None]).to(v.dtype)
            acc = tl.dot(p, v, acc, input_precision=SPEC.precision)
    return acc


@triton.jit
def tile_attend_repair(
    p_q, p_o, p_lse, p_suspect, q_strides, o_strides, q_lengths,
    keys, heads, groups, scoring, route, SPEC: tl.constexpr,
):  # fmt: skip
    """Writes o of the tiles that are suspect; arguments as of the forward."""
    K_TILE: tl.constexpr = SPEC.k_tile
    Q_TILE: tl.constexpr = SPEC.q_tile
    RANK: tl.constexpr = SPEC.rank
    ROWS: tl.constexpr = 16
    PARTS: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2] // ROWS
    program = tl.program_id(0)
    parts = tl.where(tl.load(p_suspect + program) == 0, 0, PARTS)
    tiles = tile_count(q_lengths, Q_TILE)
    tile = tiles - 1 - program % tiles
    n = program // tiles // heads
    h = program // tiles % heads
    p_k = keys[0] + matrix_start(n, h // groups, keys[1])
    p_v = keys[2] + matrix_start(n, h // groups, keys[3])
    head = (p_k, keys[1], p_v, keys[3], keys[4])
    own = first_token(tile, q_lengths, Q_TILE)
    p_heads_lse = (
        p_lse + (program // tiles).to(tl.int64) * q_lengths[0] * q_lengths[1] * q_lengths[2]
    )
    for part in tl.range(0, parts, num_stages=1):
        state = SPEC.route.open(route, tile, n, h, q_lengths, keys[4], Q_TILE, K_TILE, RANK)
        index = part * ROWS + tl.arange(0, ROWS)
        places, i_q, in_grid = tile_tokens(index, own, q_lengths, q_lengths, Q_TILE, RANK)
        p_rows = (
            p_q + matrix_start(n, h, q_strides) + tile_rows(index, own, q_strides, Q_TILE, RANK)
        )
        q = load_rows(p_rows, in_grid, SPEC.head_dim, SPEC.head_pad, True)
        limits = SPEC.route.rows(route, places, in_grid, RANK)
        lse = tl.load(p_heads_lse + i_q, mask=in_grid, other=0.0)
        queries = (n, h, i_q, in_grid)
        acc = _visible_values(q, queries, head, scoring, route, state, limits, lse, SPEC, ROWS)
        p_rows = (
            p_o + matrix_start(n, h, o_strides) + tile_rows(index, own, o_strides, Q_TILE, RANK)
        )
        store_rows(p_rows, acc, in_grid, SPEC.value_dim, SPEC.value_pad)


def repair_launch(
    stage: Stage, q: Tensor, k: Tensor, v: Tensor, attended: Attended, scoring: tuple[Any, ...]
) -> Launch:
    """Writes the rows of o in suspect tiles; arguments as of the forward."""
    layout, o = stage.layout, attended.o
    heads = q.shape[2] // layout.packed
    keys = (k, layout.k_strides(k), v, layout.k_strides(v), layout.k_grid)
    arguments = (
        q, o, attended.lse, attended.suspect, layout.q_strides(q), layout.q_strides(o),
        layout.q_grid, keys, heads, heads // k.shape[2], scoring, layout.arguments,
    )  # fmt: skip
    settings = {"SPEC": stage.spec, **options(4, 1)}
    return Launch(tile_attend_repair, len(attended.suspect), arguments, settings)
