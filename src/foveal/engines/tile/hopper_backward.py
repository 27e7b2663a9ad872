# mypy: ignore-errors
"""Backward of the Hopper edition: dQ walks boxes of keys, dK and dV boxes of queries; no atomics.

With P = exp(S - lse) and dS = P (dP - delta), delta = sum(do o) - dlse:
dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.engines.tile.hopper_compat import store_wait
from foveal.engines.tile.hopper_forward import store_rows
from foveal.engines.tile.hopper_walk import (
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


@triton.jit
def tile_attend_backward_prepare(
    p_o, p_do, p_lse, p_dlse, p_lse2, p_delta, length, heads, do_n, do_l, do_h, dlse_n, dlse_l, dlse_h,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lse2 = lse / ln 2, +inf for rows that see nothing, and delta.  Both fp32 [N, Hq, Lq]."""
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
    own = row < length
    at = tl.program_id(1).to(tl.int64) * length + row
    p_own = p_dlse + n * dlse_n + head * dlse_h + row.to(tl.int64) * dlse_l
    delta = tl.sum(o * do, 1) - tl.load(p_own, mask=own, other=0.0)
    lse = tl.load(p_lse + at, mask=own, other=0.0)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
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
def box_tokens(x, y, z, i, X, Y, Z, B: gl.constexpr):
    """Raster index of each token of a box, and whether it lies on the grid."""
    x = x + i // (B[1] * B[2])
    y = y + i // B[2] % B[1]
    z = z + i % B[2]
    return (x * Y + y) * Z + z, (x < X) & (y < Y) & (z < Z)


