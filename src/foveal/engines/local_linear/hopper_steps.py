# mypy: ignore-errors
"""The solve on Hopper: rows that are not solved, together in work items, walk their keys until they are.

`open_rows` lists them.  Behind a pass the consumer takes the step of conjugate gradients on its rows in the
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
from foveal.engines.local_linear.hopper_pass import hide, own_sum, scores, whole_sum
from foveal.engines.local_linear.hopper_solve import (
    last_step,
    load_at,
    rows_at,
    rows_that,
    settled,
    store_at,
)
from foveal.engines.tile.hopper_compat import thread_barrier
from foveal.engines.tile.hopper_walk import (
    barriers,
    following,
    load_columns,
    product_layout,
    specialised,
)


@gluon.jit
def work_item(p_counts, tiles, heads, shared, ROWS: gl.constexpr):
    """Batch, head and first number of the ROWS of a program, and how many rows its head has.

    0 rows if the program has none.  Short rows need most steps, so the first rows come first, then the
    others from the last.
    """
    t = gl.program_id(0)
    tile = t // shared % tiles
    rest = t // (shared * tiles)
    groups = heads // shared
    head = rest % groups * shared + t % shared
    n = rest // groups
    count = gl.load(p_counts + n * heads + head)
    own = gl.cdiv(count, ROWS)
    first = gl.where(tile == 0, 0, own - tile) * ROWS
    return n, head, first, gl.where(tile < own, count, 0)


@gluon.jit
def seen_by(p_bounds, X, Y, Z, token, AXES: gl.constexpr):
    """Of tokens anywhere on the grid, the ends of what they see, axis after axis: lower and upper."""
    x = token // (Y * Z)
    lx, ux = gl.load(p_bounds + x), gl.load(p_bounds + (X + x))
    ly, uy, lz, uz = 0, 1, 0, 1
    if AXES > 1:
        p_axis = p_bounds + 2 * X + token // Z % Y
        ly, uy = gl.load(p_axis), gl.load(p_axis + Y)
    if AXES > 2:
        p_axis = p_bounds + 2 * X + 2 * Y + token % Z
        lz, uz = gl.load(p_axis), gl.load(p_axis + Z)
    return (lx, ly, lz), (ux, uy, uz)


@gluon.jit
def listed(p_rows, first, count, row):
    """The tokens of rows of a work item; behind the last the last again."""
    return gl.load(p_rows + gl.minimum(first + row, count - 1))


@gluon.jit
def item_boxes(
    p_rows, first, count, p_bounds, X, Y, Z, ROWS: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr
):
    """Start and number of the boxes of keys that the rows of a work item see, per axis."""
    row = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    low, up = seen_by(p_bounds, X, Y, Z, listed(p_rows, first, count, row), AXES)
    x, y, z = gl.min(low[0], 0), 0, 0
    nx, ny, nz = gl.maximum(gl.cdiv(gl.max(up[0], 0) - x, C[0]), 1), 1, 1
    if AXES > 1:
        y = gl.min(low[1], 0)
        ny = gl.maximum(gl.cdiv(gl.max(up[1], 0) - y, C[1]), 1)
    if AXES > 2:
        z = gl.min(low[2], 0)
        nz = gl.maximum(gl.cdiv(gl.max(up[2], 0) - z, C[2]), 1)
    return (x, y, z), (nx, ny, nz)


@gluon.jit
def what_hides(low, up, AXES: gl.constexpr):
    """Of rows that see low to up: low, width, and what all of them see."""
    ly, uy, lz, uz = 0, 1, 0, 1
    if AXES > 1:
        ly, uy = gl.max(low[1], 0), gl.min(up[1], 0)
    if AXES > 2:
        lz, uz = gl.max(low[2], 0), gl.min(up[2], 0)
    width = (up[0] - low[0], up[1] - low[1], up[2] - low[2])
    return low, width, (gl.max(low[0], 0), ly, lz), (gl.min(up[0], 0), uy, uz)


@gluon.jit
def announce(open_rows, flag, decided):
    """Tells the producer whether rows are open behind a step."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    flag.store(gl.full([32], 0, gl.int32, L) + open_rows)
    thread_barrier()
    mbarrier.arrive(decided.index(0), count=1)


