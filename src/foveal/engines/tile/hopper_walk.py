# mypy: ignore-errors
"""What the Hopper kernels share: which boxes a tile walks, who loads them, and what a box hides.

A work item is one tile of one head: W boxes R of rows that lie side by side on the first axis, one
for each consumer.  Per axis its rows see [lower[first], upper[last]) of the other
side; boxes C of columns cover that range from its start, the last axis fastest.
Rows are queries and columns keys in the forward and in dQ, and the reverse in dK and dV.
`p_bounds` int32 holds lower and upper of the rows, axis after axis.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from foveal.engines.tile.hopper_compat import load_box


@gluon.jit
def barriers(n: gl.constexpr, count: gl.constexpr):
    """n barriers that each wait for `count` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(bars.index(i), count)
    return bars


@gluon.jit
def numbered(WHICH: gl.constexpr, consumer: gl.constexpr, arguments):
    consumer(WHICH, *arguments)


@gluon.jit
def alone(producer: gl.constexpr, arguments):
    producer(*arguments)


@gluon.jit
def specialised(
    consumer: gl.constexpr, consumed, producer: gl.constexpr, produced, W: gl.constexpr
):
    """Runs W consumers of four warps, each told its number, beside one warp of the producer."""
    if W == 1:
        gl.warp_specialize(
            [(numbered, (0, consumer, consumed)), (alone, (producer, produced))],
            [1],
            [40],
        )
    elif W == 2:
        gl.warp_specialize(
            [
                (numbered, (0, consumer, consumed)),
                (numbered, (1, consumer, consumed)),
                (alone, (producer, produced)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (numbered, (0, consumer, consumed)),
                (numbered, (1, consumer, consumed)),
                (numbered, (2, consumer, consumed)),
                (alone, (producer, produced)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )


@gluon.jit
def place(t, X, Y, Z, heads, shared, W: gl.constexpr, R: gl.constexpr, LAST_FIRST: gl.constexpr):
    """Batch, head and first row of work item t.

    `shared` heads are walked together, so that their columns stay in the cache.  When causal the
    longest tiles are the last of the queries and the first of the keys; they come first.
    """
    ny = gl.cdiv(Y, R[1])
    nz = gl.cdiv(Z, R[2])
    tiles = gl.cdiv(X, W * R[0]) * ny * nz
    tile = (t // shared) % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    rest = t // (shared * tiles)
    groups = heads // shared
    head = rest % groups * shared + t % shared
    return (
        rest // groups,
        head,
        tile // (ny * nz) * W * R[0],
        tile // nz % ny * R[1],
        tile % nz * R[2],
    )


@gluon.jit
def ends(p_bounds, base, length, first, count):
    """Smallest and largest lower end, smallest and largest upper end of rows [first, first + count)."""
    a = gl.minimum(first, length - 1)
    b = gl.minimum(first + count, length) - 1
    a += base
    b = gl.maximum(a, b + base)
    return (
        gl.load(p_bounds + a),
        gl.load(p_bounds + b),
        gl.load(p_bounds + (a + length)),
        gl.load(p_bounds + (b + length)),
    )


@gluon.jit
def reach(p_bounds, base, length, first, count, C: gl.constexpr, ALIGN: gl.constexpr):
    """Where the boxes of an axis start, and how many there are: at least one, which may be empty."""
    start, _, _, stop = ends(p_bounds, base, length, first, count)
    start = start // ALIGN * ALIGN
    return start, gl.maximum(gl.cdiv(stop - start, C), 1)


@gluon.jit
def following(x, y, z, y0, z0, y1, z1, CX: gl.constexpr, CY: gl.constexpr, CZ: gl.constexpr):
    """The box after (x, y, z); y0, z0 and y1, z1 are where the last two axes start and stop."""
    z = z + CZ
    turn = z >= z1
    z = gl.where(turn, z0, z)
    y = gl.where(turn, y + CY, y)
    turn = y >= y1
    y = gl.where(turn, y0, y)
    x = gl.where(turn, x + CX, x)
    return x, y, z


@gluon.jit
def copy_box(desc, n, x, y, z, head, ready, buffer, AXES: gl.constexpr):
    """Starts the copy of one box.  With three axes the descriptor holds one batch entry."""
    if AXES == 1:
        load_box(desc, [n, x, head, 0], ready, buffer)
    elif AXES == 2:
        load_box(desc, [n, x, y, head, 0], ready, buffer)
    else:
        load_box(desc, [x, y, z, head, 0], ready, buffer)


@gluon.jit
def copy_statistics(desc, partner, line, x, y, z, ready, buffer, AXES: gl.constexpr):
    """Starts the copy of a box of one number per query, and expects it and its partner."""
    mbarrier.expect(ready, desc.block_type.nbytes + partner.block_type.nbytes)
    if AXES == 1:
        load_box(desc, [line, x], ready, buffer)
    elif AXES == 2:
        load_box(desc, [line, x, y], ready, buffer)
    else:
        load_box(desc, [line, x, y, z], ready, buffer)


@gluon.jit
def load_boxes(
    rows, row_s, row_ready, row_free,
    columns, column_s, statistics, statistic_s, column_ready, column_free,
    p_bounds, X, Y, Z, heads, shared, total, divide, multiply,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: the rows of every work item, then its boxes of columns, in order.

    `rows` and `columns` are tuples of one or two descriptors that travel together, each of the columns
    with one of the `statistics` [N Hq, *grid], if there are any.  Head h of the rows reads the
    heads h // divide * multiply + [0, multiply) of the columns.
    """
    # The copy of numbers along the last axis starts at 16 bytes.
    ALIGN: gl.constexpr = 1 if len(statistics) == 0 else 4
    g = 0
    turn = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        n, head, x, y, z = place(t, X, Y, Z, heads, shared, W, R, len(statistics) == 0)
        for c in gl.static_range(W):
            for i in gl.static_range(len(rows)):
                mbarrier.wait(row_free[i].index(c), (turn & 1) ^ 1)
                mbarrier.expect(row_ready[i].index(c), rows[i].block_type.nbytes)
                copy_box(
                    rows[i], n, x + c * R[0], y, z, head, row_ready[i].index(c), row_s[i].index(c), AXES,
                )  # fmt: skip
        cx, nx = reach(p_bounds, 0, X, x, W * R[0], C[0], ALIGN if AXES == 1 else 1)
        y0, ny = reach(p_bounds, 2 * X, Y, y, R[1], C[1], ALIGN if AXES == 2 else 1)
        z0, nz = reach(p_bounds, 2 * X + 2 * Y, Z, z, R[2], C[2], ALIGN if AXES == 3 else 1)
        first_head = head // divide * multiply
        for member in range(multiply):
            bx, by, bz = cx, y0, z0
            for j in range(nx * ny * nz):
                stage = g % STAGES
                phase = (g // STAGES) & 1
                for i in gl.static_range(len(columns)):
                    mbarrier.wait(column_free[i].index(stage), phase ^ 1)
                    if len(statistics) > 0:
                        copy_statistics(
                            statistics[i], columns[i], (n * heads + head) * multiply + member,
                            bx, by, bz, column_ready[i].index(stage), statistic_s[i].index(stage), AXES,
                        )  # fmt: skip
                    else:
                        mbarrier.expect(column_ready[i].index(stage), columns[i].block_type.nbytes)
                    copy_box(
                        columns[i], n, bx, by, bz, first_head + member,
                        column_ready[i].index(stage), column_s[i].index(stage), AXES,
                    )  # fmt: skip
                bx, by, bz = following(
                    bx, by, bz, y0, z0, y0 + ny * C[1], z0 + nz * C[2], C[0], C[1], C[2]
                )
                g += 1
        turn += 1


@gluon.jit
def skip_boxes(g, count, column_ready, column_free, STAGES: gl.constexpr):
    """Gives back boxes that the rows of this consumer do not see.

    It waits for them first: a barrier counts each consumer once a round.
    """
    for j in range(g, g + count):
        stage = j % STAGES
        for i in gl.static_range(len(column_ready)):
            mbarrier.wait(column_ready[i].index(stage), (j // STAGES) & 1)
            mbarrier.arrive(column_free[i].index(stage), count=1)
    return g + count


@gluon.jit
def row_bounds(p_bounds, base, length, first, row, DIVIDE: gl.constexpr, MODULO: gl.constexpr):
    """Per row of a box, its lower end on one axis and how many columns it sees there."""
    i = gl.minimum(first + row // DIVIDE % MODULO, length - 1)
    lower = gl.load(p_bounds + (base + i))
    return lower, gl.load(p_bounds + (base + length + i)) - lower


@gluon.jit
def visible(x, y, z, low, width, LAYOUT: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr):
    """Which pairs of these rows and the box of columns at (x, y, z) are visible.  [rows, columns]"""
    c = gl.arange(0, C[0] * C[1] * C[2], gl.SliceLayout(0, LAYOUT))
    # The distance of the row comes first: column minus lower end would not change from box to box,
    # and compilers then keep it in registers for every pair.
    at = (c // (C[1] * C[2]))[None, :] + (x - low[0])[:, None]
    seen = at.to(gl.uint32) < width[0][:, None].to(gl.uint32)
    if AXES > 1:
        at = (c // C[2] % C[1])[None, :] + (y - low[1])[:, None]
        seen &= at.to(gl.uint32) < width[1][:, None].to(gl.uint32)
    if AXES > 2:
        at = (c % C[2])[None, :] + (z - low[2])[:, None]
        seen &= at.to(gl.uint32) < width[2][:, None].to(gl.uint32)
    return seen


@gluon.jit
def whole(x, y, z, last_low, first_up, C: gl.constexpr, AXES: gl.constexpr):
    """Whether every row sees all of the box of columns at (x, y, z)."""
    full = (x >= last_low[0]) & (x + C[0] <= first_up[0])
    if AXES > 1:
        full &= (y >= last_low[1]) & (y + C[1] <= first_up[1])
    if AXES > 2:
        full &= (z >= last_low[2]) & (z + C[2] <= first_up[2])
    return full
