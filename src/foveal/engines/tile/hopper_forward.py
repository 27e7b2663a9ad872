# mypy: ignore-errors
"""Forward of the Hopper edition: one producer, two consumers of one box of queries each.

In a consumer the product Q K^T of the next box is in flight while P V of this one is; the softmax
of one consumer hides under the products of the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.engines.tile.hopper_compat import store_box, store_wait
from foveal.engines.tile.hopper_launch import (
    descriptor,
    head_pad,
    list_arguments,
    on_grid,
    packed_bounds,
    programs,
    scaled_biases,
    split_boxes,
    statistics_descriptor,
    term_arguments,
    tested_pairs,
)
from foveal.engines.tile.hopper_lists import HEADER, list_of, listed_bits, load_listed
from foveal.engines.tile.hopper_merge import launch_merge, tile_attend_merge
from foveal.engines.tile.hopper_plan import Walk, forward_walk, list_walk, shared_heads
from foveal.engines.tile.hopper_repair import launch_repair
from foveal.engines.tile.hopper_scores import (
    ALIBI,
    add_terms,
    key_terms,
    query_terms,
    row_places,
    scored,
)
from foveal.engines.tile.hopper_walk import (
    barriers,
    boxes,
    following,
    load_boxes,
    own_boxes,
    part_slot,
    place,
    product_layout,
    seen_by_rows,
    seen_whole,
    skip_boxes,
    specialised,
    store_part,
    taken,
    turns,
    visible,
    whole,
)
from foveal.engines.tile.lists import WalkLists
from foveal.engines.tile.replay import launch
from foveal.engines.tile.terms import PER_KEY, LocalTerm
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.dense import Dense

# The running maximum starts here, so that rows without a visible key so far stay finite.
FLOOR = gl.constexpr(-3.0e38)
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def one_buffer(D, DV):
    """Whether outputs leave through the memory of queries, where there is none for both."""
    return D + DV > 384


@gluon.jit
def hide(
    s, x, y, z, low, width, lists, tile, own, C: gl.constexpr, AXES: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """Scores of hidden pairs become -inf."""
    LAYOUT: gl.constexpr = s.type.layout
    if len(lists) > 6:
        seen = listed_bits(lists, tile, own, x, LAYOUT, C, ROWS)
    else:
        seen = visible(x, y, z, low, width, LAYOUT, C, AXES)
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def store_rows(desc, n, x, y, z, head, value, buffer, AXES: gl.constexpr):
    """Writes a box of rows through shared memory; the copy clips what lies outside the grid."""
    store_wait(0)
    buffer.reshape([value.shape[0], value.shape[1]]).store(value.to(desc.dtype))
    fence_async_shared()
    if AXES == 1:
        store_box(desc, [n, x, head, 0], buffer)
    elif AXES == 2:
        store_box(desc, [n, x, y, head, 0], buffer)
    else:
        store_box(desc, [x, y, z, head, 0], buffer)


@gluon.jit
def attend_item(
    WHICH: gl.constexpr, turn, g, q, row, own, key,
    q_ready, q_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
    o_desc, o_s, p_lse, p_spoilt, p_flags, p_bounds, lists, scoring, bias_s, terms, key_grid, X, Y, Z,
    heads, groups, shared, total, scale_log2, parts, split,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """A work item of a consumer: running softmax of its box of queries over the boxes of keys.

    Returns how many boxes of keys there were so far.
    """
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    D: gl.constexpr = q.shape[-1]
    DV: gl.constexpr = v_s.shape[-1]
    S: gl.constexpr = product_layout(N)
    O: gl.constexpr = product_layout(DV)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O)
    # As the producer: the copy of biases starts at 16 bytes.
    ALIGN: gl.constexpr = 1 if len(bias_s) == 0 else 4
    p_sink = scoring[0]
    squash = scoring[1]
    t, part_first, part_stop = taken(turn, total, split)
    if len(lists) > 0:
        n, head, p_list = list_of(t, lists, heads, shared)
        tile = gl.load(p_list)
        x0 = tile * (W * R[0])
        y0 = 0
        z0 = 0
        tested = gl.load(p_list + 1)
        listed = gl.load(p_list + 2)
    else:
        n, head, x0, y0, z0 = place(t, X, Y, Z, heads, shared, W, R, True)
        p_list = None
        tile = 0
        tested = 0
        starts, counts = boxes(p_bounds, X, Y, Z, x0, y0, z0, W, R, C, AXES, ALIGN)
        bx, by, bz = starts
        nx, ny, nz = counts
        y1 = by + ny * C[1]
        z1 = bz + nz * C[2]
    x0 += WHICH * R[0]
    low, width = seen_by_rows(p_bounds, X, Y, Z, x0, y0, z0, row, R)
    if len(lists) > 0:
        count = gl.maximum(listed, 1)
        x = gl.load(p_list + HEADER) * C[0]
        y = 0
        z = 0
    else:
        last_low, first_up = seen_whole(p_bounds, X, Y, Z, x0, y0, z0, R)
        first = 0
        stop = nx
        if SKIPS:
            first, stop = own_boxes(p_bounds, X, x0, bx, nx, R, C)
        if len(split) > 0:
            first = part_first
            stop = part_stop
        count = (stop - first) * ny * nz
        x = bx + first * C[0]
        y = by
        z = bz
    if len(terms) > 0:
        rx, ry, rz, inside = row_places(row, x0, y0, z0, X, Y, Z, R)
        of_query = query_terms(terms, n, head, (rx * Y + ry) * Z + rz, inside)
        if len(terms) == ALIBI:
            of_queries = (of_query[0], of_query[1][:, None])
        else:
            of_queries = of_query

    mbarrier.wait(q_ready.index(WHICH), turn & 1)
    if SKIPS:
        g = skip_boxes(g, first * ny * nz, (k_ready, v_ready), (k_free, v_free), STAGES)
    stage = g % STAGES
    mbarrier.wait(k_ready.index(stage), (g // STAGES) & 1)
    k = k_s.index(stage).reshape([N, D]).permute((1, 0))
    s = warpgroup_mma(q, k, gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True)
    if len(terms) > 0:
        of_keys = key_terms(terms, n, head, x, y, z, key, key_grid, C, AXES)
    if len(bias_s) > 0:
        bias = bias_s[0].index(stage).reshape([N]).load(gl.SliceLayout(0, S))
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_free.index(stage), count=1)
    s = scored(s, squash, CAPPED)
    if len(bias_s) > 0:
        s += bias[None, :]
    if len(terms) > 0:
        s = add_terms(s, of_queries, of_keys[None, :], terms)
    if HIDES:
        if len(lists) > 0:
            if tested > 0:
                s = hide(s, x, y, z, low, width, lists, tile, own, C, AXES, W * M)
        elif whole(x, y, z, last_low, first_up, C, AXES) == 0:
            s = hide(s, x, y, z, low, width, lists, tile, own, C, AXES, W * M)
    m = gl.maximum(gl.max(s, 1) * scale_log2, FLOOR)
    p = gl.exp2(s * scale_log2 - m[:, None])
    l = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(q.dtype), P)
    acc = gl.zeros([M, DV], gl.float32, O)
    for j in range(1, count):
        if len(lists) == 0:
            x, y, z = following(x, y, z, by, bz, y1, z1, C[0], C[1], C[2])
        before = g % STAGES
        before_phase = (g // STAGES) & 1
        g += 1
        stage = g % STAGES
        mbarrier.wait(k_ready.index(stage), (g // STAGES) & 1)
        k = k_s.index(stage).reshape([N, D]).permute((1, 0))
        s_run = warpgroup_mma(q, k, gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(before), before_phase)
        acc_run = warpgroup_mma(weights, v_s.index(before).reshape([N, DV]), acc, is_async=True)
        if len(terms) > 0:
            if len(lists) > 0:
                x = gl.load(p_list + (HEADER + j)) * C[0]
            of_keys = key_terms(terms, n, head, x, y, z, key, key_grid, C, AXES)
        if len(bias_s) > 0:
            bias = bias_s[0].index(stage).reshape([N]).load(gl.SliceLayout(0, S))
        s = warpgroup_mma_wait(1, deps=(s_run,))
        mbarrier.arrive(k_free.index(stage), count=1)
        s = scored(s, squash, CAPPED)
        if len(bias_s) > 0:
            s += bias[None, :]
        if len(terms) > 0:
            s = add_terms(s, of_queries, of_keys[None, :], terms)
        if HIDES:
            if len(lists) > 0:
                if j < tested:
                    x = gl.load(p_list + (HEADER + j)) * C[0]
                    s = hide(s, x, y, z, low, width, lists, tile, own, C, AXES, W * M)
            elif whole(x, y, z, last_low, first_up, C, AXES) == 0:
                s = hide(s, x, y, z, low, width, lists, tile, own, C, AXES, W * M)
        m_old = m
        m = gl.maximum(m, gl.max(s, 1) * scale_log2)
        p = gl.exp2(s * scale_log2 - m[:, None])
        shrink = gl.exp2(m_old - m)
        l = l * shrink + gl.sum(p, 1)
        # The wait on a barrier that is past keeps ptxas from moving the softmax behind the product.
        mbarrier.wait(v_ready.index(before), before_phase)
        acc = warpgroup_mma_wait(0, deps=(acc_run,))
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, O_ROW)[:, None]
        weights = gl.convert_layout(p.to(q.dtype), P)
    if not one_buffer(D, DV):
        mbarrier.arrive(q_free.index(WHICH), count=1)
    stage = g % STAGES
    mbarrier.wait(v_ready.index(stage), (g // STAGES) & 1)
    acc = warpgroup_mma(weights, v_s.index(stage).reshape([N, DV]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_free.index(stage), count=1)
    g += 1
    if SKIPS:
        g = skip_boxes(g, (nx - stop) * ny * nz, (k_ready, v_ready), (k_free, v_free), STAGES)

    if len(lists) > 0:
        l = gl.where(listed > 0, l, 0.0)
        acc = gl.where(listed > 0, acc, 0.0)
    if p_sink is not None:
        sink = gl.load(p_sink + head).to(gl.float32) * LOG2E
        top = gl.maximum(m, sink)
        l = l * gl.exp2(m - top) + gl.exp2(sink - top)
        acc = acc * gl.convert_layout(gl.exp2(m - top), O_ROW)[:, None]
        m = top
    inverse = gl.where(l == 0.0, 0.0, 1.0 / l)
    o = acc * gl.convert_layout(inverse, O_ROW)[:, None]
    if len(split) == 0 or count == split[0]:
        store_rows(o_desc, n, x0, y0, z0, head, o, o_s.index(WHICH), AXES)
    if one_buffer(D, DV):
        store_wait(0)
        mbarrier.arrive(q_free.index(WHICH), count=1)
    lse = gl.where(l == 0.0, float("-inf"), (m + gl.log2(l)) * LN2)
    rx, ry, rz, inside = row_places(row, x0, y0, z0, X, Y, Z, R)
    token = (rx * Y + ry) * Z + rz
    plane = (n.to(gl.int64) * heads + head) * (X * Y * Z)
    gl.store(p_lse + plane + token, lse, mask=inside)
    if len(split) > 0 and count < split[0]:
        at = part_slot(turn, total, split) * W + WHICH
        store_part(parts[0], at, o)
        gl.store(parts[1] + at * M + row, lse)
    if p_spoilt is not None:
        # A row of sound scores that holds NaN may have met it as 0 x NaN at a hidden key.
        spoilt = gl.convert_layout((gl.sum(o * 0.0, 1) != 0.0).to(gl.int32), gl.SliceLayout(1, S))
        spoilt = gl.where(l == l, spoilt, 0)
        gl.store(p_spoilt + plane + token, spoilt.to(gl.int8), mask=inside)
        gl.store(p_flags + (t * W + WHICH), gl.max(spoilt, 0).to(gl.int8))
    return g


@gluon.jit
def attend_rows(
    WHICH: gl.constexpr, q_s, q_ready, q_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
    o_desc, o_s, p_lse, p_spoilt, p_flags, p_bounds, lists, scoring, bias_s, terms, key_grid, X, Y, Z,
    heads, groups, shared, total, scale_log2, parts, split,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """A consumer: its box of queries of every work item."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    S: gl.constexpr = product_layout(N)
    row = gl.arange(0, M, gl.SliceLayout(1, S))
    own = WHICH * M + row
    key = gl.arange(0, N, gl.SliceLayout(0, S))
    q = q_s.index(WHICH).reshape([M, q_s.shape[-1]])
    g = 0
    for turn in range(turns(total, split)):
        g = attend_item(
            WHICH, turn, g, q, row, own, key, q_ready, q_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
            o_desc, o_s, p_lse, p_spoilt, p_flags, p_bounds, lists, scoring, bias_s, terms, key_grid, X, Y, Z,
            heads, groups, shared, total, scale_log2, parts, split,
            W, R, C, AXES, STAGES, HIDES, SKIPS, CAPPED,
        )  # fmt: skip
    store_wait(0)


