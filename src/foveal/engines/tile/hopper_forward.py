# mypy: ignore-errors
"""Forward of the Hopper edition: one producer, two consumers of one box of queries each.

In a consumer the product Q K^T of the next box is in flight while P V of this one is; the softmax
of one consumer hides under the products of the other.
"""

from __future__ import annotations

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
from foveal.engines.tile.hopper_launch import descriptor, on_grid, packed_bounds, programs
from foveal.engines.tile.hopper_plan import Walk, forward_walk, shared_heads
from foveal.engines.tile.hopper_walk import (
    barriers,
    ends,
    following,
    load_boxes,
    place,
    reach,
    row_bounds,
    skip_boxes,
    visible,
    whole,
)
from foveal.patterns.base import Extent, Pattern

# The running maximum starts here, so that rows without a visible key so far stay finite.
FLOOR = gl.constexpr(-3.0e38)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def hide(s, x, y, z, low, width, last_low, first_up, C: gl.constexpr, AXES: gl.constexpr):
    """Scores of hidden pairs become -inf, in boxes that some row does not see whole."""
    if whole(x, y, z, last_low, first_up, C, AXES) == 0:
        LAYOUT: gl.constexpr = s.type.layout
        seen = visible(x, y, z, low, width, LAYOUT, C, AXES)
        s = gl.where(seen, s, float("-inf"))
    return s


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
def attend_rows(
    WHICH: gl.constexpr, q_s, q_ready, q_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
    o_desc, o_s, p_lse, p_bounds, X, Y, Z, heads, shared, total, scale_log2,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr,
):  # fmt: skip
    """A consumer: running softmax of its box of queries over the boxes of keys."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    D: gl.constexpr = q_s.shape[-1]
    S: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], instr_shape=[16, N, 16]
    )
    O: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], instr_shape=[16, D, 16]
    )
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O)
    row = gl.arange(0, M, gl.SliceLayout(1, S))
    q = q_s.index(WHICH).reshape([M, D])
    g = 0
    turn = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        n, head, x0, y0, z0 = place(t, X, Y, Z, heads, shared, W, R, True)
        bx, nx = reach(p_bounds, 0, X, x0, W * R[0], C[0], 1)
        by, ny = reach(p_bounds, 2 * X, Y, y0, R[1], C[1], 1)
        bz, nz = reach(p_bounds, 2 * X + 2 * Y, Z, z0, R[2], C[2], 1)
        y1 = by + ny * C[1]
        z1 = bz + nz * C[2]
        x0 += WHICH * R[0]
        x_low, x_last, x_first, x_up = ends(p_bounds, 0, X, x0, R[0])
        _, y_last, y_first, _ = ends(p_bounds, 2 * X, Y, y0, R[1])
        _, z_last, z_first, _ = ends(p_bounds, 2 * X + 2 * Y, Z, z0, R[2])
        last_low = (x_last, y_last, z_last)
        first_up = (x_first, y_first, z_first)
        lx, wx = row_bounds(p_bounds, 0, X, x0, row, R[1] * R[2], R[0])
        ly, wy = row_bounds(p_bounds, 2 * X, Y, y0, row, R[2], R[1])
        lz, wz = row_bounds(p_bounds, 2 * X + 2 * Y, Z, z0, row, 1, R[2])
        low = (lx, ly, lz)
        width = (wx, wy, wz)
        first = 0
        stop = nx
        if SKIPS:
            first = gl.minimum((x_low - bx) // C[0], nx - 1)
            stop = gl.maximum(gl.minimum(gl.cdiv(x_up - bx, C[0]), nx), first + 1)
        count = (stop - first) * ny * nz
        x = bx + first * C[0]
        y = by
        z = bz

        mbarrier.wait(q_ready.index(WHICH), turn & 1)
        if SKIPS:
            g = skip_boxes(g, first * ny * nz, (k_ready, v_ready), (k_free, v_free), STAGES)
        stage = g % STAGES
        mbarrier.wait(k_ready.index(stage), (g // STAGES) & 1)
        k = k_s.index(stage).reshape([N, D]).permute((1, 0))
        s = warpgroup_mma(q, k, gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(stage), count=1)
        if HIDES:
            s = hide(s, x, y, z, low, width, last_low, first_up, C, AXES)
        m = gl.maximum(gl.max(s, 1) * scale_log2, FLOOR)
        p = gl.exp2(s * scale_log2 - m[:, None])
        l = gl.sum(p, 1)
        weights = gl.convert_layout(p.to(q_s.dtype), P)
        acc = gl.zeros([M, D], gl.float32, O)
        for j in range(1, count):
            x, y, z = following(x, y, z, by, bz, y1, z1, C[0], C[1], C[2])
            before = g % STAGES
            before_phase = (g // STAGES) & 1
            g += 1
            stage = g % STAGES
            mbarrier.wait(k_ready.index(stage), (g // STAGES) & 1)
            k = k_s.index(stage).reshape([N, D]).permute((1, 0))
            s_run = warpgroup_mma(
                q, k, gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True
            )
            mbarrier.wait(v_ready.index(before), before_phase)
            acc_run = warpgroup_mma(weights, v_s.index(before).reshape([N, D]), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s_run,))
            mbarrier.arrive(k_free.index(stage), count=1)
            if HIDES:
                s = hide(s, x, y, z, low, width, last_low, first_up, C, AXES)
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
            weights = gl.convert_layout(p.to(q_s.dtype), P)
        mbarrier.arrive(q_free.index(WHICH), count=1)
        stage = g % STAGES
        mbarrier.wait(v_ready.index(stage), (g // STAGES) & 1)
        acc = warpgroup_mma(weights, v_s.index(stage).reshape([N, D]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_free.index(stage), count=1)
        g += 1
        if SKIPS:
            g = skip_boxes(g, (nx - stop) * ny * nz, (k_ready, v_ready), (k_free, v_free), STAGES)

        inverse = gl.where(l == 0.0, 0.0, 1.0 / l)
        o = acc * gl.convert_layout(inverse, O_ROW)[:, None]
        store_rows(o_desc, n, x0, y0, z0, head, o, o_s.index(WHICH), AXES)
        lse = gl.where(l == 0.0, float("-inf"), (m + gl.log2(l)) * LN2)
        rx = x0 + row // (R[1] * R[2])
        ry = y0 + row // R[2] % R[1]
        rz = z0 + row % R[2]
        token = (rx * Y + ry) * Z + rz
        plane = (n.to(gl.int64) * heads + head) * (X * Y * Z)
        gl.store(p_lse + plane + token, lse, mask=(rx < X) & (ry < Y) & (rz < Z))
        turn += 1
    store_wait(0)


@gluon.jit
def tile_attend_forward(
    q_desc, k_desc, v_desc, o_desc, p_lse, p_bounds, X, Y, Z, heads, groups, shared, total,
    scale_log2, W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr,
):  # fmt: skip
    """o and lse [N, heads, X Y Z] of every work item; groups = query heads per key head.

    A single-axis pattern passes Y = Z = 1, with bounds [0, 1) on those axes.
    """
    q_s = gl.allocate_shared_memory(q_desc.dtype, [W] + q_desc.block_type.shape, q_desc.layout)
    o_s = gl.allocate_shared_memory(q_desc.dtype, [W] + q_desc.block_type.shape, o_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_ready = barriers(W, 1)
    q_free = barriers(W, 1)
    k_ready = barriers(STAGES, 1)
    v_ready = barriers(STAGES, 1)
    k_free = barriers(STAGES, W)
    v_free = barriers(STAGES, W)
    if W == 2:
        gl.warp_specialize(
            [
                (attend_rows, (
                    0, q_s, q_ready, q_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
                    o_desc, o_s, p_lse, p_bounds, X, Y, Z, heads, shared, total, scale_log2,
                    W, R, C, AXES, STAGES, HIDES, SKIPS,
                )),
                (attend_rows, (
                    1, q_s, q_ready, q_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
                    o_desc, o_s, p_lse, p_bounds, X, Y, Z, heads, shared, total, scale_log2,
                    W, R, C, AXES, STAGES, HIDES, SKIPS,
                )),
                (load_boxes, (
                    (q_desc,), (q_s,), (q_ready,), (q_free,), (k_desc, v_desc), (k_s, v_s), (), (),
                    (k_ready, v_ready), (k_free, v_free), p_bounds, X, Y, Z, heads, shared, total,
                    groups, 1, W, R, C, AXES, STAGES,
                )),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (attend_rows, (
                    0, q_s, q_ready, q_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
                    o_desc, o_s, p_lse, p_bounds, X, Y, Z, heads, shared, total, scale_log2,
                    W, R, C, AXES, STAGES, HIDES, SKIPS,
                )),
                (attend_rows, (
                    1, q_s, q_ready, q_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
                    o_desc, o_s, p_lse, p_bounds, X, Y, Z, heads, shared, total, scale_log2,
                    W, R, C, AXES, STAGES, HIDES, SKIPS,
                )),
                (attend_rows, (
                    2, q_s, q_ready, q_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
                    o_desc, o_s, p_lse, p_bounds, X, Y, Z, heads, shared, total, scale_log2,
                    W, R, C, AXES, STAGES, HIDES, SKIPS,
                )),
                (load_boxes, (
                    (q_desc,), (q_s,), (q_ready,), (q_free,), (k_desc, v_desc), (k_s, v_s), (), (),
                    (k_ready, v_ready), (k_free, v_free), p_bounds, X, Y, Z, heads, shared, total,
                    groups, 1, W, R, C, AXES, STAGES,
                )),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip


def launch_forward(
    pattern: Pattern,
    extent: Extent,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    walk: Walk | None = None,
) -> tuple[Tensor, Tensor]:
    """o [N, Lq, Hq, D] and lse [N, Hq, Lq] of q [N, Lq, Hq, D], k and v [N, Lk, Hkv, D]."""
    batch, length, heads, head_dim = q.shape
    groups = heads // k.shape[2]
    walk = walk or forward_walk(pattern, extent, head_dim)
    lengths, axes, bounds = packed_bounds(pattern, extent, q.device, False)
    kv_grid = extent.kv_grid if axes > 1 else (extent.Lk,)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    grid = lengths[:axes]
    on_q = on_grid(q, grid), on_grid(k, kv_grid), on_grid(v, kv_grid), o.unflatten(1, grid)
    shared = shared_heads(heads, groups, k.shape[1], head_dim)
    # A descriptor has five axes at most: with three of them on the grid each entry is a launch.
    launches = [slice(None)] if axes < 3 else [slice(n, n + 1) for n in range(batch)]
    for part in launches:
        tensors = [x[part] for x in on_q]
        total, running = programs(walk, lengths, tensors[0])
        sides = (walk.rows, walk.columns, walk.columns, walk.rows)
        descriptors = [descriptor(x, box, axes) for x, box in zip(tensors, sides, strict=True)]
        tile_attend_forward[(running,)](
            *descriptors,
            lse[part],
            bounds,
            *lengths,
            heads,
            groups,
            shared,
            total,
            scale * 1.4426950408889634,
            walk.consumers,
            walk.rows,
            walk.columns,
            axes,
            walk.stages,
            walk.hides,
            walk.skips,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return o, lse
