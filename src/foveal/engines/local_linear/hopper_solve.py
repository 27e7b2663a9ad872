# mypy: ignore-errors
"""How a solve begins, for the rows of one consumer of the Hopper edition: a step along q.

Steps of all rows are kept orthogonal to it; its product comes with the pass that finds the means.  A last
step needs no product: its length is that of the step before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# What `reached` holds while a tile of rows is not solved.
UNSOLVED = gl.constexpr(3.0e38)
# A step without a product is taken to leave no less than a tenth of a residual, and not taken where
# the step before it left more than an eighth.
LEAST, MOST = gl.constexpr(0.01), gl.constexpr(0.0625)


@gluon.jit
def rows_at(token, inside, n, head, heads, tokens, D: gl.constexpr, E: gl.constexpr):
    """Rows of [N, tokens, heads, D] in the layout E: where each starts, its columns, which exist.

    Columns in two parts: that of a thread, and a constant of a register, which an instruction can hold.
    Sums of both would take a register for every pair of columns.
    """
    PAD: gl.constexpr = E.instr_shape[1]
    own = gl.convert_layout(token, gl.SliceLayout(1, E))
    held = gl.convert_layout(inside.to(gl.int32), gl.SliceLayout(1, E)) > 0
    column = gl.arange(0, PAD, gl.SliceLayout(0, E))
    starts = ((n.to(gl.int64) * tokens + own) * heads + head) * D
    kept = held[:, None]
    if D < PAD:
        kept = kept & (column < D)[None, :]
    return starts, column % 8, column // 8 * 8, kept


@gluon.jit
def load_at(p, rows):
    place = (p + rows[0])[:, None] + rows[1][None, :]
    return gl.load(place + rows[2][None, :], mask=rows[3], other=0.0)


@gluon.jit
def store_at(p, rows, x):
    place = (p + rows[0])[:, None] + rows[1][None, :]
    gl.store(place + rows[2][None, :], x.to(p.dtype.element_ty), mask=rows[3])


@gluon.jit
def scaled(d):
    """Rows of length 64: in 16 bits small numbers would lose digits, and products of long rows overflow."""
    square = gl.sum(d * d, 1)
    return d * (64.0 / gl.sqrt(gl.where(square > 1e-30, square, 1.0)))[:, None]


@gluon.jit
def leave(size, before, limit, at, new, rate, inside):
    """Whether all rows are done, and the length of a last step along `new` of each.

    size, before: squares of the residuals after and before a step; limit: of what is allowed; rate: the
    step's d.Ad / d.d; at: residual.new.
    """
    left = gl.maximum(4.0 * size / gl.where(before > 0.0, before, 1.0), LEAST)
    steps = left < MOST
    end = gl.where(steps, gl.minimum(size * left, size), size)
    short = (size <= limit) | (steps & (end <= limit))
    open_rows = gl.max(gl.where(short, 0, 1), 0)
    length = gl.sum(new * new, 1)
    last = gl.where(
        steps & (rate > 0.0) & (length > 0.0),
        at / (rate * gl.where(length > 0.0, length, 1.0)),
        0.0,
    )
    return open_rows == 0, last, gl.where(steps, end, size)


@gluon.jit
def settle_start(
    mean, image, centre, along, squares, q_s, lse, rows, token, inside, plane, head, state, p_marks
):
    """The start of a solve from the mean and, with s = q.k - centre, the sums of p s k, p s and (p s)^2.

    state: x, residual float32, direction, and image of q float32 [N, tokens, heads, D]; reached, count
    [N, heads, tokens]; levels float32 [5, N, heads, tokens] and their pitch; ridge; noise; tolerance; the
    longest x that the second mark is not set for.  Levels: the square of the residual that is allowed, the
    step along q, q.A q, noise so far, and what the rounding of the mean took from x.mean.
    """
    E: gl.constexpr = mean.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, E)
    p_rows = plane + gl.convert_layout(token, ROW)
    held = gl.convert_layout(inside.to(gl.int32), ROW) > 0
    there = held & (gl.convert_layout(lse, ROW) - gl.convert_layout(lse, ROW) == 0.0)
    ridge = gl.load(state[8] + head)
    tolerance = state[10]
    q = gl.where(there[:, None], q_s.load(E).to(gl.float32), 0.0)
    b = mean - q
    before = gl.sum(b * b, 1)
    limit = gl.minimum(before, 4.0 * ridge) * tolerance * tolerance
    along = gl.convert_layout(along, ROW)
    lost = along + gl.convert_layout(centre, ROW) - gl.sum(q * mean, 1)
    image = image - along[:, None] * mean + ridge * q
    image = gl.where(there[:, None], image, 0.0)
    energy = gl.sum(q * image, 1)
    good = energy > 0.0
    energy = gl.where(good, energy, 1.0)
    alpha = gl.where(good, gl.sum(q * b, 1) / energy, 0.0)
    residual = b - alpha[:, None] * image
    size = gl.sum(residual * residual, 1)
    turn = gl.where(good, gl.sum(residual * image, 1) / energy, 0.0)
    store_at(state[3], rows, image)
    share = gl.where(there, gl.where(good, energy, float("inf")), -1.0)
    drift = alpha * alpha * gl.load(state[9]) * gl.convert_layout(squares, ROW)
    p_level = state[6] + p_rows
    gl.store(p_level, limit, mask=held)
    gl.store(p_level + state[7], alpha, mask=held)
    gl.store(p_level + 2 * state[7], share, mask=held)
    gl.store(p_level + 3 * state[7], drift, mask=held)
    gl.store(p_level + 4 * state[7], gl.where(there, alpha * lost, 0.0), mask=held)
    new = residual - turn[:, None] * q
    length = gl.sum(q * q, 1)
    rate = gl.where(good, energy / gl.where(length > 0.0, length, 1.0), 0.0)
    done, last, end = leave(size, before, limit, gl.sum(residual * new, 1), new, rate, held)
    if done:
        x = alpha[:, None] * q + last[:, None] * new
        store_at(state[0], rows, x)
        store_at(state[2], rows, x)
        store_at(state[1], rows, x * 0.0)
        ratio = gl.sqrt(gl.maximum(end, drift / 64.0) / gl.where(limit > 0.0, limit, 1.0))
        gl.store(state[4] + p_rows, ratio, mask=held)
        gl.store(state[5] + p_rows, held.to(gl.int32) * 0, mask=held)
        longest = gl.max(gl.sum(x * x, 1), 0)
        if (longest > state[11] * state[11]) | (gl.max(ratio, 0) > 1.0):
            gl.store(p_marks + 1, 1)
    else:
        store_at(state[2], rows, scaled(new))
        gl.store(state[4] + p_rows, limit * 0.0 + UNSOLVED, mask=held)