@gluon.jit
def load_keys(
    rows, row_s, row_ready, row_free, columns, column_s, column_ready, column_free,
    p_bounds, lists, X, Y, Z, heads, shared, total, groups, split, biases,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer, along lists or along boxes."""
    if len(lists) > 0:
        load_listed(
            rows, row_s, row_ready, row_free, columns, column_s, column_ready, column_free,
            lists, heads, shared, total, groups, biases, W, R, C, STAGES,
        )  # fmt: skip
    else:
        load_boxes(
            rows, row_s, row_ready, row_free, columns, column_s, (), (), column_ready, column_free,
            p_bounds, X, Y, Z, heads, shared, total, groups, 1, split, biases,
            W, R, C, AXES, STAGES,
        )  # fmt: skip


@gluon.jit
def tile_attend_forward(
    q_desc, k_desc, v_desc, o_desc, bias_desc, p_lse, p_spoilt, p_flags, p_bounds, lists, scoring, biasing,
    terms, X, Y, Z,
    heads, groups, shared, total, scale_log2, parts, split,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """o and lse [N, heads, X Y Z] of every work item; groups = query heads per key head.

    A single-axis pattern passes Y = Z = 1, with bounds [0, 1) on those axes.  `lists` as in
    hopper_lists, () for a walk along boxes; scoring is (sinks [heads] or None, `squash` of scored);
    terms as in hopper_scores; bias_desc: a number per key [lines, *grid] that is added to scores, or
    None, and biasing: its lines per batch entry, query heads per line;
    p_spoilt int8 like lse where pairs are hidden, else None: 1 where hopper_repair has to look, and
    p_flags int8 [items W]: whether a box of rows holds such a row.
    """
    q_s = gl.allocate_shared_memory(q_desc.dtype, [W] + q_desc.block_type.shape, q_desc.layout)
    if one_buffer(q_desc.block_type.shape[-1], v_desc.block_type.shape[-1]):
        o_s = q_s
    else:
        o_s = gl.allocate_shared_memory(q_desc.dtype, [W] + o_desc.block_type.shape, o_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    bias_s = ()
    biases = ()
    if bias_desc is not None:
        numbers = gl.allocate_shared_memory(
            gl.float32, [STAGES] + bias_desc.block_type.shape, bias_desc.layout
        )
        bias_s = (numbers,)
        biases = (bias_desc, numbers, biasing[0], biasing[1])
    q_ready = barriers(W, 1)
    q_free = barriers(W, 1)
    k_ready = barriers(STAGES, 1)
    v_ready = barriers(STAGES, 1)
    k_free = barriers(STAGES, W)
    v_free = barriers(STAGES, W)
    specialised(
        attend_rows,
        (
            q_s, q_ready, q_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
            o_desc, o_s, p_lse, p_spoilt, p_flags, p_bounds, lists, scoring, bias_s,
            terms, k_desc.shape, X, Y, Z,
            heads, groups, shared, total, scale_log2, parts, split,
            W, R, C, AXES, STAGES, HIDES, SKIPS, CAPPED,
        ),
        load_keys,
        (
            (q_desc,), (q_s,), (q_ready,), (q_free,), (k_desc, v_desc), (k_s, v_s),
            (k_ready, v_ready), (k_free, v_free), p_bounds, lists, X, Y, Z, heads, shared, total,
            groups, split, biases, W, R, C, AXES, STAGES,
        ),
        W,
    )  # fmt: skip


def launch_forward(
    pattern: Pattern,
    extent: Extent,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    walk: Walk | None = None,
    *,
    lists: WalkLists | None = None,
    soft_cap: float | None = None,
    sink: Tensor | None = None,
    term: LocalTerm | None = None,
) -> tuple[Tensor, Tensor]:
    """o [N, Lq, Hq, D] and lse [N, Hq, Lq] of q [N, Lq, Hq, D], k and v [N, Lk, Hkv, D].

    With `lists` only their tiles are visited, and `pattern` says what the tested ones hide.
    """
    batch, length, heads, head_dim = q.shape
    groups = heads // k.shape[2]
    largest_dim = max(head_dim, v.shape[-1])
    biased = term is not None and term.kind == PER_KEY
    if lists is not None:
        hides = not isinstance(pattern, Dense) or extent.Lk % lists.kv_tile > 0
        walk = walk or list_walk(lists.q_tile, lists.kv_tile, largest_dim, hides)
        pairs = pattern, extent, lists.q_tile, lists.kv_tile, q.device
        bounds, words = tested_pairs(*pairs)
        lengths, axes, listed = (extent.Lq, 1, 1), 1, (*list_arguments(lists), *words)
    else:
        # Biases take registers, which three consumers do not have.
        walk = walk or forward_walk(pattern, extent, max(largest_dim, 128 if biased else 0))
        lengths, axes, bounds = packed_bounds(pattern, extent, q.device, False)
        listed = ()
    if biased and listed == () and not isinstance(pattern, Dense):
        # Boxes start at multiples of four then, before what is seen.
        walk = dataclasses.replace(walk, hides=True)
    kv_grid = extent.kv_grid if axes > 1 else (extent.Lk,)
    o = q.new_empty(batch, length, heads, v.shape[-1])
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    # What a dense walk hides lies outside of k and v, where copies read zeros.
    hidden = walk.hides and not (listed == () and isinstance(pattern, Dense))
    spoilt = torch.empty_like(lse, dtype=torch.int8) if hidden else None
    grid = lengths[:axes]
    on_q = on_grid(q, grid), on_grid(k, kv_grid), on_grid(v, kv_grid), o.unflatten(1, grid)
    shared = shared_heads(heads, groups, k.shape[1], largest_dim)
    factor, squash = scale * LOG2E.value, 0.0
    if soft_cap is not None:
        factor, squash = soft_cap * LOG2E.value, 2.0 * scale / soft_cap * LOG2E.value
    biases = scaled_biases(term.values, kv_grid, LOG2E.value / factor) if biased else None
    # A descriptor has five axes at most: with three of them on the grid each entry is a launch.
    launches = [slice(None)] if axes < 3 else [slice(n, n + 1) for n in range(batch)]
    for part in launches:
        tensors = [x[part] for x in on_q]
        total, running = programs(walk, lengths, tensors[0])
        parts: tuple[Any, ...] = ()
        split: tuple[Any, ...] = ()
        if listed == () and sink is None and isinstance(pattern, Dense):
            split = split_boxes(walk, extent.Lk, total, q.device)
        if split:
            running = split[1]
            tile = 2 * running, walk.consumers * walk.rows[0]
            parts = (
                torch.empty(*tile, head_pad(v.shape[-1]), dtype=torch.float32, device=q.device),
                torch.empty(tile, dtype=torch.float32, device=q.device),
            )
        sides = (walk.rows, walk.columns, walk.columns, walk.rows)
        descriptors = [descriptor(x, box, axes) for x, box in zip(tensors, sides, strict=True)]
        scoring = (sink, squash)
        terms = () if term is None else (LOG2E.value / factor, *term_arguments(term, heads, part))
        marks = flags = None
        if spoilt is not None:
            marks, flags = spoilt[part], spoilt.new_empty(total * walk.consumers)
        bias_desc, biasing = None, ()
        if biases is not None:
            own = biases[part] if len(biases) > 1 else biases
            lines = own.shape[1]
            bias_desc = statistics_descriptor(own, walk.columns, kv_grid)
            biasing = (lines if len(own) > 1 else 0, heads // lines)
        sizes = (*lengths, heads, groups, shared)
        launch(
            tile_attend_forward,
            (running,),
            *descriptors,
            bias_desc,
            lse[part],
            marks,
            flags,
            bounds,
            listed,
            scoring,
            biasing,
            () if biases is not None else terms,
            *sizes,
            total,
            factor,
            parts,
            split,
            walk.consumers,
            walk.rows,
            walk.columns,
            axes,
            walk.stages,
            walk.hides,
            walk.skips,
            soft_cap is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
        if split:
            tokens = extent.Lq, heads, shared, total
            launch_merge(tile_attend_merge, (o, lse), parts, split, walk, tokens)
        if marks is not None:
            given = bounds, listed, squash, terms, sizes, factor
            launch_repair(walk, axes, flags, tensors, lse[part], marks, given, soft_cap is not None)
    return o, lse
