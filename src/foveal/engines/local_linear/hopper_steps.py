# mypy: ignore-errors
"""The solve on Hopper: a work item walks its keys again and again until its rows are solved, or given up.

One launch for all steps.  Behind a pass a consumer takes the step of conjugate gradients on its rows in the
layout of the product, which stays in registers; the direction stays in shared memory, residual and x go
through the cache once a step.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foveal.engines.local_linear.early import follow
from foveal.engines.local_linear.hopper_pass import PLAIN, find_boxes, hide, scores
from foveal.engines.local_linear.hopper_solve import UNSOLVED, leave, load_at, rows_at, store_at
from foveal.engines.tile.hopper_compat import thread_barrier
from foveal.engines.tile.hopper_scores import row_places
from foveal.engines.tile.hopper_walk import (
    barriers,
    copy_box,
    following,
    load_columns,
    place,
    reach,
    skip_boxes,
    specialised,
)


@gluon.jit
def work_item(total, shared):
    """Which item a program takes: short rows need most steps, so the last tiles come first."""
    return (gl.program_id(0) + total - shared) % total


@gluon.jit
def unsolved(p_reached, t, X, Y, Z, heads, shared, W: gl.constexpr, R: gl.constexpr):
    """Whether a work item holds rows that are not solved."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    row = gl.arange(0, M, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    n, head, x0, y0, z0 = place(t, X, Y, Z, heads, shared, W, R, True)
    plane = (n.to(gl.int64) * heads + head) * (X * Y * Z)
    worst = 0.0
    for which in gl.static_range(W):
        rx, ry, rz, inside = row_places(row, x0 + which * R[0], y0, z0, X, Y, Z, R)
        reached = gl.load(p_reached + plane + (rx * Y + ry) * Z + rz, mask=inside, other=0.0)
        worst = gl.maximum(worst, gl.max(reached, 0))
    return worst >= UNSOLVED


