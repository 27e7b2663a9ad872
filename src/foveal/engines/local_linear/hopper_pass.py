# mypy: ignore-errors
"""The first and the last pass over the visible keys of every query on Hopper: mean keys, and the output.

One producer, two consumers of one box of queries each, as in the tile engine.  In the last pass a consumer
holds its queries q and r; of a box of keys it takes w = p (1 + r.mean - r.k) and adds up w v.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.engines.local_linear.early import follow, lead, wait
from foveal.engines.local_linear.hopper_solve import load_at, rows_at, settle_start, store_at
from foveal.engines.tile.hopper_scores import row_places
from foveal.engines.tile.hopper_walk import (
    barriers,
    boxes,
    following,
    load_boxes,
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

# A hidden score that is finite: p s is 0 then.  No maximum falls below half of it.
HIDDEN = gl.constexpr(-3.0e38)
# Sizes that a kernel is not compiled anew for.
PLAIN = ["X", "heads", "groups", "shared", "total"]


@gluon.jit
def hide(
    s, box, seen, C: gl.constexpr, AXES: gl.constexpr, HIDES: gl.constexpr,
    SCORE: gl.constexpr = float("-inf"),
):  # fmt: skip
    """Hidden pairs get the score SCORE; seen: (low, width, last_low, first_up)."""
    LAYOUT: gl.constexpr = s.type.layout
    if HIDES:
        x, y, z = box
        if whole(x, y, z, seen[2], seen[3], C, AXES) == 0:
            pairs = visible(x, y, z, seen[0], seen[1], LAYOUT, C, AXES)
            s = gl.where(pairs, s, SCORE)
    return s


@gluon.jit
def between(starts, counts, first, stop, C: gl.constexpr):
    """A consumer's walk over [first, stop) of the boxes of the first axis, and all of the others.

    Where it begins, where the other axes begin and end, and how many boxes: its own, before and behind.
    """
    nx, ny, nz = counts
    here = (starts[0] + first * C[0], starts[1], starts[2])
    ends = (starts[1], starts[2], starts[1] + ny * C[1], starts[2] + nz * C[2])
    return here, ends, ((stop - first) * ny * nz, first * ny * nz, (nx - stop) * ny * nz)


@gluon.jit
def find_boxes(
    t, p_bounds, X, Y, Z, heads, shared, row, WHICH: gl.constexpr, W: gl.constexpr,
    R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, SKIPS: gl.constexpr,
):  # fmt: skip
    """Where the rows of a consumer lie, what they see, and which boxes they walk."""
    n, head, x0, y0, z0 = place(t, X, Y, Z, heads, shared, W, R, True)
    starts, counts = boxes(p_bounds, X, Y, Z, x0, y0, z0, W, R, C, AXES, 1)
    x0 += WHICH * R[0]
    low, width = seen_by_rows(p_bounds, X, Y, Z, x0, y0, z0, row, R)
    last_low, first_up = seen_whole(p_bounds, X, Y, Z, x0, y0, z0, R)
    first = 0
    stop = counts[0]
    if SKIPS:
        first, stop = own_boxes(p_bounds, X, x0, starts[0], counts[0], R, C)
    rx, ry, rz, inside = row_places(row, x0, y0, z0, X, Y, Z, R)
    token = (rx * Y + ry) * Z + rz
    here, ends, walk = between(starts, counts, first, stop, C)
    return n, head, token, inside, (low, width, last_low, first_up), here, ends, walk


@gluon.jit
def scores(q, d, k_s, k_ready, stage, phase, N: gl.constexpr, S: gl.constexpr):
    """q k^T and d k^T of a box, in flight."""
    M: gl.constexpr = q.shape[0]
    mbarrier.wait(k_ready.index(stage), phase)
    k = k_s.index(stage).reshape([N, q.shape[1]]).permute((1, 0))
    s = warpgroup_mma(q, k, gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True)
    t = warpgroup_mma(d, k, gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True)
    return s, t


@gluon.jit
def weigh_values(
    WHICH: gl.constexpr, q_s, r_s, q_ready, r_ready, q_free, r_free,
    k_s, v_s, k_ready, v_ready, k_free, v_free,
    p_lse, p_mean, p_lost, p_o, o_strides, p_bad, p_bounds, X, Y, Z, heads, groups, shared, total, unit,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """A consumer of `local_linear_values`."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    PAD: gl.constexpr = q_s.shape[-1]
    V_PAD: gl.constexpr = v_s.shape[-1]
    S: gl.constexpr = product_layout(N)
    E: gl.constexpr = product_layout(PAD)
    O: gl.constexpr = product_layout(V_PAD)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
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
        plane = (n.to(gl.int64) * heads + head) * (X * Y * Z)
        lse = gl.load(p_lse + plane + token, mask=inside, other=float("inf"))
        lse = gl.where(lse - lse == 0.0, lse, float("inf"))
        rows = rows_at(token, inside, n, head, heads, X * Y * Z, D, E)
        mean = load_at(p_mean, rows)
        mbarrier.wait(q_ready.index(WHICH), 0)
        mbarrier.wait(r_ready.index(WHICH), 0)
        shift = gl.convert_layout(gl.sum(r.load(E).to(gl.float32) * mean, 1), ROW)
        shift += 1.0 + gl.load(p_lost + plane + token, mask=inside, other=0.0)
        ready = (k_ready, v_ready)
        free = (k_free, v_free)
        if SKIPS:
            g = skip_boxes(g, before, ready, free, STAGES)
        acc = gl.zeros([M, V_PAD], gl.float32, O)
        for j in range(count):
            stage = g % STAGES
            phase = (g // STAGES) & 1
            s, t = scores(q, r, k_s, k_ready, stage, phase, N, S)
            s = warpgroup_mma_wait(1, deps=(s,))
            s = hide(s, (x, y, z), seen, C, AXES, HIDES)
            p = gl.exp2(s * unit - lse[:, None])
            # Over by now: without it ptxas puts exponentials behind the second product.
            mbarrier.wait(k_ready.index(stage), phase)
            t = warpgroup_mma_wait(0, deps=(t,))
            mbarrier.arrive(k_free.index(stage), count=1)
            w = p * (shift[:, None] - t)
            weights = gl.convert_layout(w.to(q_s.dtype), P)
            mbarrier.wait(v_ready.index(stage), phase)
            v = v_s.index(stage).reshape([N, V_PAD])
            run = warpgroup_mma(weights, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(run,))
            mbarrier.arrive(v_free.index(stage), count=1)
            x, y, z = following(x, y, z, ends[0], ends[1], ends[2], ends[3], C[0], C[1], C[2])
            g += 1
        if SKIPS:
            g = skip_boxes(g, behind, ready, free, STAGES)
        note_odd(acc, p_bad)
        column = gl.arange(0, V_PAD, gl.SliceLayout(0, O))
        own = gl.convert_layout(token, gl.SliceLayout(1, O)).to(gl.int64) * o_strides[1]
        held = gl.convert_layout(inside.to(gl.int32), gl.SliceLayout(1, O)) > 0
        p_rows = p_o + n.to(gl.int64) * o_strides[0] + head.to(gl.int64) * o_strides[2]
        # As in `rows_at`: a part of the columns that a thread knows, and constants.
        p_rows = (p_rows + own)[:, None] + (column % 8)[None, :] + (column // 8 * 8)[None, :]
        keep = held[:, None] & (column < DV)[None, :]
        gl.store(p_rows, acc.to(q_s.dtype), mask=keep)


@gluon.jit
def note_odd(x, p_bad):
    """Leaves a mark where a sum is not finite."""
    odd = gl.max((gl.sum(x * 0.0, 1) != 0.0).to(gl.int32), 0)
    if odd > 0:
        gl.store(p_bad, 1)


@gluon.jit(do_not_specialize=PLAIN)
def local_linear_values(
    q_desc, r_desc, k_desc, v_desc, p_lse, p_mean, p_lost, p_o, o_strides, p_bad, p_bounds, X, Y, Z,
    heads, groups, shared, total, unit,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    EARLY: gl.constexpr = False,
):  # fmt: skip
    """o of every query.

    lse base 2, mean float32; r in the dtype of q; lost [N, heads, tokens]: what the rounding of the mean took
    from r.mean.
    """
    follow(EARLY)
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
        weigh_values,
        (
            q_s, r_s, q_ready, r_ready, q_free, r_free, k_s, v_s, k_ready, v_ready, k_free, v_free,
            p_lse, p_mean, p_lost, p_o, o_strides, p_bad, p_bounds, X, Y, Z,
            heads, groups, shared, total, unit,
            W, R, C, AXES, STAGES, HIDES, SKIPS, D, DV,
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


@gluon.constexpr_function
def rescaling(count):
    """Instructions and constraints of `rescaled`, for so many numbers of a thread."""
    one = "0f3F800000"
    # A thread holds numbers of two rows, two of each in turn.
    first, second = f"${2 * count}", f"${2 * count + 2}"
    lines = [
        "{ .reg .pred p;",
        f"setp.neu.f32 p, {first}, {one};",
        f"setp.neu.or.f32 p, {second}, {one}, p;",
        "vote.sync.any.pred p, p, 0xffffffff;",
        "@!p bra.uni same_${:uid};",
        *(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)),
        "same_${:uid}: }",
    ]
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["f"] * count
    return "\n".join(lines), ",".join(constraints)


@gluon.jit
def rescaled(x, shrink):
    """x [rows, columns] of products times shrink [rows]; a warp leaves out what it would multiply by 1."""
    COUNT: gl.constexpr = x.shape[0] * x.shape[1] // (32 * gl.num_warps())
    TEXT: gl.constexpr = rescaling(COUNT)
    x, wide = gl.broadcast(x, shrink[:, None])
    return gl.inline_asm_elementwise(
        TEXT[0], TEXT[1], [x, wide], dtype=gl.float32, is_pure=True, pack=COUNT
    )


@gluon.jit
def own_sum(x):
    """Sums of rows [rows, columns] over the columns that a thread holds: [rows, 4]."""
    return gl.sum(gl.sum(x.reshape([x.shape[0], x.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def of_rows(x, like):
    """Numbers per row beside sums of `own_sum`."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def whole_sum(x, ROW: gl.constexpr):
    return gl.convert_layout(gl.sum(x, 1), ROW)


@gluon.jit
def more_weights(s, m, l, along, squares, centre, unit):
    """p, p (s - centre), new maxima, the factor of sums so far and sums."""
    m_new = gl.maximum(m, gl.max(s, 1) * unit)
    shrink = gl.exp2(m - m_new)
    p = gl.exp2(s * unit - m_new[:, None])
    own = of_rows(shrink, l)
    l = l * own + own_sum(p)
    ps = p * (s - centre[:, None])
    along = along * own + own_sum(ps)
    squares = squares * (own * own) + own_sum(ps * ps)
    return p, ps, m_new, shrink, l, along, squares


@gluon.jit
def average_rows(
    WHICH: gl.constexpr, q_s, q_ready, q_free, k_s, k_ready, k_free,
    p_lse, p_mean, p_spread, state, p_bad, p_bounds, X, Y, Z, heads, groups, shared, total, unit,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr, D: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """A consumer of `local_linear_means`."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    PAD: gl.constexpr = q_s.shape[-1]
    S: gl.constexpr = product_layout(N)
    E: gl.constexpr = product_layout(PAD)
    P: gl.constexpr = gl.DotOperandLayout(0, E, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    E_ROW: gl.constexpr = gl.SliceLayout(1, E)
    row = gl.arange(0, M, ROW)
    q = q_s.index(WHICH).reshape([M, PAD])
    g = 0
    for t_item in range(gl.program_id(0), total, gl.num_programs(0)):
        n, head, token, inside, seen, here, ends, walk = find_boxes(
            t_item, p_bounds, X, Y, Z, heads, shared, row, WHICH, W, R, C, AXES, SKIPS
        )
        x, y, z = here
        count, before, behind = walk
        mbarrier.wait(q_ready.index(WHICH), 0)
        if SKIPS:
            g = skip_boxes(g, before, (k_ready,), (k_free,), STAGES)
        stage = g % STAGES
        mbarrier.wait(k_ready.index(stage), (g // STAGES) & 1)
        k = k_s.index(stage).reshape([N, PAD])
        s = warpgroup_mma(
            q, k.permute((1, 0)), gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(0, deps=(s,))
        s = hide(s, (x, y, z), seen, C, AXES, HIDES, HIDDEN)
        # Above all that is hidden.
        m = gl.maximum(gl.max(s, 1) * unit, gl.maximum(0.5 * HIDDEN * unit, HIDDEN))
        p = gl.exp2(s * unit - m[:, None])
        mass = gl.sum(p, 1)
        # Scores keep their digits near 0: they are taken from their mean in the first box.
        centre = gl.sum(p * gl.where(p > 0.0, s, 0.0), 1) / gl.where(mass > 0.0, mass, 1.0)
        ps = p * (s - centre[:, None])
        l = own_sum(p)
        along = own_sum(ps)
        squares = own_sum(ps * ps)
        weights = gl.convert_layout(p.to(q_s.dtype), P)
        more = gl.convert_layout(ps.to(q_s.dtype), P)
        acc = gl.zeros([M, PAD], gl.float32, E)
        image = gl.zeros([M, PAD], gl.float32, E)
        for j in range(1, count):
            x, y, z = following(x, y, z, ends[0], ends[1], ends[2], ends[3], C[0], C[1], C[2])
            last = g % STAGES
            g += 1
            stage = g % STAGES
            mbarrier.wait(k_ready.index(stage), (g // STAGES) & 1)
            k = k_s.index(last).reshape([N, PAD])
            k_next = k_s.index(stage).reshape([N, PAD]).permute((1, 0))
            none = gl.zeros([M, N], gl.float32, S)
            s_run = warpgroup_mma(q, k_next, none, use_acc=False, is_async=True)
            run = warpgroup_mma(weights, k, acc, is_async=True)
            image_run = warpgroup_mma(more, k, image, is_async=True)
            # Where the weights of two boxes fit in registers the sums go on while the next are found.
            if PAD <= 64:
                s = warpgroup_mma_wait(2, deps=(s_run,))
            else:
                acc, image, s = warpgroup_mma_wait(0, deps=(run, image_run, s_run))
                mbarrier.arrive(k_free.index(last), count=1)
            s = hide(s, (x, y, z), seen, C, AXES, HIDES, HIDDEN)
            p, ps, m, shrink, l, along, squares = more_weights(
                s, m, l, along, squares, centre, unit
            )
            if PAD <= 64:
                acc, image = warpgroup_mma_wait(0, deps=(run, image_run))
                mbarrier.arrive(k_free.index(last), count=1)
            weights = gl.convert_layout(p.to(q_s.dtype), P)
            more = gl.convert_layout(ps.to(q_s.dtype), P)
            wide = gl.convert_layout(shrink, E_ROW)
            acc = rescaled(acc, wide)
            image = rescaled(image, wide)
        stage = g % STAGES
        k = k_s.index(stage).reshape([N, PAD])
        run = warpgroup_mma(weights, k, acc, is_async=True)
        image_run = warpgroup_mma(more, k, image, is_async=True)
        acc, image = warpgroup_mma_wait(0, deps=(run, image_run))
        mbarrier.arrive(k_free.index(stage), count=1)
        g += 1
        if SKIPS:
            g = skip_boxes(g, behind, (k_ready,), (k_free,), STAGES)
        wait(EARLY)
        note_odd(acc, p_bad)
        l = whole_sum(l, ROW)
        plane = (n.to(gl.int64) * heads + head) * (X * Y * Z)
        lse = gl.where(l == 0.0, float("-inf"), m + gl.log2(l))
        gl.store(p_lse + plane + token, lse, mask=inside)
        inverse = gl.where(l == 0.0, 0.0, 1.0 / l)
        # Scores of -inf that are no hidden ones leave NaN where nothing has weight.
        along = gl.where(l == 0.0, 0.0, whole_sum(along, ROW) * inverse)
        squares = gl.where(l == 0.0, 0.0, whole_sum(squares, ROW) * inverse * inverse)
        inverse = gl.convert_layout(inverse, E_ROW)
        acc = acc * inverse[:, None]
        rows = rows_at(token, inside, n, head, heads, X * Y * Z, D, E)
        store_at(p_mean, rows, acc)
        settle_start(
            acc, image * inverse[:, None], centre, along, squares, q, lse, rows, token, inside, plane,
            head, gl.load(p_spread + (n * heads + head) // groups), state, p_bad,
        )  # fmt: skip


@gluon.jit(do_not_specialize=PLAIN)
def local_linear_means(
    q_desc, k_desc, p_lse, p_mean, p_spread, state, p_bad, p_bounds, X, Y, Z,
    heads, groups, shared, total, unit,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr, D: gl.constexpr, EARLY: gl.constexpr = False,
):  # fmt: skip
    """Mean key float32 [N, tokens, heads, D] and base-2 lse of every query, and how its solve begins.

    What the kernel before writes is read behind the walk only.
    """
    lead(EARLY)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [W] + q_desc.block_type.shape, q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    q_ready = barriers(W, 1)
    q_free = barriers(W, 1)
    k_ready = barriers(STAGES, 1)
    k_free = barriers(STAGES, W)
    specialised(
        average_rows,
        (
            q_s, q_ready, q_free, k_s, k_ready, k_free, p_lse, p_mean, p_spread, state, p_bad, p_bounds,
            X, Y, Z, heads, groups, shared, total, unit,
            W, R, C, AXES, STAGES, HIDES, SKIPS, D, EARLY,
        ),
        load_boxes,
        (
            (q_desc,), (q_s,), (q_ready,), (q_free,), (k_desc,), (k_s,), (), (), (k_ready,), (k_free,),
            p_bounds, X, Y, Z, heads, shared, total, groups, 1, (), (),
            W, R, C, AXES, STAGES,
        ),
        W,
    )  # fmt: skip
