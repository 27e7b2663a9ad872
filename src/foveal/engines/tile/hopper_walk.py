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

from foveal.engines.tile.hopper_compat import load_box, traced


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
    traced()


@gluon.constexpr_function
def product_layout(columns):
    """Of the products of a consumer, which has four warps: 16 rows a warp, `columns` an instruction."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, columns, 16])


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
    # Of volumes the tiles along the first axis come together: a window is longest there, and queries
    # and sums that all of them meet stay in the cache.
    nx = gl.cdiv(X, W * R[0])
    flat = nz == 1
    x = gl.where(flat, tile // ny, tile % nx)
    y = gl.where(flat, tile % ny, tile // (nx * nz))
    z = gl.where(flat, 0, tile // nx % nz)
    return rest // groups, head, x * W * R[0], y * R[1], z * R[2]


@gluon.jit
def share(total, split):
    """How many items are not cut, and this program's part of the boxes of the others: [low, high).

    `split` is (boxes of every item, programs that share the last `total % programs` items, number of
    the first item).
    """
    boxes, sharing, _ = split
    whole = total // sharing * sharing
    own = gl.cdiv(gl.maximum(whole - gl.program_id(0), 0), gl.num_programs(0))
    i = gl.program_id(0) + own * gl.num_programs(0) - whole
    rest = gl.where(i < sharing, (total - whole) * boxes, 0)
    return own, i * rest // sharing, (i + 1) * rest // sharing


@gluon.jit
def turns(total, split):
    """How many work items, or parts of one, this program takes."""
    own = gl.cdiv(total - gl.program_id(0), gl.num_programs(0))
    if len(split) > 0:
        own, low, high = share(total, split)
        own += gl.cdiv(high, split[0]) - low // split[0]
    return own


@gluon.jit
def taken(turn, total, split):
    """The work item of a turn, and which of its boxes: [first, stop) where items may be cut."""
    t = gl.program_id(0) + turn * gl.num_programs(0)
    first = 0
    stop = 1
    if len(split) > 0:
        boxes, sharing, base = split
        own, low, high = share(total, split)
        item = low // boxes + turn - own
        cut = turn >= own
        t = base + gl.where(cut, total // sharing * sharing + item, t)
        first = gl.where(cut, gl.maximum(low - item * boxes, 0), 0)
        stop = gl.where(cut, gl.minimum(high - item * boxes, boxes), boxes)
    return t, first, stop


@gluon.jit
def part_slot(turn, total, split):
    """Where a part of an item is written: a program takes parts of one item or of two in succession."""
    own, _, _ = share(total, split)
    i = gl.program_id(0) + own * gl.num_programs(0) - total // split[1] * split[1]
    return 2 * i + turn - own


@gluon.jit
def store_part(parts, at, x):
    """Writes a box of rows of a part, fp32, as box `at` of parts [boxes, rows, columns]."""
    M: gl.constexpr = x.shape[0]
    D: gl.constexpr = x.shape[1]
    row = gl.arange(0, M, gl.SliceLayout(1, x.type.layout))
    column = gl.arange(0, D, gl.SliceLayout(0, x.type.layout))
    gl.store(parts + ((at * M + row).to(gl.int64)[:, None] * D + column[None, :]), x)


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
def boxes(
    p_bounds, X, Y, Z, x, y, z, W: gl.constexpr, R: gl.constexpr, C: gl.constexpr,
    AXES: gl.constexpr, ALIGN: gl.constexpr,
):  # fmt: skip
    """Start and number of the boxes of columns that the tile of rows at (x, y, z) walks, per axis."""
    bx, nx = reach(p_bounds, 0, X, x, W * R[0], C[0], ALIGN if AXES == 1 else 1)
    by, ny, bz, nz = 0, 1, 0, 1
    if AXES > 1:
        by, ny = reach(p_bounds, 2 * X, Y, y, R[1], C[1], ALIGN if AXES == 2 else 1)
    if AXES > 2:
        bz, nz = reach(p_bounds, 2 * X + 2 * Y, Z, z, R[2], C[2], ALIGN)
    return (bx, by, bz), (nx, ny, nz)


@gluon.jit
def seen_whole(p_bounds, X, Y, Z, x, y, z, R: gl.constexpr):
    """What all rows of the box at (x, y, z) see: `last_low` and `first_up` of `whole`."""
    _, x_last, x_first, _ = ends(p_bounds, 0, X, x, R[0])
    _, y_last, y_first, _ = ends(p_bounds, 2 * X, Y, y, R[1])
    _, z_last, z_first, _ = ends(p_bounds, 2 * X + 2 * Y, Z, z, R[2])
    return (x_last, y_last, z_last), (x_first, y_first, z_first)


@gluon.jit
def seen_by_rows(p_bounds, X, Y, Z, x, y, z, row, R: gl.constexpr):
    """What each row of the box at (x, y, z) sees: `low` and `width` of `visible`."""
    lx, wx = row_bounds(p_bounds, 0, X, x, row, R[1] * R[2], R[0])
    ly, wy = row_bounds(p_bounds, 2 * X, Y, y, row, R[2], R[1])
    lz, wz = row_bounds(p_bounds, 2 * X + 2 * Y, Z, z, row, 1, R[2])
    return (lx, ly, lz), (wx, wy, wz)


@gluon.jit
def own_boxes(p_bounds, X, x, bx, nx, R: gl.constexpr, C: gl.constexpr):
    """Which boxes of the first axis one consumer's rows see: [first, stop), at least one."""
    low, _, _, up = ends(p_bounds, 0, X, x, R[0])
    first = gl.minimum((low - bx) // C[0], nx - 1)
    return first, gl.maximum(gl.minimum(gl.cdiv(up - bx, C[0]), nx), first + 1)


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
def load_columns(
    g, first, stop, n, line, bias_line, head, corner, start, end, columns, column_s, statistics, statistic_s,
    column_ready, column_free, biases, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The boxes [first, stop) of columns of a head, from `corner` on.  Returns how many there were so far."""
    bx, by, bz = corner
    for j in range(first, stop):
        stage = g % STAGES
        phase = (g // STAGES) & 1
        for i in gl.static_range(len(columns)):
            mbarrier.wait(column_free[i].index(stage), phase ^ 1)
            if len(statistics) > 0:
                copy_statistics(
                    statistics[i], columns[i], line,
                    bx, by, bz, column_ready[i].index(stage), statistic_s[i].index(stage), AXES,
                )  # fmt: skip
            elif (i == 0) & (len(biases) > 0):
                copy_statistics(
                    biases[0], columns[0], bias_line, bx, by, bz,
                    column_ready[0].index(stage), biases[1].index(stage), AXES,
                )  # fmt: skip
            else:
                mbarrier.expect(column_ready[i].index(stage), columns[i].block_type.nbytes)
            copy_box(
                columns[i], n, bx, by, bz, head,
                column_ready[i].index(stage), column_s[i].index(stage), AXES,
            )  # fmt: skip
        bx, by, bz = following(bx, by, bz, start[0], start[1], end[0], end[1], C[0], C[1], C[2])
        g += 1
    return g


@gluon.jit
def load_item(
    turn, g, rows, row_s, row_ready, row_free,
    columns, column_s, statistics, statistic_s, column_ready, column_free,
    p_bounds, X, Y, Z, heads, shared, total, divide, multiply, split, biases,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The rows of a work item, then its boxes of columns, in order.  Returns how many there were so far."""
    # The copy of numbers along the last axis starts at 16 bytes.
    ALIGN: gl.constexpr = 1 if len(statistics) + len(biases) == 0 else 4
    t, first, stop = taken(turn, total, split)
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
    if len(split) > 0:
        cx += first * C[0]
    else:
        stop = nx * ny * nz
    first_head = head // divide * multiply
    bias_line = 0
    if len(biases) > 0:
        bias_line = n * biases[2] + head // biases[3]
    for member in range(multiply):
        g = load_columns(
            g, first, stop, n, (n * heads + head) * multiply + member, bias_line, first_head + member,
            (cx, y0, z0), (y0, z0), (y0 + ny * C[1], z0 + nz * C[2]),
            columns, column_s, statistics, statistic_s, column_ready, column_free, biases, C, AXES, STAGES,
        )  # fmt: skip
    return g


@gluon.jit
def load_boxes(
    rows, row_s, row_ready, row_free,
    columns, column_s, statistics, statistic_s, column_ready, column_free,
    p_bounds, X, Y, Z, heads, shared, total, divide, multiply, split, biases,
    W: gl.constexpr, R: gl.constexpr, C: gl.constexpr, AXES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: the rows of every work item, then its boxes of columns, in order.

    `rows` and `columns` are tuples of one or two descriptors that travel together, each of the columns
    with one of the `statistics` [N Hq, *grid], if there are any, or the first with `biases`: their
    descriptor [lines, *grid], buffers, lines per batch entry, and heads of the rows per line.  Head h of
    the rows reads the heads h // divide * multiply + [0, multiply) of the columns.

    Here as elsewhere in these kernels the body of a loop is a function: the compiler's front end visits
    what stands in a loop twice, in a loop of that loop four times, but a function once.
    """
    g = 0
    for turn in range(turns(total, split)):
        g = load_item(
            turn, g, rows, row_s, row_ready, row_free,
            columns, column_s, statistics, statistic_s, column_ready, column_free,
            p_bounds, X, Y, Z, heads, shared, total, divide, multiply, split, biases, W, R, C, AXES, STAGES,
        )  # fmt: skip


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