@gluon.jit
def announce(open_rows, flags, decided, slot):
    """Tells all warps whether rows of this consumer are open behind a step."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    flags.index(slot).store(gl.full([32], 0, gl.int32, L) + open_rows)
    thread_barrier()
    mbarrier.arrive(decided.index(0), count=1)


@gluon.jit
def goes_on(round, flags, decided, W: gl.constexpr):
    """Whether rows of the item are open, once all consumers have said so.

    Flags of two rounds take turns: nobody writes those of a round before all have read those of the one
    before it.
    """
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(decided.index(0), round & 1)
    found = 0
    for which in gl.static_range(W):
        found = gl.maximum(found, gl.max(flags.index((round & 1) * W + which).load(L), 0))
    return found


@gluon.jit
def take_step(
    acc, sums, squares, q_s, d_s, rows, token, inside, plane, head, p_mean, state, p_marks,
    flags, decided, slot, round,
):  # fmt: skip
    """One step of the rows of a consumer with acc = sum w k of their direction; whether rows are open.

    sums, squares: of w and of w^2.  state as of `settle_start`, less the tolerance.
    """
    E: gl.constexpr = acc.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, E)
    held = gl.convert_layout(inside.to(gl.int32), ROW) > 0
    p_row = plane + gl.convert_layout(token, ROW)
    sums = gl.convert_layout(sums, ROW)
    squares = gl.convert_layout(squares, ROW)
    odd = gl.max((gl.sum(acc * 0.0, 1) != 0.0).to(gl.int32), 0) > 0
    p_level = state[6] + p_row
    pitch = state[7]
    limit = gl.load(p_level, mask=held, other=0.0)
    alpha = gl.load(p_level + pitch, mask=held, other=0.0)
    share = gl.load(p_level + 2 * pitch, mask=held, other=float("inf"))
    drift = gl.load(p_level + 3 * pitch, mask=held, other=0.0)
    lost = gl.load(p_level + 4 * pitch, mask=held, other=0.0)
    ridge = gl.load(state[8] + head)
    noise = gl.load(state[9])
    d = d_s.load(E).to(gl.float32)
    # The mean was rounded; with this the product stays symmetric.
    acc += ridge * d - sums[:, None] * load_at(p_mean, rows)
    energy = gl.sum(d * acc, 1)
    length = gl.sum(d * d, 1)
    good = energy > 0.0
    energy = gl.where(good, energy, 1.0)
    rate = gl.where(good, energy / gl.where(length > 0.0, length, 1.0), 0.0)
    if round == 0:
        residual = load_at(p_mean, rows) - q_s.load(E).to(gl.float32)
        residual -= alpha[:, None] * load_at(state[3], rows)
        residual = gl.where((share > 0.0)[:, None], residual, 0.0)
    else:
        residual = load_at(state[1], rows)
    before = gl.sum(residual * residual, 1)
    along = gl.sum(residual * d_s.load(E).to(gl.float32), 1)
    step = gl.where(good & (before > limit), along / energy, 0.0)
    residual -= step[:, None] * acc
    size = gl.sum(residual * residual, 1)
    turn = -gl.sum(residual * acc, 1) / energy
    new = residual + turn[:, None] * d_s.load(E).to(gl.float32)
    back = gl.sum(residual * load_at(state[3], rows), 1) / gl.where(share > 0.0, share, 1.0)
    new -= back[:, None] * q_s.load(E).to(gl.float32)
    drift += step * step * noise * squares
    lost += step * sums
    at = gl.sum(residual * new, 1)
    # A product that rounding made indefinite leads nowhere.
    size_left = gl.where(good, size, 0.0)
    done, last, end = leave(size_left, before, limit, at, new, rate, held)
    end = gl.where(good, end, size)
    open_rows = gl.where(done | odd, 0, 1)
    announce(open_rows, flags, decided, slot)
    gl.store(p_level + 4 * pitch, lost, mask=held)
    if round == 0:
        x = alpha[:, None] * q_s.load(E).to(gl.float32)
    else:
        x = load_at(state[0], rows)
    x += step[:, None] * d_s.load(E).to(gl.float32)
    if odd:
        gl.store(p_marks, 1)
    if done:
        x += last[:, None] * new
        store_at(state[2], rows, x)
        ratio = gl.sqrt(gl.maximum(end, drift / 64.0) / gl.where(limit > 0.0, limit, 1.0))
        gl.store(state[4] + p_row, ratio, mask=held)
        gl.store(state[5] + p_row, held.to(gl.int32) * (round + 1), mask=held)
        longest = gl.max(gl.sum(x * x, 1), 0)
        if (longest > state[10] * state[10]) | (gl.max(ratio, 0) > 1.0):
            gl.store(p_marks + 1, 1)
    else:
        store_at(state[1], rows, residual)
        gl.store(p_level + 3 * pitch, drift, mask=held)
        square = gl.sum(new * new, 1)
        factor = 64.0 / gl.sqrt(gl.where(square > 1e-30, square, 1.0))
        d_s.store((new * factor[:, None]).to(d_s.dtype))
    store_at(state[0], rows, x)
    return open_rows


@gluon.jit
def solve_rows(
    WHICH: gl.constexpr, q_s, d_s, q_ready, d_ready, k_s, k_ready, k_free, flags, decided,
    p_lse, p_mean, state, p_marks, p_bounds, X, Y, Z,
    heads, groups, shared, total, items, unit, most, W: gl.constexpr, R: gl.constexpr,
    C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr, HIDES: gl.constexpr,
    SKIPS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """A consumer of `local_linear_steps`."""
    M: gl.constexpr = R[0] * R[1] * R[2]
    N: gl.constexpr = C[0] * C[1] * C[2]
    PAD: gl.constexpr = q_s.shape[-1]
    S: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], instr_shape=[16, N, 16]
    )
    E: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], instr_shape=[16, PAD, 16]
    )
    P: gl.constexpr = gl.DotOperandLayout(0, E, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    row = gl.arange(0, M, ROW)
    q = q_s.index(WHICH).reshape([M, PAD])
    d = d_s.index(WHICH).reshape([M, PAD])
    if total > 0:
        n, head, token, inside, seen, here, ends, walk = find_boxes(
            work_item(items, shared), p_bounds, X, Y, Z, heads, shared, row, WHICH, W, R, C, AXES,
            SKIPS,
        )  # fmt: skip
        plane = (n.to(gl.int64) * heads + head) * (X * Y * Z)
        lse = gl.load(p_lse + plane + token, mask=inside, other=float("inf"))
        lse = gl.where(lse - lse == 0.0, lse, float("inf"))
        reached = gl.load(state[4] + plane + token, mask=inside, other=0.0)
        active = gl.max(reached, 0) >= UNSOLVED
        mbarrier.wait(q_ready.index(WHICH), 0)
        mbarrier.wait(d_ready.index(WHICH), 0)
        g = 0
        round = 0
        found = 1
        while found > 0:
            count, before, behind = walk
            before = gl.where(active, before, before + count + behind)
            count = gl.where(active, count, 0)
            behind = gl.where(active, behind, 0)
            shift = gl.zeros([M], gl.float32, ROW)
            if active:
                # Found anew (nothing in `found` or `g` is negative): addresses that are kept from round
                # to round, or beside the products, would not fit in registers.
                rows = rows_at(
                    token + gl.minimum(found, 0), inside, n, head, heads, X * Y * Z, D, E
                )
                along = gl.sum(d.load(E).to(gl.float32) * load_at(p_mean, rows), 1)
                shift = gl.convert_layout(along, ROW)
            g = skip_boxes(g, before, (k_ready,), (k_free,), STAGES)
            sums = gl.zeros([M], gl.float32, ROW)
            squares = gl.zeros([M], gl.float32, ROW)
            acc = gl.zeros([M, PAD], gl.float32, E)
            x, y, z = here
            for j in range(count):
                stage = g % STAGES
                s, t = scores(q, d, k_s, k_ready, stage, (g // STAGES) & 1, N, S)
                s, t = warpgroup_mma_wait(0, deps=(s, t))
                s = hide(s, (x, y, z), seen, C, AXES, HIDES)
                w = gl.exp2(s * unit - lse[:, None]) * (t - shift[:, None])
                sums += gl.sum(w, 1)
                squares += gl.sum(w * w, 1)
                weights = gl.convert_layout(w.to(q_s.dtype), P)
                run = warpgroup_mma(weights, k_s.index(stage).reshape([N, PAD]), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(run,))
                mbarrier.arrive(k_free.index(stage), count=1)
                x, y, z = following(x, y, z, ends[0], ends[1], ends[2], ends[3], C[0], C[1], C[2])
                g += 1
            g = skip_boxes(g, behind, (k_ready,), (k_free,), STAGES)
            slot = (round & 1) * W + WHICH
            if active:
                own = token + gl.minimum(g, 0)
                rows = rows_at(own, inside, n, head, heads, X * Y * Z, D, E)
                more = take_step(
                    acc, sums, squares, q, d, rows, own, inside, plane, head, p_mean, state, p_marks,
                    flags, decided, slot, round,
                )  # fmt: skip
                active = more > 0
                fence_async_shared()
                thread_barrier()
            else:
                announce(0, flags, decided, slot)
            found = goes_on(round, flags, decided, W)
            round += 1
            found = gl.where(round < most, found, 0)


@gluon.jit
def load_rounds(
    q_desc, d_desc, k_desc, q_s, d_s, q_ready, d_ready, k_s, k_ready, k_free, flags, decided, p_bounds,
    X, Y, Z, heads, groups, shared, total, items, most,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer of `local_linear_steps`: the queries and directions, and the keys once a round."""
    if total > 0:
        n, head, x, y, z = place(work_item(items, shared), X, Y, Z, heads, shared, W, R, True)
        for c in gl.static_range(W):
            mbarrier.expect(q_ready.index(c), q_desc.block_type.nbytes)
            copy_box(q_desc, n, x + c * R[0], y, z, head, q_ready.index(c), q_s.index(c), AXES)
            mbarrier.expect(d_ready.index(c), d_desc.block_type.nbytes)
            copy_box(d_desc, n, x + c * R[0], y, z, head, d_ready.index(c), d_s.index(c), AXES)
        cx, nx = reach(p_bounds, 0, X, x, W * R[0], C[0], 1)
        y0, ny = reach(p_bounds, 2 * X, Y, y, R[1], C[1], 1)
        z0, nz = reach(p_bounds, 2 * X + 2 * Y, Z, z, R[2], C[2], 1)
        g = 0
        round = 0
        found = 1
        while found > 0:
            g = load_columns(
                g, 0, nx * ny * nz, n, 0, 0, head // groups, (cx, y0, z0), (y0, z0),
                (y0 + ny * C[1], z0 + nz * C[2]), (k_desc,), (k_s,), (), (), (k_ready,), (k_free,), (),
                C, AXES, STAGES,
            )  # fmt: skip
            found = goes_on(round, flags, decided, W)
            round += 1
            found = gl.where(round < most, found, 0)