@gluon.jit
def accumulate_dq(
    WHICH: gl.constexpr, q_s, do_s, q_ready, do_ready, q_free, do_free,
    k_s, v_s, k_ready, v_ready, k_free, v_free,
    dq_desc, p_lse2, p_delta, p_bounds, X, Y, Z, heads, shared, total, scale_log2, scale,
    R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr,
):  # fmt: skip
    """A consumer: dQ of its box of queries over the boxes of keys."""
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
    row = gl.arange(0, M, gl.SliceLayout(1, S))
    q = q_s.index(WHICH).reshape([M, D])
    do = do_s.index(WHICH).reshape([M, D])
    g = 0
    turn = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        n, head, x0, y0, z0 = place(t, X, Y, Z, heads, shared, R[0], R[1], R[2])
        bx, nx = reach(p_bounds, 0, X, x0, 2 * R[0], C[0])
        by, ny = reach(p_bounds, 2 * X, Y, y0, R[1], C[1])
        bz, nz = reach(p_bounds, 2 * X + 2 * Y, Z, z0, R[2], C[2])
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
        plane = (n.to(gl.int64) * heads + head) * (X * Y * Z)
        token, on_grid_ = box_tokens(x0, y0, z0, row, X, Y, Z, R)
        lse = gl.load(p_lse2 + plane + token, mask=on_grid_, other=float("inf"))
        delta = gl.load(p_delta + plane + token, mask=on_grid_, other=0.0)

        mbarrier.wait(q_ready.index(WHICH), turn & 1)
        mbarrier.wait(do_ready.index(WHICH), turn & 1)
        if SKIPS:
            g = skip_boxes(g, first * ny * nz, (k_ready, v_ready), (k_free, v_free), STAGES)
        dq = gl.zeros([M, D], gl.float32, O)
        stage = g % STAGES
        mbarrier.wait(k_ready.index(stage), (g // STAGES) & 1)
        k = k_s.index(stage).reshape([N, D])
        s_run = warpgroup_mma(
            q, k.permute((1, 0)), gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True
        )
        for j in range(count):
            stage = g % STAGES
            phase = (g // STAGES) & 1
            mbarrier.wait(v_ready.index(stage), phase)
            v = v_s.index(stage).reshape([N, D]).permute((1, 0))
            dp_run = warpgroup_mma(
                do, v, gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True
            )
            s = warpgroup_mma_wait(1, deps=(s_run,))
            p = gl.exp2(s * scale_log2 - lse[:, None])
            if HIDES:
                p = seen_only(p, x, y, z, low, width, last_low, first_up, C, AXES)
            # As in the forward: a barrier that is past keeps the exponentials before the wait.
            mbarrier.wait(v_ready.index(stage), phase)
            dp = warpgroup_mma_wait(0, deps=(dp_run,))
            mbarrier.arrive(v_free.index(stage), count=1)
            ds = gl.convert_layout((p * (dp - delta[:, None])).to(q_s.dtype), A)
            dq_run = warpgroup_mma(ds, k_s.index(stage).reshape([N, D]), dq, is_async=True)
            x, y, z = following(x, y, z, by, bz, y1, z1, C[0], C[1], C[2])
            # The last round repeats its own product instead of one that is not there.
            after = gl.minimum(g + 1, g + count - 1 - j)
            mbarrier.wait(k_ready.index(after % STAGES), (after // STAGES) & 1)
            k = k_s.index(after % STAGES).reshape([N, D])
            s_run = warpgroup_mma(
                q, k.permute((1, 0)), gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True
            )
            dq = warpgroup_mma_wait(1, deps=(dq_run,))
            if j < count - 1:
                mbarrier.arrive(k_free.index(stage), count=1)
            g += 1
        s = warpgroup_mma_wait(0, deps=(s_run,))
        mbarrier.arrive(k_free.index((g - 1) % STAGES), count=1)
        if SKIPS:
            g = skip_boxes(g, (nx - stop) * ny * nz, (k_ready, v_ready), (k_free, v_free), STAGES)
        store_rows(dq_desc, n, x0, y0, z0, head, dq * scale, q_s.index(WHICH), AXES)
        store_wait(0)
        mbarrier.arrive(q_free.index(WHICH), count=1)
        mbarrier.arrive(do_free.index(WHICH), count=1)
        turn += 1


@gluon.jit
def accumulate_dk_dv(
    WHICH: gl.constexpr, k_s, v_s, k_ready, v_ready, k_free, v_free,
    q_s, do_s, q_ready, do_ready, q_free, do_free,
    dk_desc, dv_desc, p_lse2, p_delta, p_bounds, X, Y, Z, QX, QY, QZ, heads, groups, shared, total,
    scale_log2, scale,
    R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr,
):  # fmt: skip
    """A consumer: dK and dV of its box of keys over the boxes of queries of all heads that share them.

    S and dP are computed transposed, so that P and dS feed the next products from registers.
    """
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
    row = gl.arange(0, M, gl.SliceLayout(1, S))
    column = gl.arange(0, N, gl.SliceLayout(0, S))
    k = k_s.index(WHICH).reshape([M, D])
    v = v_s.index(WHICH).reshape([M, D])
    g = 0
    turn = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        n, head, x0, y0, z0 = place(t, X, Y, Z, heads, shared, R[0], R[1], R[2])
        bx, nx = reach(p_bounds, 0, X, x0, 2 * R[0], C[0])
        by, ny = reach(p_bounds, 2 * X, Y, y0, R[1], C[1])
        bz, nz = reach(p_bounds, 2 * X + 2 * Y, Z, z0, R[2], C[2])
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
        dk = gl.zeros([M, D], gl.float32, O)
        dv = gl.zeros([M, D], gl.float32, O)
        mbarrier.wait(k_ready.index(WHICH), turn & 1)
        mbarrier.wait(v_ready.index(WHICH), turn & 1)
        for member in range(groups):
            x = bx + first * C[0]
            y = by
            z = bz
            plane = ((n * heads + head).to(gl.int64) * groups + member) * (QX * QY * QZ)
            if SKIPS:
                g = skip_boxes(g, first * ny * nz, (q_ready, do_ready), (q_free, do_free), STAGES)
            for j in range(count):
                stage = g % STAGES
                phase = (g // STAGES) & 1
                q = q_s.index(stage).reshape([N, D])
                do = do_s.index(stage).reshape([N, D])
                mbarrier.wait(q_ready.index(stage), phase)
                s_run = warpgroup_mma(
                    k,
                    q.permute((1, 0)),
                    gl.zeros([M, N], gl.float32, S),
                    use_acc=False,
                    is_async=True,
                )
                mbarrier.wait(do_ready.index(stage), phase)
                dp_run = warpgroup_mma(
                    v,
                    do.permute((1, 0)),
                    gl.zeros([M, N], gl.float32, S),
                    use_acc=False,
                    is_async=True,
                )
                token, on_grid_ = box_tokens(x, y, z, column, QX, QY, QZ, C)
                lse = gl.load(p_lse2 + plane + token, mask=on_grid_, other=float("inf"))
                delta = gl.load(p_delta + plane + token, mask=on_grid_, other=0.0)
                s = warpgroup_mma_wait(1, deps=(s_run,))
                p = gl.exp2(s * scale_log2 - lse[None, :])
                if HIDES:
                    p = seen_only(p, x, y, z, low, width, last_low, first_up, C, AXES)
                weights = gl.convert_layout(p.to(q_s.dtype), A)
                # As in the forward: a barrier that is past keeps the exponentials before the wait.
                mbarrier.wait(do_ready.index(stage), phase)
                dp = warpgroup_mma_wait(0, deps=(dp_run,))
                dv_run = warpgroup_mma(weights, do, dv, is_async=True)
                ds = gl.convert_layout((p * (dp - delta[None, :])).to(q_s.dtype), A)
                dk_run = warpgroup_mma(ds, q, dk, is_async=True)
                dv = warpgroup_mma_wait(1, deps=(dv_run,))
                mbarrier.arrive(do_free.index(stage), count=1)
                dk = warpgroup_mma_wait(0, deps=(dk_run,))
                mbarrier.arrive(q_free.index(stage), count=1)
                x, y, z = following(x, y, z, by, bz, y1, z1, C[0], C[1], C[2])
                g += 1
            if SKIPS:
                g = skip_boxes(
                    g, (nx - stop) * ny * nz, (q_ready, do_ready), (q_free, do_free), STAGES
                )
        store_rows(dk_desc, n, x0, y0, z0, head, dk * scale, k_s.index(WHICH), AXES)
        store_rows(dv_desc, n, x0, y0, z0, head, dv, v_s.index(WHICH), AXES)
        store_wait(0)
        mbarrier.arrive(k_free.index(WHICH), count=1)
        mbarrier.arrive(v_free.index(WHICH), count=1)
        turn += 1


@gluon.jit
def barriers(n: gl.constexpr, count: gl.constexpr):
    """n barriers that each wait for `count` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(bars.index(i), count)
    return bars


@gluon.jit
def tile_attend_backward_queries(
    q_desc, do_desc, k_desc, v_desc, dq_desc, p_lse2, p_delta, p_bounds, X, Y, Z, heads, groups,
    shared, total, scale_log2, scale, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr,
    STAGES: gl.constexpr, HIDES: gl.constexpr, SKIPS: gl.constexpr,
):  # fmt: skip
    """dQ.  Rows are queries, columns keys."""
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, do_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, v_desc.layout)
    q_ready = barriers(2, 1)
    do_ready = barriers(2, 1)
    q_free = barriers(2, 1)
    do_free = barriers(2, 1)
    k_ready = barriers(STAGES, 1)
    v_ready = barriers(STAGES, 1)
    k_free = barriers(STAGES, 2)
    v_free = barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (accumulate_dq, (
                0, q_s, do_s, q_ready, do_ready, q_free, do_free, k_s, v_s, k_ready, v_ready,
                k_free, v_free, dq_desc, p_lse2, p_delta, p_bounds, X, Y, Z, heads, shared, total,
                scale_log2, scale, R, C, AXES, STAGES, HIDES, SKIPS,
            )),
            (accumulate_dq, (
                1, q_s, do_s, q_ready, do_ready, q_free, do_free, k_s, v_s, k_ready, v_ready,
                k_free, v_free, dq_desc, p_lse2, p_delta, p_bounds, X, Y, Z, heads, shared, total,
                scale_log2, scale, R, C, AXES, STAGES, HIDES, SKIPS,
            )),
            (load_boxes, (
                (q_desc, do_desc), (q_s, do_s), (q_ready, do_ready), (q_free, do_free),
                (k_desc, v_desc), (k_s, v_s), (k_ready, v_ready), (k_free, v_free),
                p_bounds, X, Y, Z, heads, shared, total, groups, 1, R, C, AXES, STAGES,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit
def tile_attend_backward_keys(
    k_desc, v_desc, q_desc, do_desc, dk_desc, dv_desc, p_lse2, p_delta, p_bounds, X, Y, Z,
    QX, QY, QZ, heads, groups, shared, total, scale_log2, scale, R: gl.constexpr, C: gl.constexpr,
    AXES: gl.constexpr, STAGES: gl.constexpr, HIDES: gl.constexpr, SKIPS: gl.constexpr,
):  # fmt: skip
    """dK and dV.  Rows are keys, columns queries; heads counts key heads, groups queries per key head."""
    k_s = gl.allocate_shared_memory(k_desc.dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [2] + k_desc.block_type.shape, v_desc.layout)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_s = gl.allocate_shared_memory(
        q_desc.dtype, [STAGES] + q_desc.block_type.shape, do_desc.layout
    )
    k_ready = barriers(2, 1)
    v_ready = barriers(2, 1)
    k_free = barriers(2, 1)
    v_free = barriers(2, 1)
    q_ready = barriers(STAGES, 1)
    do_ready = barriers(STAGES, 1)
    q_free = barriers(STAGES, 2)
    do_free = barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (accumulate_dk_dv, (
                0, k_s, v_s, k_ready, v_ready, k_free, v_free, q_s, do_s, q_ready, do_ready,
                q_free, do_free, dk_desc, dv_desc, p_lse2, p_delta, p_bounds, X, Y, Z, QX, QY, QZ,
                heads, groups, shared, total, scale_log2, scale, R, C, AXES, STAGES, HIDES, SKIPS,
            )),
            (accumulate_dk_dv, (
                1, k_s, v_s, k_ready, v_ready, k_free, v_free, q_s, do_s, q_ready, do_ready,
                q_free, do_free, dk_desc, dv_desc, p_lse2, p_delta, p_bounds, X, Y, Z, QX, QY, QZ,
                heads, groups, shared, total, scale_log2, scale, R, C, AXES, STAGES, HIDES, SKIPS,
            )),
            (load_boxes, (
                (k_desc, v_desc), (k_s, v_s), (k_ready, v_ready), (k_free, v_free),
                (q_desc, do_desc), (q_s, do_s), (q_ready, do_ready), (q_free, do_free),
                p_bounds, X, Y, Z, heads, shared, total, 1, groups, R, C, AXES, STAGES,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
