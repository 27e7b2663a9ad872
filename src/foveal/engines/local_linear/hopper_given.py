# mypy: ignore-errors
"""The forward with a given r in one pass over the keys, on Hopper.

With t = r.k, and c near its mean, the sums of p, p t, p v and p (t - c) v give
o = (1 + mean(t) - c) mean(v) - mean((t - c) v).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.engines.local_linear.hopper_pass import find_boxes, hide, note_odd, scores
from foveal.engines.tile.hopper_walk import (
    barriers,
    following,
    load_boxes,
    product_layout,
    skip_boxes,
    specialised,
)

# Below every score.
FLOOR = gl.constexpr(-3.0e38)


@gluon.jit
def given_rows(
    WHICH: gl.constexpr, q_s, r_s, q_ready, r_ready, q_free, r_free,
    k_s, v_s, k_ready, v_ready, k_free, v_free,
    p_lse, p_o, o_strides, p_bad, p_bounds, X, Y, Z, heads, groups, shared, total, unit,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """A consumer of `local_linear_given`."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    PAD: gl.constexpr = q_s.shape[-1]
    V_PAD: gl.constexpr = v_s.shape[-1]
    S: gl.constexpr = product_layout(N)
    O: gl.constexpr = product_layout(V_PAD)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O)
    row = gl.arange(0, M, ROW)
    q = q_s.index(WHICH).reshape([M, PAD])
    r = r_s.index(WHICH).reshape([M, PAD])
    g = 0
    for t_item in range(gl.program_id(0), total, gl.num_programs(0)):
        n, head, token, inside, seen, here, ends, walk = find_boxes(
            t_item, p_bounds, X, Y, Z, heads, shared, row, WHICH, W, R, C, AXES, SKIPS
        )
        x, y, z = here
        count, before, behind = walk
        mbarrier.wait(q_ready.index(WHICH), 0)
        mbarrier.wait(r_ready.index(WHICH), 0)
        if SKIPS:
            g = skip_boxes(g, before, (k_ready, v_ready), (k_free, v_free), STAGES)
        m = gl.full([M], FLOOR, gl.float32, ROW)
        l = gl.zeros([M], gl.float32, ROW)
        along = gl.zeros([M], gl.float32, ROW)
        centre = gl.zeros([M], gl.float32, ROW)
        value = gl.zeros([M, V_PAD], gl.float32, O)
        cross = gl.zeros([M, V_PAD], gl.float32, O)
        for j in range(count):
            stage = g % STAGES
            phase = (g // STAGES) & 1
            s, t = scores(q, r, k_s, k_ready, stage, phase, N, S)
            s, t = warpgroup_mma_wait(0, deps=(s, t))
            mbarrier.arrive(k_free.index(stage), count=1)
            s = hide(s, (x, y, z), seen, C, AXES, HIDES)
            m_old = m
            m = gl.maximum(m, gl.max(s, 1) * unit)
            p = gl.exp2(s * unit - m[:, None])
            shrink = gl.exp2(m_old - m)
            mass = gl.sum(p, 1)
            held = gl.sum(p * t, 1)
            centre = gl.where(
                (l == 0.0) & (mass > 0.0), held / gl.where(mass > 0.0, mass, 1.0), centre
            )
            l = l * shrink + mass
            along = along * shrink + held
            wide = gl.convert_layout(shrink, O_ROW)[:, None]
            value = value * wide
            cross = cross * wide
            weights = gl.convert_layout(p.to(q_s.dtype), P)
            turned = gl.convert_layout((p * (t - centre[:, None])).to(q_s.dtype), P)
            mbarrier.wait(v_ready.index(stage), phase)
            v = v_s.index(stage).reshape([N, V_PAD])
            run = warpgroup_mma(weights, v, value, is_async=True)
            cross_run = warpgroup_mma(turned, v, cross, is_async=True)
            value, cross = warpgroup_mma_wait(0, deps=(run, cross_run))
            mbarrier.arrive(v_free.index(stage), count=1)
            x, y, z = following(x, y, z, ends[0], ends[1], ends[2], ends[3], C[0], C[1], C[2])
            g += 1
        if SKIPS:
            g = skip_boxes(g, behind, (k_ready, v_ready), (k_free, v_free), STAGES)
        inverse = gl.where(l == 0.0, 0.0, 1.0 / l)
        factor = (1.0 + along * inverse - centre) * inverse
        o = value * gl.convert_layout(factor, O_ROW)[:, None]
        o -= cross * gl.convert_layout(inverse, O_ROW)[:, None]
        note_odd(o, p_bad)
        plane = (n.to(gl.int64) * heads + head) * (X * Y * Z)
        lse = gl.where(l == 0.0, float("-inf"), m + gl.log2(l))
        gl.store(p_lse + plane + token, lse, mask=inside)
        column = gl.arange(0, V_PAD, gl.SliceLayout(0, O))
        own = gl.convert_layout(token, O_ROW).to(gl.int64) * o_strides[1]
        there = gl.convert_layout(inside.to(gl.int32), O_ROW) > 0
        p_rows = p_o + n.to(gl.int64) * o_strides[0] + head.to(gl.int64) * o_strides[2]
        keep = there[:, None] & (column < DV)[None, :]
        gl.store((p_rows + own)[:, None] + column[None, :], o.to(q_s.dtype), mask=keep)


@gluon.jit(do_not_specialize=["X", "heads", "groups", "shared", "total"])
def local_linear_given(
    q_desc, r_desc, k_desc, v_desc, p_lse, p_o, o_strides, p_bad, p_bounds, X, Y, Z,
    heads, groups, shared, total, unit,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """o and base-2 lse [N, heads, tokens] of every query, r in the dtype of q.

    p_bad int32 [1] is set where a sum is not finite.
    """
    q_s = gl.allocate_shared_memory(q_desc.dtype, [W] + q_desc.block_type.shape, q_desc.layout)
    r_s = gl.allocate_shared_memory(r_desc.dtype, [W] + r_desc.block_type.shape, r_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_ready = barriers(W, 1)
    q_free = barriers(W, 1)
    r_ready = barriers(W, 1)
    r_free = barriers(W, 1)
    k_ready = barriers(STAGES, 1)
    v_ready = barriers(STAGES, 1)
    k_free = barriers(STAGES, W)
    v_free = barriers(STAGES, W)
    specialised(
        given_rows,
        (
            q_s, r_s, q_ready, r_ready, q_free, r_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
            p_lse, p_o, o_strides, p_bad, p_bounds, X, Y, Z, heads, groups, shared, total, unit,
            W, R, C, AXES, STAGES, HIDES, SKIPS, DV,
        ),
        load_boxes,
        (
            (q_desc, r_desc), (q_s, r_s), (q_ready, r_ready), (q_free, r_free),
            (k_desc, v_desc), (k_s, v_s), (), (), (k_ready, v_ready), (k_free, v_free),
            p_bounds, X, Y, Z, heads, shared, total, groups, 1, (), (),
            W, R, C, AXES, STAGES,
        ),
        W,
    )  # fmt: skip