@gluon.jit(do_not_specialize=[*PLAIN, "most"])
def local_linear_steps(
    q_desc, d_desc, k_desc, p_lse, p_mean, state, p_marks, p_bounds, X, Y, Z,
    heads, groups, shared, total, unit, most,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, SKIPS: gl.constexpr, D: gl.constexpr, EARLY: gl.constexpr = False,
):  # fmt: skip
    """At most `most` steps of items that are not solved; d: the first direction, state as of `take_step`."""
    follow(EARLY)
    items = total
    if not unsolved(state[4], work_item(items, shared), X, Y, Z, heads, shared, W, R):
        total = 0
    q_s = gl.allocate_shared_memory(q_desc.dtype, [W] + q_desc.block_type.shape, q_desc.layout)
    d_s = gl.allocate_shared_memory(d_desc.dtype, [W] + d_desc.block_type.shape, d_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    FLAGS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    flags = gl.allocate_shared_memory(gl.int32, [2 * W, 32], FLAGS)
    q_ready = barriers(W, 1)
    d_ready = barriers(W, 1)
    k_ready = barriers(STAGES, 1)
    k_free = barriers(STAGES, W)
    decided = barriers(1, W)
    specialised(
        solve_rows,
        (
            q_s, d_s, q_ready, d_ready, k_s, k_ready, k_free, flags, decided,
            p_lse, p_mean, state, p_marks, p_bounds, X, Y, Z,
            heads, groups, shared, total, items, unit, most, W, R, C, AXES, STAGES, HIDES, SKIPS, D,
        ),
        load_rounds,
        (
            q_desc, d_desc, k_desc, q_s, d_s, q_ready, d_ready, k_s, k_ready, k_free, flags, decided,
            p_bounds, X, Y, Z, heads, groups, shared, total, items, most, W, R, C, AXES, STAGES,
        ),
        W,
    )  # fmt: skip
