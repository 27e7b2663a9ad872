# mypy: ignore-errors
"""Backward of the Hopper edition: dQ walks boxes of keys, dK and dV boxes of queries; no atomics.

With P = exp(S - lse) and dS = P (dP - delta), delta = sum(do o) - dlse:
dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.engines.tile.hopper_backward_joint import (
    tile_attend_backward_joint,
    tile_attend_backward_round,
)
from foveal.engines.tile.hopper_backward_repair import launch_repair
from foveal.engines.tile.hopper_compat import store_wait
from foveal.engines.tile.hopper_forward import row_places, store_rows
from foveal.engines.tile.hopper_launch import (
    bias_arguments,
    descriptor,
    head_pad,
    intervals,
    list_arguments,
    on_grid,
    programs,
    split_boxes,
    statistics_descriptor,
    sums_descriptor,
)
from foveal.engines.tile.hopper_merge import launch_merge, tile_attend_backward_merge
from foveal.engines.tile.hopper_plan import (
    JOINT_KEYS,
    JOINT_QUERIES,
    joint_list_walk,
    joint_pays,
    joint_walk,
    keys_walk,
    queries_walk,
    shared_heads,
)
from foveal.engines.tile.hopper_walk import (
    alone,
    barriers,
    boxes,
    following,
    load_boxes,
    numbered,
    own_boxes,
    place,
    seen_by_rows,
    seen_whole,
    skip_boxes,
    specialised,
    visible,
    whole,
)
from foveal.engines.tile.lists import WalkLists, in_tile_order
from foveal.engines.tile.replay import launch
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.dense import Dense


@triton.jit
def tile_attend_backward_prepare(
    p_o, p_do, p_lse, p_dlse, p_lse2, p_delta, p_sums, length, heads, last, pitch, plane,
    do_n, do_l, do_h, dlse_n, dlse_h, dlse_l,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lse2 = lse / ln 2, +inf for rows that see nothing, and delta, fp32 [N, Hq, plane]; clears p_sums.

    The last axis of the grid, `last` tokens long, takes `pitch` elements, so that boxes can be copied.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    column = tl.arange(0, HEAD_PAD)
    inside = (row < length)[:, None] & (column < HEAD_DIM)[None, :]
    token = row.to(tl.int64)[:, None]
    p_rows = p_o + ((n * length + token) * heads + head) * HEAD_DIM + column[None, :]
    o = tl.load(p_rows, mask=inside, other=0.0).to(tl.float32)
    p_rows = p_do + n * do_n + token * do_l + head * do_h + column[None, :]
    do = tl.load(p_rows, mask=inside, other=0.0).to(tl.float32)
    if p_sums is not None:
        at = (tl.program_id(1).to(tl.int64) * length + token) * HEAD_DIM + column[None, :]
        tl.store(p_sums + at, tl.zeros([ROWS, HEAD_PAD], tl.float32), mask=inside)
    own = row < length
    p_own = p_dlse + n * dlse_n + head * dlse_h + row.to(tl.int64) * dlse_l
    delta = tl.sum(o * do, 1) - tl.load(p_own, mask=own, other=0.0)
    lse = tl.load(p_lse + tl.program_id(1).to(tl.int64) * length + row, mask=own, other=0.0)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    at = tl.program_id(1).to(tl.int64) * plane + row // last * pitch + row % last
    tl.store(p_lse2 + at, lse2, mask=own)
    tl.store(p_delta + at, delta, mask=own)


@gluon.jit
def seen_only(p, x, y, z, low, width, last_low, first_up, C: gl.constexpr, AXES: gl.constexpr):
    """Weights of hidden pairs become 0, in boxes that some row does not see whole."""
    if whole(x, y, z, last_low, first_up, C, AXES) == 0:
        LAYOUT: gl.constexpr = p.type.layout
        p = gl.where(visible(x, y, z, low, width, LAYOUT, C, AXES), p, 0.0)
    return p


@gluon.jit
def not_finite(x, LAYOUT: gl.constexpr):
    """int8 1 for the rows of x that hold NaN or inf, else 0; in the order of rows of a layout."""
    found = (gl.sum(x * 0.0, 1) != 0.0).to(gl.int8)
    return gl.convert_layout(found, gl.SliceLayout(1, LAYOUT))


@gluon.jit
def accumulate_dq_item(
    WHICH: gl.constexpr, t, turn, g, q, do, row, q_s, do_s, q_ready, do_ready, q_free, do_free,
    k_s, v_s, k_ready, v_ready, k_free, v_free,
    dq_desc, p_lse2, p_delta, p_bounds, p_spoilt, X, Y, Z, y_pitch, z_pitch, plane,
    heads, shared, total, scale_log2, scale,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    SKIPS: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """A work item of a consumer.  Returns how many boxes of columns there were so far."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    D: gl.constexpr = q_s.shape[-1]
    S: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], instr_shape=[16, N, 16]
    )
    O: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], instr_shape=[16, D, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    n, head, x0, y0, z0 = place(t, X, Y, Z, heads, shared, W, R, True)
    starts, counts = boxes(p_bounds, X, Y, Z, x0, y0, z0, W, R, C, AXES, 1)
    bx, by, bz = starts
    nx, ny, nz = counts
    y1 = by + ny * C[1]
    z1 = bz + nz * C[2]
    x0 += WHICH * R[0]
    last_low, first_up = seen_whole(p_bounds, X, Y, Z, x0, y0, z0, R)
    low, width = seen_by_rows(p_bounds, X, Y, Z, x0, y0, z0, row, R)
    first = 0
    stop = nx
    if SKIPS:
        first, stop = own_boxes(p_bounds, X, x0, bx, nx, R, C)
    count = (stop - first) * ny * nz
    x = bx + first * C[0]
    y = by
    z = bz
    rx, ry, rz, own = row_places(row, x0, y0, z0, X, Y, Z, R)
    at = (n.to(gl.int64) * heads + head) * plane + ((rx * y_pitch + ry) * z_pitch + rz)
    lse = gl.load(p_lse2 + at, mask=own, other=float("inf"))
    delta = gl.load(p_delta + at, mask=own, other=0.0)

    mbarrier.wait(q_ready.index(WHICH), turn & 1)
    mbarrier.wait(do_ready.index(WHICH), turn & 1)
    if SKIPS:
        g = skip_boxes(g, first * ny * nz, (k_ready, v_ready), (k_free, v_free), STAGES)
    dq = gl.zeros([M, D], gl.float32, O)
    ds = gl.zeros([M, N], q_s.dtype, A)
    # dQ of a box is computed beside S and dP of the next one, and once more behind the last.
    before = g % STAGES
    for j in range(count):
        stage = g % STAGES
        phase = (g // STAGES) & 1
        k = k_s.index(stage).reshape([N, D]).permute((1, 0))
        v = v_s.index(stage).reshape([N, D]).permute((1, 0))
        none = gl.zeros([M, N], gl.float32, S)
        mbarrier.wait(k_ready.index(stage), phase)
        s_run = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(stage), phase)
        dp_run = warpgroup_mma(do, v, none, use_acc=False, is_async=True)
        dq_run = warpgroup_mma(ds, k_s.index(before).reshape([N, D]), dq, is_async=True)
        s = warpgroup_mma_wait(2, deps=(s_run,))
        p = gl.exp2(s * scale_log2 - lse[:, None])
        if HIDES:
            p = seen_only(p, x, y, z, low, width, last_low, first_up, C, AXES)
        # As in the forward: a barrier that is past keeps the exponentials before the wait.
        mbarrier.wait(v_ready.index(stage), phase)
        dp = warpgroup_mma_wait(1, deps=(dp_run,))
        mbarrier.arrive(v_free.index(stage), count=1)
        slope = p * (dp - delta[:, None])
        mbarrier.wait(k_ready.index(stage), phase)
        dq = warpgroup_mma_wait(0, deps=(dq_run,))
        mbarrier.arrive(k_free.index(before), count=1, pred=j > 0)
        ds = gl.convert_layout(slope.to(q_s.dtype), A)
        x, y, z = following(x, y, z, by, bz, y1, z1, C[0], C[1], C[2])
        before = stage
        g += 1
    dq = warpgroup_mma(ds, k_s.index(before).reshape([N, D]), dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    mbarrier.arrive(k_free.index(before), count=1)
    if SKIPS:
        g = skip_boxes(g, (nx - stop) * ny * nz, (k_ready, v_ready), (k_free, v_free), STAGES)
    if HIDES:
        at = (n.to(gl.int64) * heads + head) * (X * Y * Z) + ((rx * Y + ry) * Z + rz)
        gl.store(p_spoilt + at, not_finite(dq, S), mask=own)
    store_rows(dq_desc, n, x0, y0, z0, head, dq * scale, q_s.index(WHICH), AXES)
    store_wait(0)
    mbarrier.arrive(q_free.index(WHICH), count=1)
    mbarrier.arrive(do_free.index(WHICH), count=1)
    return g


@gluon.jit
def accumulate_dq(
    WHICH: gl.constexpr, q_s, do_s, q_ready, do_ready, q_free, do_free,
    k_s, v_s, k_ready, v_ready, k_free, v_free,
    dq_desc, p_lse2, p_delta, p_bounds, p_spoilt, X, Y, Z, y_pitch, z_pitch, plane,
    heads, shared, total, scale_log2, scale,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    SKIPS: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """A consumer: dQ of its box of queries over the boxes of keys."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    S: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], instr_shape=[16, N, 16]
    )
    row = gl.arange(0, M, gl.SliceLayout(1, S))
    q = q_s.index(WHICH).reshape([M, q_s.shape[-1]])
    do = do_s.index(WHICH).reshape([M, do_s.shape[-1]])
    g = 0
    turn = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        g = accumulate_dq_item(
            WHICH, t, turn, g, q, do, row, q_s, do_s, q_ready, do_ready, q_free, do_free, k_s,
            v_s, k_ready, v_ready, k_free, v_free, dq_desc, p_lse2, p_delta, p_bounds, p_spoilt,
            X, Y, Z, y_pitch, z_pitch, plane, heads, shared, total, scale_log2, scale, W, R, C,
            AXES, STAGES, SKIPS, HIDES,
        )  # fmt: skip
        turn += 1


@gluon.jit
def accumulate_dk_dv_item(
    WHICH: gl.constexpr, t, turn, g, k, v, row, k_s, v_s, k_ready, v_ready, k_free, v_free,
    q_s, do_s, lse_s, delta_s, q_ready, do_ready, q_free, do_free,
    dk_desc, dv_desc, p_bounds, p_spoilt, X, Y, Z, heads, groups, shared, total, scale_log2, scale,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    SKIPS: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """A work item of a consumer.  Returns how many boxes of columns there were so far."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    D: gl.constexpr = q_s.shape[-1]
    S: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], instr_shape=[16, N, 16]
    )
    O: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], instr_shape=[16, D, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    n, head, x0, y0, z0 = place(t, X, Y, Z, heads, shared, W, R, False)
    starts, counts = boxes(p_bounds, X, Y, Z, x0, y0, z0, W, R, C, AXES, 4)
    bx, by, bz = starts
    nx, ny, nz = counts
    y1 = by + ny * C[1]
    z1 = bz + nz * C[2]
    x0 += WHICH * R[0]
    last_low, first_up = seen_whole(p_bounds, X, Y, Z, x0, y0, z0, R)
    low, width = seen_by_rows(p_bounds, X, Y, Z, x0, y0, z0, row, R)
    first = 0
    stop = nx
    if SKIPS:
        first, stop = own_boxes(p_bounds, X, x0, bx, nx, R, C)
    count = (stop - first) * ny * nz
    dk = gl.zeros([M, D], gl.float32, O)
    dv = gl.zeros([M, D], gl.float32, O)
    mbarrier.wait(k_ready.index(WHICH), turn & 1)
    mbarrier.wait(v_ready.index(WHICH), turn & 1)
    for member in range(groups):
        x = bx + first * C[0]
        y = by
        z = bz
        if SKIPS:
            g = skip_boxes(g, first * ny * nz, (q_ready, do_ready), (q_free, do_free), STAGES)
        for j in range(count):
            stage = g % STAGES
            phase = (g // STAGES) & 1
            q = q_s.index(stage).reshape([N, D])
            do = do_s.index(stage).reshape([N, D])
            none = gl.zeros([M, N], gl.float32, S)
            mbarrier.wait(q_ready.index(stage), phase)
            s_run = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(do_ready.index(stage), phase)
            dp_run = warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
            lse = lse_s.index(stage).reshape([N]).load(gl.SliceLayout(0, S))
            s = warpgroup_mma_wait(1, deps=(s_run,))
            p = gl.exp2(s * scale_log2 - lse[None, :])
            if HIDES:
                p = seen_only(p, x, y, z, low, width, last_low, first_up, C, AXES)
            weights = gl.convert_layout(p.to(q_s.dtype), A)
            # As in the forward: a barrier that is past keeps the exponentials before the wait.
            mbarrier.wait(do_ready.index(stage), phase)
            dp = warpgroup_mma_wait(0, deps=(dp_run,))
            dv_run = warpgroup_mma(weights, do, dv, is_async=True)
            delta = delta_s.index(stage).reshape([N]).load(gl.SliceLayout(0, S))
            ds = gl.convert_layout((p * (dp - delta[None, :])).to(q_s.dtype), A)
            dk_run = warpgroup_mma(ds, q, dk, is_async=True)
            dv = warpgroup_mma_wait(1, deps=(dv_run,))
            mbarrier.arrive(do_free.index(stage), count=1)
            dk = warpgroup_mma_wait(0, deps=(dk_run,))
            mbarrier.arrive(q_free.index(stage), count=1)
            x, y, z = following(x, y, z, by, bz, y1, z1, C[0], C[1], C[2])
            g += 1
        if SKIPS:
            g = skip_boxes(g, (nx - stop) * ny * nz, (q_ready, do_ready), (q_free, do_free), STAGES)
    if HIDES:
        rx, ry, rz, inside = row_places(row, x0, y0, z0, X, Y, Z, R)
        at = (n.to(gl.int64) * heads + head) * (X * Y * Z) + ((rx * Y + ry) * Z + rz)
        gl.store(p_spoilt + at, not_finite(dk, S) | not_finite(dv, S), mask=inside)
    store_rows(dk_desc, n, x0, y0, z0, head, dk * scale, k_s.index(WHICH), AXES)
    store_rows(dv_desc, n, x0, y0, z0, head, dv, v_s.index(WHICH), AXES)
    store_wait(0)
    mbarrier.arrive(k_free.index(WHICH), count=1)
    mbarrier.arrive(v_free.index(WHICH), count=1)
    return g


@gluon.jit
def accumulate_dk_dv(
    WHICH: gl.constexpr, k_s, v_s, k_ready, v_ready, k_free, v_free,
    q_s, do_s, lse_s, delta_s, q_ready, do_ready, q_free, do_free,
    dk_desc, dv_desc, p_bounds, p_spoilt, X, Y, Z, heads, groups, shared, total, scale_log2, scale,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    SKIPS: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """A consumer: dK and dV of its box of keys over the boxes of queries of all heads that share them.

    S and dP are computed transposed, so that P and dS feed the next products from registers.
    """
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    S: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], instr_shape=[16, N, 16]
    )
    row = gl.arange(0, M, gl.SliceLayout(1, S))
    k = k_s.index(WHICH).reshape([M, k_s.shape[-1]])
    v = v_s.index(WHICH).reshape([M, v_s.shape[-1]])
    g = 0
    turn = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        g = accumulate_dk_dv_item(
            WHICH, t, turn, g, k, v, row, k_s, v_s, k_ready, v_ready, k_free, v_free, q_s, do_s,
            lse_s, delta_s, q_ready, do_ready, q_free, do_free, dk_desc, dv_desc, p_bounds,
            p_spoilt, X, Y, Z, heads, groups, shared, total, scale_log2, scale, W, R, C, AXES,
            STAGES, SKIPS, HIDES,
        )  # fmt: skip
        turn += 1


@gluon.jit
def tile_attend_backward_queries(
    q_desc, do_desc, k_desc, v_desc, dq_desc, p_lse2, p_delta, p_bounds, p_spoilt, X, Y, Z,
    y_pitch, z_pitch, plane, heads, groups, shared, total, scale_log2, scale,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    SKIPS: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """dQ.  Rows are queries, columns keys."""
    q_s = gl.allocate_shared_memory(q_desc.dtype, [W] + q_desc.block_type.shape, q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [W] + q_desc.block_type.shape, do_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_ready = barriers(W, 1)
    do_ready = barriers(W, 1)
    q_free = barriers(W, 1)
    do_free = barriers(W, 1)
    k_ready = barriers(STAGES, 1)
    v_ready = barriers(STAGES, 1)
    k_free = barriers(STAGES, W)
    v_free = barriers(STAGES, W)
    specialised(
        accumulate_dq,
        (
            q_s, do_s, q_ready, do_ready, q_free, do_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
            dq_desc, p_lse2, p_delta, p_bounds, p_spoilt, X, Y, Z, y_pitch, z_pitch, plane,
            heads, shared, total, scale_log2, scale, W, R, C, AXES, STAGES, SKIPS, HIDES,
        ),
        load_boxes,
        (
            (q_desc, do_desc), (q_s, do_s), (q_ready, do_ready), (q_free, do_free),
            (k_desc, v_desc), (k_s, v_s), (), (), (k_ready, v_ready), (k_free, v_free),
            p_bounds, X, Y, Z, heads, shared, total, groups, 1, (), (), W, R, C, AXES, STAGES,
        ),
        W,
    )  # fmt: skip


@gluon.jit
def specialised_for_keys(
    consumer: gl.constexpr, consumed, producer: gl.constexpr, produced, W: gl.constexpr
):
    """As `specialised`, with all registers for two consumers, which hold two accumulators."""
    if W == 2:
        gl.warp_specialize(
            [
                (numbered, (0, consumer, consumed)),
                (numbered, (1, consumer, consumed)),
                (alone, (producer, produced)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        specialised(consumer, consumed, producer, produced, W)


@gluon.jit
def tile_attend_backward_keys(
    k_desc, v_desc, q_desc, do_desc, lse_desc, delta_desc, dk_desc, dv_desc, p_bounds, p_spoilt, X, Y, Z,
    heads, groups, shared, total, scale_log2, scale,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    SKIPS: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """dK and dV.  Rows are keys, columns queries; heads counts key heads, groups queries per key head."""
    k_s = gl.allocate_shared_memory(k_desc.dtype, [W] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [W] + k_desc.block_type.shape, v_desc.layout)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_s = gl.allocate_shared_memory(
        q_desc.dtype, [STAGES] + q_desc.block_type.shape, do_desc.layout
    )
    lse_s = gl.allocate_shared_memory(
        gl.float32, [STAGES] + lse_desc.block_type.shape, lse_desc.layout
    )
    delta_s = gl.allocate_shared_memory(
        gl.float32, [STAGES] + lse_desc.block_type.shape, lse_desc.layout
    )
    k_ready = barriers(W, 1)
    v_ready = barriers(W, 1)
    k_free = barriers(W, 1)
    v_free = barriers(W, 1)
    q_ready = barriers(STAGES, 1)
    do_ready = barriers(STAGES, 1)
    q_free = barriers(STAGES, W)
    do_free = barriers(STAGES, W)
    specialised_for_keys(
        accumulate_dk_dv,
        (
            k_s, v_s, k_ready, v_ready, k_free, v_free, q_s, do_s, lse_s, delta_s, q_ready,
            do_ready, q_free, do_free, dk_desc, dv_desc, p_bounds, p_spoilt, X, Y, Z, heads, groups,
            shared, total, scale_log2, scale, W, R, C, AXES, STAGES, SKIPS, HIDES,
        ),
        load_boxes,
        (
            (k_desc, v_desc), (k_s, v_s), (k_ready, v_ready), (k_free, v_free),
            (q_desc, do_desc), (q_s, do_s), (lse_desc, delta_desc), (lse_s, delta_s),
            (q_ready, do_ready), (q_free, do_free),
            p_bounds, X, Y, Z, heads, shared, total, 1, groups, (), (), W, R, C, AXES, STAGES,
        ),
        W,
    )  # fmt: skip


Lists = tuple[WalkLists, WalkLists]
_Grads = tuple[Tensor, Tensor, Tensor]
# Rows of dQ, and of dK or dV, that are not finite: int8 [N, H, tokens].
_Marks = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Sides:
    """What all kernels of one backward read; q, do, k, v on their grids [N, *grid, H, D]."""

    q: Tensor
    do: Tensor
    k: Tensor
    v: Tensor
    lse2: Tensor
    delta: Tensor
    lengths: tuple[int, int, int]
    kv_lengths: tuple[int, int, int]
    bounds: Tensor
    kv_bounds: Tensor
    axes: int
    scale: float

    @property
    def grid(self) -> tuple[int, ...]:
        return self.lengths[: self.axes]

    @property
    def scales(self) -> tuple[float, float]:
        return self.scale * 1.4426950408889634, self.scale

    @property
    def launches(self) -> list[slice]:
        """Batch entries of each launch: a descriptor has five axes at most."""
        batch = len(self.q)
        return [slice(None)] if self.axes < 3 else [slice(n, n + 1) for n in range(batch)]


@dataclass(frozen=True)
class _Listed:
    """Lists of queries and of keys, and second intervals of each, () where one is enough."""

    of_queries: WalkLists
    of_keys: WalkLists
    second: tuple[Tensor, ...]
    kv_second: tuple[Tensor, ...]


def launch_backward(
    pattern: Pattern,
    extent: Extent,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
    *,
    lists: Lists | None = None,
    biases: Tensor | None = None,
    repeatable: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of q, k, v; o and lse as launch_forward gave them.

    repeatable: bit by bit, by two kernels; by default where torch.use_deterministic_algorithms asks for
    it or one kernel does not pay (`joint_pays`).  One kernel adds to dQ in fp32, in 4 N Hq Lq D bytes
    more and in an order that changes.
    With `lists` of queries and of keys, of tiles of JOINT_QUERIES x JOINT_KEYS, only their tiles are
    visited, and `pattern` says what the tested ones hide.  `biases` [N or 1, heads, Lk] are added to the
    scores per key.  The two kernels know neither.
    """
    if lists is not None:
        extent = extent.flat()
    if repeatable is None:
        repeatable = torch.are_deterministic_algorithms_enabled() or (
            lists is None and not joint_pays(pattern, extent, q.shape[3])
        )
    plain = lists is None and biases is None
    assert plain or not repeatable, "the two kernels walk boxes only, and add no biases"
    (lengths, axes, bounds), second = intervals(pattern, extent, q.device, False)
    (kv_lengths, _, kv_bounds), kv_second = intervals(pattern, extent, q.device, True)
    grid, kv_grid = lengths[:axes], kv_lengths[:axes]
    do = on_grid(do, grid)
    sums = None
    if not repeatable:
        sums = torch.empty(
            len(q), q.shape[2], *grid, q.shape[3], dtype=torch.float32, device=q.device
        )
    lse2, delta = _prepare(o, do.flatten(1, -3), lse, dlse, sums, grid)
    q, k, v = on_grid(q, grid), on_grid(k, kv_grid), on_grid(v, kv_grid)
    sides = _Sides(q, do, k, v, lse2, delta, lengths, kv_lengths, bounds, kv_bounds, axes, scale)
    walked = None if lists is None else _Listed(*lists, second, kv_second)
    added = () if biases is None else bias_arguments(biases, q.shape[-2])
    if sums is None:
        grads, marks = _two_kernels(sides, pattern, extent)
    else:
        grads, marks = _one_kernel(sides, pattern, extent, sums, walked, added)
    if marks is not None:
        _repair(sides, grads, marks, walked, added)
    dq, dk, dv = (x.flatten(1, -3) for x in grads)
    return dq, dk, dv


def _outputs(sides: _Sides, hides: bool) -> tuple[_Grads, _Marks | None]:
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (sides.q, sides.k, sides.v)
    )
    if not hides:
        return (dq, dk, dv), None
    marks = [
        torch.empty(len(x), x.shape[-2], math.prod(grid), dtype=torch.int8, device=x.device)
        for x, grid in ((dq, sides.lengths), (dk, sides.kv_lengths))
    ]
    return (dq, dk, dv), (marks[0], marks[1])


def _one_kernel(
    sides: _Sides,
    pattern: Pattern,
    extent: Extent,
    sums: Tensor,
    lists: _Listed | None,
    biases: tuple[Any, ...],
) -> tuple[_Grads, _Marks | None]:
    q, k, axes = sides.q, sides.k, sides.axes
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    groups = heads // kv_heads
    batch, length = len(q), math.prod(sides.lengths)
    # A partition of its own for dQ needs the registers that accumulators of 128 columns take.
    apart = head_dim <= 64
    of_keys: tuple[Any, ...] = ()
    if lists is None:
        walk = joint_walk(pattern, extent, head_dim, biased=len(biases) > 0)
    else:
        # Heads of a group meet the same keys only where their lists are in the same order.
        same_order = lists.of_keys.heads_per_list % groups == 0
        by_key = lists.of_keys if same_order else in_tile_order(lists.of_keys)
        of_keys = (*list_arguments(by_key), *lists.kv_second)
        hides = not isinstance(pattern, Dense) or length % JOINT_QUERIES > 0
        walk = joint_list_walk(hides, head_dim)
    (dq, dk, dv), marks = _outputs(sides, walk.hides)
    for part in sides.launches:
        items, running = programs(walk, sides.kv_lengths, k[part])
        rounds: list[tuple[int, int, tuple[Tensor, ...], tuple[int, ...]]] = [
            (running, items, (), ())
        ]
        split: tuple[int, ...] = ()
        if lists is None and isinstance(pattern, Dense) and not walk.hides:
            split = split_boxes(walk, length, items, q.device)
        if split:
            sharing, rest = split[1], items % split[1]
            tile = 2 * sharing, walk.consumers * walk.rows[0], head_pad(head_dim)
            parts = (sums.new_empty(tile), sums.new_empty(tile))
            whole = items - rest
            rounds = [(sharing, items, parts, split)]
            if not walk.persistent:
                rounds = [(whole, whole, (), ()), (sharing, rest, parts, (*split[:2], whole))]
        shared = shared_heads(kv_heads, 1, length * groups, head_dim, walk.even)
        statistics = sides.lse2, sides.delta
        descriptors = [
            *(descriptor(x[part], walk.rows, axes) for x in (k, sides.v)),
            *(descriptor(x[part], walk.columns, axes) for x in (q, sides.do)),
            *(statistics_descriptor(x[part], walk.columns, sides.grid) for x in statistics),
            *(descriptor(x[part], walk.rows, axes) for x in (dk, dv)),
            sums_descriptor(sums[part], walk.columns, apart),
        ]
        # Of three axes each launch has one entry of the batch.
        entry = part.start or 0
        added = (biases[0][entry:], *biases[1:]) if biases and biases[1] else biases
        for running, count, parts, cut in rounds:
            if running == 0:
                continue
            launch(
                tile_attend_backward_joint,
                (running,),
                *descriptors,
                sides.kv_bounds,
                None if marks is None else marks[1][part],
                of_keys,
                *sides.kv_lengths,
                kv_heads,
                groups,
                shared,
                count,
                *sides.scales,
                parts,
                cut,
                added,
                walk.consumers,
                walk.rows,
                walk.columns,
                axes,
                walk.stages,
                walk.hides,
                apart,
                num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
        if split:
            sizes = math.prod(sides.kv_lengths), kv_heads, shared, items
            launch_merge(tile_attend_backward_merge, (dk, dv), parts, split, walk, sizes)
    rows = 64
    launch(
        tile_attend_backward_round, (triton.cdiv(length, rows), batch * heads),
        sums, dq, None if marks is None else marks[0], sides.scale, length, heads,
        HEAD_DIM=head_dim, HEAD_PAD=triton.next_power_of_2(head_dim), ROWS=rows,
    )  # fmt: skip
    return (dq, dk, dv), marks


def _two_kernels(sides: _Sides, pattern: Pattern, extent: Extent) -> tuple[_Grads, _Marks | None]:
    q, do, k, v, axes = sides.q, sides.do, sides.k, sides.v, sides.axes
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    groups = heads // kv_heads
    length, kv_length = math.prod(sides.lengths), math.prod(sides.kv_lengths)
    statistics = sides.lse2, sides.delta
    of_queries = queries_walk(pattern, extent, head_dim)
    of_keys = keys_walk(pattern, extent, head_dim)
    (dq, dk, dv), marks = _outputs(sides, of_queries.hides or of_keys.hides)
    pitches = [
        sides.lse2.shape[3] if axes == 2 else sides.lengths[1],
        sides.lse2.shape[4] if axes == 3 else 1,
    ]
    for part in sides.launches:
        walk = of_keys
        items, running = programs(walk, sides.kv_lengths, k[part])
        launch(
            tile_attend_backward_keys,
            (running,),
            *(descriptor(x[part], walk.rows, axes) for x in (k, v)),
            *(descriptor(x[part], walk.columns, axes) for x in (q, do)),
            *(statistics_descriptor(x[part], walk.columns, sides.grid) for x in statistics),
            *(descriptor(x[part], walk.rows, axes) for x in (dk, dv)),
            sides.kv_bounds,
            None if marks is None else marks[1][part],
            *sides.kv_lengths,
            kv_heads,
            groups,
            shared_heads(kv_heads, 1, length * groups, head_dim),
            items,
            *sides.scales,
            walk.consumers,
            walk.rows,
            walk.columns,
            axes,
            walk.stages,
            walk.skips,
            marks is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
        walk = of_queries
        items, running = programs(walk, sides.lengths, q[part])
        launch(
            tile_attend_backward_queries,
            (running,),
            *(descriptor(x[part], walk.rows, axes) for x in (q, do)),
            *(descriptor(x[part], walk.columns, axes) for x in (k, v)),
            descriptor(dq[part], walk.rows, axes),
            *(x[part] for x in statistics),
            sides.bounds,
            None if marks is None else marks[0][part],
            *sides.lengths,
            *pitches,
            sides.lse2[0, 0].numel(),
            heads,
            groups,
            shared_heads(heads, groups, kv_length, head_dim),
            items,
            *sides.scales,
            walk.consumers,
            walk.rows,
            walk.columns,
            axes,
            walk.stages,
            walk.skips,
            marks is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return (dq, dk, dv), marks


def _repair(
    sides: _Sides,
    grads: _Grads,
    marks: _Marks,
    lists: _Listed | None,
    biases: tuple[Any, ...] = (),
) -> None:
    """Computes marked rows again from visible pairs alone."""
    dq, dk, dv = (x.flatten(1, -3) for x in grads)
    q, do, k, v = (x.flatten(1, -3) for x in (sides.q, sides.do, sides.k, sides.v))
    fold = sides.grid[-1], sides.lse2.shape[-1], sides.lse2[0, 0].numel()
    statistics = sides.lse2, sides.delta
    queries = sides.bounds, sides.lengths, sides.kv_lengths, fold, sides.scales
    keys = sides.kv_bounds, sides.kv_lengths, sides.lengths, fold, sides.scales
    if lists is None:
        launch_repair(marks[0], (q, do), (k, v), statistics, (dq,), *queries, biases=biases)
        launch_repair(marks[1], (k, v), (q, do), statistics, (dk, dv), *keys, biases=biases)
        return
    by_query = (*list_arguments(lists.of_queries), *lists.second), JOINT_QUERIES, JOINT_KEYS
    by_key = (*list_arguments(lists.of_keys), *lists.kv_second), JOINT_KEYS, JOINT_QUERIES
    launch_repair(marks[0], (q, do), (k, v), statistics, (dq,), *queries, *by_query, biases=biases)
    launch_repair(marks[1], (k, v), (q, do), statistics, (dk, dv), *keys, *by_key, biases=biases)


def _prepare(
    o: Tensor,
    do: Tensor,
    lse: Tensor,
    dlse: Tensor,
    sums: Tensor | None,
    grid: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """lse2 and delta [N, Hq, *grid], the last axis padded to whole groups of four; clears sums."""
    batch, length, heads, head_dim = o.shape
    pitch = -(-grid[-1] // 4) * 4
    shape = (batch, heads, *grid[:-1], pitch)
    lse2, delta = (torch.empty(shape, dtype=torch.float32, device=o.device) for _ in range(2))
    rows = 64
    launch(
        tile_attend_backward_prepare, (triton.cdiv(length, rows), batch * heads),
        o, do, lse, dlse, lse2, delta, sums, length, heads, grid[-1], pitch, lse2[0, 0].numel(),
        *do.stride()[:3], *dlse.stride(),
        HEAD_DIM=head_dim, HEAD_PAD=triton.next_power_of_2(head_dim), ROWS=rows,
        enable_fp_fusion=True,
    )  # fmt: skip
    return lse2, delta