@gluon.jit
def goes_on(round, flag, decided):
    """What the consumer announced.  It does not announce more before it has more keys."""
    mbarrier.wait(decided.index(0), round & 1)
    return gl.max(flag.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def scale(square):
    """What makes rows of these squares 64 long: in 16 bits small numbers would lose digits."""
    return 64.0 / gl.sqrt(gl.where(square > 1e-30, square, 1.0))


@gluon.jit
def take_step(
    acc, sums, squares, q_s, d_s, rows, token, still, plane, head, spread, p_mean, state, p_marks,
    flag, decided, taken, most,
):  # fmt: skip
    """One step of the rows of a program with acc = sum w k of their direction; which rows are open then.

    sums, squares: of w and of w^2; still: which rows were open.  spread and state as of
    `settle_start`, less the tolerance.  taken: steps before this one, of at most `most`.
    """
    E: gl.constexpr = acc.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, E)
    held = gl.convert_layout(still, ROW) > 0
    p_row = plane + gl.convert_layout(token, ROW)
    odd = gl.max((gl.sum(acc * 0.0, 1) != 0.0).to(gl.int32), 0) > 0
    p_level = state[5] + p_row
    pitch = state[6]
    # The mean was rounded; with this the product stays symmetric.
    acc -= sums[:, None] * load_at(p_mean, rows)
    # What is loaded behind a barrier takes registers from there on only.
    thread_barrier()
    acc += gl.load(state[7] + head) * d_s.load(E).to(gl.float32)
    energy = gl.sum(d_s.load(E).to(gl.float32) * acc, 1)
    length = gl.sum(d_s.load(E).to(gl.float32) * d_s.load(E).to(gl.float32), 1)
    product = gl.sum(acc * acc, 1)
    good = energy > 0.0
    energy = gl.where(good, energy, 1.0)
    rate = gl.where(good, energy / gl.where(length > 0.0, length, 1.0), 0.0)
    thread_barrier()
    limit = gl.load(p_level, mask=held, other=0.0)
    alpha = gl.load(p_level + pitch, mask=held, other=0.0)
    residual = load_at(state[1], rows)
    thread_barrier()
    before = gl.sum(residual * residual, 1)
    along = gl.sum(residual * d_s.load(E).to(gl.float32), 1)
    step = gl.where(good & (before > limit), along / energy, 0.0)
    residual -= step[:, None] * acc
    size = gl.sum(residual * residual, 1)
    turn = -gl.sum(residual * acc, 1) / energy
    drift = gl.load(p_level + 2 * pitch, mask=held, other=0.0)
    drift += step * step * gl.load(state[8]) * squares
    lost = gl.load(p_level + 3 * pitch, mask=held, other=0.0) + step * sums
    # A product that rounding made indefinite leads nowhere.
    size_left = gl.where(good, size, 0.0)
    short, steps, part = settled(size_left, before, limit, product, length, rate, spread)
    short = short | odd | (taken + 1 >= most)
    left = gl.where(held & (short == 0), 1, 0)
    announce(gl.max(left, 0), flag, decided)
    gl.store(p_level + 3 * pitch, lost, mask=held)
    gl.store(p_level + 2 * pitch, drift, mask=held)
    store_at(state[1], rows_that(rows, short == 0), residual)
    thread_barrier()
    new = residual + turn[:, None] * d_s.load(E).to(gl.float32)
    square = gl.sum(new * new, 1)
    at = size + turn * (along - step * energy)
    last, end = last_step(steps, size_left, part, at, square, rate)
    end = gl.where(good, end, size)
    if taken == 0:
        x = alpha[:, None] * q_s.load(E).to(gl.float32)
    else:
        x = load_at(state[0], rows)
    thread_barrier()
    x += step[:, None] * d_s.load(E).to(gl.float32)
    x += gl.where(short, last, 0.0)[:, None] * new
    store_at(state[0], rows, x)
    if odd:
        gl.store(p_marks, 1)
    over = held & short
    ratio = gl.sqrt(gl.maximum(end, drift / 64.0) / gl.where(limit > 0.0, limit, 1.0))
    gl.store(state[3] + p_row, ratio, mask=over)
    gl.store(state[4] + p_row, held.to(gl.int32) * (taken + 1), mask=over)
    longest = gl.max(gl.where(over, gl.sum(x * x, 1), 0.0), 0)
    if (longest > state[9] * state[9]) | (gl.max(gl.where(over, ratio, 0.0), 0) > 1.0):
        gl.store(p_marks + 1, 1)
    narrow = gl.where(short[:, None], x, new * scale(square)[:, None]).to(d_s.dtype)
    store_at(state[2], rows_that(rows, short), narrow)
    d_s.store(narrow)
    return left


