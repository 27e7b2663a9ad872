# mypy: ignore-errors
"""How a solve begins, for the rows of one consumer of the Hopper edition: a step along q.

Its product comes with the pass that finds the means.  Conjugate gradients start anew from what it leaves: of
directions that are kept conjugate to q, what rounding leaves of a residual along q would stay.  A last step
needs no product: its length is that of the step before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from foveal.engines.tile.hopper_compat import thread_barrier

# What `reached` holds while a tile of rows is not solved.
UNSOLVED = gl.constexpr(3.0e38)
# Squares of what a step without a product leaves of a residual: never taken to be less than LEAST, not taken
# above MOST, and above SURE only where the residual is too long without it.
LEAST, SURE, MOST = gl.constexpr(1e-4), gl.constexpr(0.01), gl.constexpr(0.0625)
# How often the squared spread of the eigenvalues, over that of their mean, a row is allowed for.
SPREADS = gl.constexpr(3.0)


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
def rows_that(rows, hold):
    """Those of `rows_at` of which this holds."""
    return rows[0], rows[1], rows[2], rows[3] & hold[:, None]


@gluon.jit
def settled(size, before, limit, image, length, rate, spread):
    """Which rows are done, which of them take a last step, and the share of size that it would leave.

    size, before: squares of the residuals after and before a step; limit: of what is allowed.  Of the
    step's direction d: image, |Ad|^2; length, |d|^2; rate, d.Ad / d.d.  A last step by 1 / rate leaves what
    eigenvalues differ from rate; their variance is the one that d has seen, or that of all keys, `spread`,
    if it is more.
    """
    level = gl.where(rate > 0.0, rate, 1.0)
    seen = image / gl.where(length > 0.0, length, 1.0) - level * level
    left = SPREADS * gl.maximum(seen, spread) / (level * level)
    left = gl.maximum(gl.maximum(left, size / gl.where(before > 0.0, before, 1.0)), LEAST)
    steps = (left < MOST) & (rate > 0.0)
    left = gl.minimum(left, 1.0)
    done = (size <= limit) | (steps & (size * left <= limit))
    return done, steps & ((size > limit) | (left < SURE)), left


@gluon.jit
def last_step(steps, size, left, at, square, rate):
    """How far rows go along the next direction, as a last step, and the square of what that leaves.

    Of the direction: at, its product with the residual; square, that with itself; the rest as of `settled`.
    """
    steps = steps & (square > 0.0)
    last = gl.where(steps, at / gl.where(steps, rate * square, 1.0), 0.0)
    return last, gl.where(steps, size * left, size)


@gluon.jit
def settle_start(
    mean, image, centre, along, squares, q_s, lse, rows, token, inside, plane, head, spread, state,
    p_marks,
):  # fmt: skip
    """The start of a solve from the mean and, with s = q.k - centre, the sums of p s k, p s and (p s)^2.

    spread: of the keys of the head, as of `local_linear_spread`.
    state: x, residual float32, direction [N, tokens, heads, D]; reached, count [N, heads, tokens]; levels
    float32 [4, N, heads, tokens] and their pitch; ridge; noise; tolerance; the longest x that the second mark
    is not set for.  Levels: the square of the residual that is allowed, the step along q, noise so far, and
    what the rounding of the mean took from x.mean.  Of solved rows x is written, in both dtypes; else
    the residual.
    """
    E: gl.constexpr = mean.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, E)
    p_rows = plane + gl.convert_layout(token, ROW)
    held = gl.convert_layout(inside.to(gl.int32), ROW) > 0
    there = held & (gl.convert_layout(lse, ROW) - gl.convert_layout(lse, ROW) == 0.0)
    ridge = gl.load(state[7] + head)
    tolerance = state[9]
    along = gl.convert_layout(along, ROW)
    met = gl.sum(q_s.load(E).to(gl.float32) * mean, 1)
    length = gl.sum(q_s.load(E).to(gl.float32) * q_s.load(E).to(gl.float32), 1)
    lost = along + gl.convert_layout(centre, ROW) - met
    image = gl.where(there[:, None], image - along[:, None] * mean, 0.0)
    # What is loaded behind a barrier takes registers from there on only.
    thread_barrier()
    image += ridge * q_s.load(E).to(gl.float32)
    energy = gl.sum(q_s.load(E).to(gl.float32) * image, 1)
    good = there & (energy > 0.0)
    energy = gl.where(good, energy, 1.0)
    alpha = gl.where(good, (met - length) / energy, 0.0)
    thread_barrier()
    residual = mean - q_s.load(E).to(gl.float32)
    before = gl.where(there, gl.sum(residual * residual, 1), 0.0)
    limit = gl.minimum(before, 4.0 * ridge) * tolerance * tolerance
    residual -= alpha[:, None] * image
    size = gl.where(there, gl.sum(residual * residual, 1), 0.0)
    turn = gl.where(good, gl.sum(residual * image, 1) / energy, 0.0)
    product = gl.sum(image * image, 1)
    drift = alpha * alpha * gl.load(state[8]) * gl.convert_layout(squares, ROW)
    p_level = state[5] + p_rows
    gl.store(p_level, limit, mask=held)
    gl.store(p_level + state[6], alpha, mask=held)
    gl.store(p_level + 2 * state[6], drift, mask=held)
    gl.store(p_level + 3 * state[6], gl.where(there, alpha * lost, 0.0), mask=held)
    rate = gl.where(good, energy / gl.where(length > 0.0, length, 1.0), 0.0)
    short, steps, left = settled(size, before, limit, product, length, rate, spread)
    store_at(state[1], rows_that(rows, short == 0), residual)
    thread_barrier()
    new = residual - turn[:, None] * q_s.load(E).to(gl.float32)
    square = gl.sum(new * new, 1)
    at = size - turn * (met - length - alpha * energy)
    last, end = last_step(steps, size, left, at, square, rate)
    x = alpha[:, None] * q_s.load(E).to(gl.float32) + last[:, None] * new
    x = gl.where(there[:, None], x, 0.0)
    store_at(state[0], rows_that(rows, short), x)
    store_at(state[2], rows_that(rows, short), x)
    ratio = gl.sqrt(gl.maximum(end, drift / 64.0) / gl.where(limit > 0.0, limit, 1.0))
    gl.store(state[3] + p_rows, gl.where(short, ratio, UNSOLVED), mask=held)
    gl.store(state[4] + p_rows, held.to(gl.int32) * 0, mask=held)
    over = held & short
    longest = gl.max(gl.where(over, gl.sum(x * x, 1), 0.0), 0)
    if (longest > state[10] * state[10]) | (gl.max(gl.where(over, ratio, 0.0), 0) > 1.0):
        gl.store(p_marks + 1, 1)
