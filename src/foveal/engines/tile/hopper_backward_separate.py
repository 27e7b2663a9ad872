# mypy: ignore-errors
"""Backward of the Hopper edition in two kernels: dQ walks boxes of keys, dK and dV boxes of queries.

No atomics: the same bits in every run.  With P = exp(S - lse) and dS = P (dP - delta):
dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.engines.tile.hopper_compat import store_wait
from foveal.engines.tile.hopper_forward import row_places, store_rows
from foveal.engines.tile.hopper_walk import (
    alone,
    barriers,
    boxes,
    following,
    load_boxes,
    numbered,
    own_boxes,
    place,
    product_layout,
    seen_by_rows,
    seen_whole,
    skip_boxes,
    specialised,
    visible,
    whole,
)


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
    S: gl.constexpr = product_layout(N)
    O: gl.constexpr = product_layout(D)
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
    S: gl.constexpr = product_layout(N)
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
    S: gl.constexpr = product_layout(N)
    O: gl.constexpr = product_layout(D)
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
    S: gl.constexpr = product_layout(N)
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