@gluon.jit
def own_rows(p, token, PAD: gl.constexpr, D: gl.constexpr):
    """Rows of D columns, and zeros behind.  p: the first row of a head, their stride."""
    LANES: gl.constexpr = PAD // 8
    B: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    column = gl.arange(0, PAD, gl.SliceLayout(0, B))[None, :]
    own = gl.convert_layout(token, gl.SliceLayout(1, B)).to(gl.int64) * p[1]
    return gl.load((p[0] + own)[:, None] + column, mask=column < D, other=0.0)


@gluon.jit
def weigh(
    s_run, t_run, BEHIND: gl.constexpr, ready, phase, box, seen, shift, lse, unit,
    C: gl.constexpr, AXES: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """w = p (d.k - shift) of a box; BEHIND: products that may go on meanwhile."""
    s = warpgroup_mma_wait(1 + BEHIND, deps=(s_run,))
    p = gl.exp2(hide(s, box, seen, C, AXES, HIDES) * unit - lse[:, None])
    # Over by now: without it ptxas puts exponentials behind the second product.
    mbarrier.wait(ready, phase)
    return p * (warpgroup_mma_wait(BEHIND, deps=(t_run,)) - shift[:, None])


@gluon.jit
def image(
    g, count, corner, ends, q, d, k_s, k_ready, k_free, seen, shift, lse, unit, E: gl.constexpr,
    C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr, HIDES: gl.constexpr,
):  # fmt: skip
    """Sums over `count` boxes of w k, w and w^2 of the directions d, and how many boxes there were so far."""
    M: gl.constexpr = q.shape[0]
    N: gl.constexpr = C[0] * C[1] * C[2]
    PAD: gl.constexpr = q.shape[1]
    S: gl.constexpr = product_layout(N)
    P: gl.constexpr = gl.DotOperandLayout(0, E, 2)
    acc = gl.zeros([M, PAD], gl.float32, E)
    sums = own_sum(gl.zeros([M, N], gl.float32, S))
    squares = sums
    x, y, z = corner
    if PAD > 64:
        for j in range(count):
            stage = g % STAGES
            phase = (g // STAGES) & 1
            s, t = scores(q, d, k_s, k_ready, stage, phase, N, S)
            box = (x, y, z)
            w = weigh(
                s, t, 0, k_ready.index(stage), phase, box, seen, shift, lse, unit, C, AXES, HIDES
            )
            sums += own_sum(w)
            squares += own_sum(w * w)
            weights = gl.convert_layout(w.to(q.dtype), P)
            run = warpgroup_mma(weights, k_s.index(stage).reshape([N, PAD]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(run,))
            mbarrier.arrive(k_free.index(stage), count=1)
            x, y, z = following(x, y, z, ends[0], ends[1], ends[2], ends[3], C[0], C[1], C[2])
            g += 1
    else:
        # There are registers to find the next weights while those of a box are used.
        stage = g % STAGES
        phase = (g // STAGES) & 1
        s, t = scores(q, d, k_s, k_ready, stage, phase, N, S)
        w = weigh(
            s, t, 0, k_ready.index(stage), phase, corner, seen, shift, lse, unit, C, AXES, HIDES
        )
        for j in range(1, count):
            sums += own_sum(w)
            squares += own_sum(w * w)
            x, y, z = following(x, y, z, ends[0], ends[1], ends[2], ends[3], C[0], C[1], C[2])
            last = stage
            g += 1
            stage = g % STAGES
            phase = (g // STAGES) & 1
            s, t = scores(q, d, k_s, k_ready, stage, phase, N, S)
            weights = gl.convert_layout(w.to(q.dtype), P)
            run = warpgroup_mma(weights, k_s.index(last).reshape([N, PAD]), acc, is_async=True)
            box = (x, y, z)
            w = weigh(
                s, t, 1, k_ready.index(stage), phase, box, seen, shift, lse, unit, C, AXES, HIDES
            )
            acc = warpgroup_mma_wait(0, deps=(run,))
            mbarrier.arrive(k_free.index(last), count=1)
        sums += own_sum(w)
        squares += own_sum(w * w)
        weights = gl.convert_layout(w.to(q.dtype), P)
        run = warpgroup_mma(weights, k_s.index(stage).reshape([N, PAD]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(run,))
        mbarrier.arrive(k_free.index(stage), count=1)
        g += 1
    ROW: gl.constexpr = gl.SliceLayout(1, E)
    return acc, whole_sum(sums, ROW), whole_sum(squares, ROW), g


@gluon.jit
def solve_rows(
    WHICH: gl.constexpr, q, d, k_s, k_ready, k_free, flag, decided, item,
    p_rows, p_q, q_strides, p_lse, p_mean, p_spread, state, p_marks, p_bounds, X, Y, Z,
    heads, groups, unit, most, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The consumer of `local_linear_steps`."""
    M: gl.constexpr = q.shape[0]
    N: gl.constexpr = C[0] * C[1] * C[2]
    PAD: gl.constexpr = q.shape[1]
    S: gl.constexpr = product_layout(N)
    E: gl.constexpr = product_layout(PAD)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    n, head, first, count = item
    if count > 0:
        tokens = X * Y * Z
        plane = (n.to(gl.int64) * heads + head) * tokens
        p_list = p_rows + plane
        spread = gl.load(p_spread + (n * heads + head) // groups)
        corner, counts = item_boxes(p_list, first, count, p_bounds, X, Y, Z, M, C, AXES)
        ends = corner[1], corner[2], corner[1] + counts[1] * C[1], corner[2] + counts[2] * C[2]
        row = gl.arange(0, M, ROW)
        token = listed(p_list, first, count, row)
        still = gl.where(first + row < count, 1, 0)
        low, up = seen_by(p_bounds, X, Y, Z, token, AXES)
        seen = what_hides(low, up, AXES)
        lse = gl.load(p_lse + plane + token)
        lse = gl.where(lse - lse == 0.0, lse, float("inf"))
        p_head = p_q + n.to(gl.int64) * q_strides[0] + head.to(gl.int64) * q_strides[2]
        q.store(own_rows((p_head, q_strides[1]), token, PAD, D))
        p_head = state[1] + (n.to(gl.int64) * tokens * heads + head) * D
        residual = own_rows((p_head, heads * D), token, PAD, D)
        d.store((residual * scale(gl.sum(residual * residual, 1))[:, None]).to(d.dtype))
        fence_async_shared()
        thread_barrier()
        g = 0
        round = 0
        found = 1
        while found > 0:
            # Found anew (nothing in `found` or `g` is negative): addresses that are kept from round
            # to round, or beside the products, would not fit in registers.
            own = token + gl.minimum(found, 0)
            rows = rows_at(own, still > 0, n, head, heads, tokens, D, E)
            along = gl.sum(d.load(E).to(gl.float32) * load_at(p_mean, rows), 1)
            acc, sums, squares, g = image(
                g, counts[0] * counts[1] * counts[2], corner, ends, q, d, k_s, k_ready, k_free, seen,
                gl.convert_layout(along, ROW), lse, unit, E, C, AXES, STAGES, HIDES,
            )  # fmt: skip
            own = token + gl.minimum(g, 0)
            rows = rows_at(own, still > 0, n, head, heads, tokens, D, E)
            left = take_step(
                acc, sums, squares, q, d, rows, own, still, plane, head, spread, p_mean, state, p_marks,
                flag, decided, round, most,
            )  # fmt: skip
            still = gl.convert_layout(left, ROW)
            found = gl.max(left, 0)
            fence_async_shared()
            thread_barrier()
            round += 1


@gluon.jit
def load_rounds(
    k_desc, k_s, k_ready, k_free, flag, decided, item, p_rows, p_bounds, X, Y, Z,
    heads, groups, M: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer of `local_linear_steps`: the keys once a round."""
    n, head, first, count = item
    if count > 0:
        p_list = p_rows + (n.to(gl.int64) * heads + head) * (X * Y * Z)
        corner, counts = item_boxes(p_list, first, count, p_bounds, X, Y, Z, M, C, AXES)
        _, y, z = corner
        nx, ny, nz = counts
        g = 0
        round = 0
        found = 1
        while found > 0:
            g = load_columns(
                g, 0, nx * ny * nz, n, 0, 0, head // groups, corner, (y, z),
                (y + ny * C[1], z + nz * C[2]), (k_desc,), (k_s,), (), (), (k_ready,), (k_free,), (),
                C, AXES, STAGES,
            )  # fmt: skip
            found = goes_on(round, flag, decided)
            round += 1


@gluon.jit(do_not_specialize=["X", "heads", "groups", "shared", "tiles", "most"])
def local_linear_steps(
    k_desc, p_q, q_strides, p_lse, p_mean, p_spread, state, p_marks, p_rows, p_counts, p_bounds, X, Y, Z,
    heads, groups, shared, tiles, unit, most,
    M: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, D: gl.constexpr, PAD: gl.constexpr, EARLY: gl.constexpr = False,
):  # fmt: skip
    """At most `most` steps of the rows [N, heads, tokens] that are listed, counts [N, heads] of a head.

    M rows a program.  q by strides (batch, token, head); state as of `take_step`.
    """
    follow(EARLY)
    item = work_item(p_counts, tiles, heads, shared, M)
    DTYPE: gl.constexpr = k_desc.dtype
    BOX: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, PAD], DTYPE)
    q_s = gl.allocate_shared_memory(DTYPE, [M, PAD], BOX)
    d_s = gl.allocate_shared_memory(DTYPE, [M, PAD], BOX)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    flag = gl.allocate_shared_memory(gl.int32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_ready = barriers(STAGES, 1)
    k_free = barriers(STAGES, 1)
    decided = barriers(1, 1)
    specialised(
        solve_rows,
        (
            q_s, d_s, k_s, k_ready, k_free, flag, decided, item,
            p_rows, p_q, q_strides, p_lse, p_mean, p_spread, state, p_marks, p_bounds, X, Y, Z,
            heads, groups, unit, most, C, AXES, STAGES, HIDES, D,
        ),
        load_rounds,
        (
            k_desc, k_s, k_ready, k_free, flag, decided, item, p_rows, p_bounds, X, Y, Z,
            heads, groups, M, C, AXES, STAGES,
        ),
        1,
    )  # fmt: skip
