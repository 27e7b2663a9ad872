"""A step of conjugate gradients for rows whose product with the keys is there, and what comes first.

Steps of all rows are kept orthogonal to a first one along q, whose product comes with the pass that finds
the means.  A last step needs no product: its length is that of the step before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.engines.common.tiles import load_rows, store_rows
from foveal.engines.local_linear.solve import UNSOLVED

# A step without a product is taken to leave no less than a tenth of a residual, and not taken where
# the step before it left more than an eighth.
LEAST, MOST = tl.constexpr(0.01), tl.constexpr(0.0625)


@triton.jit
def local_linear_prepare(
    p_k, p_noise, p_marks, k_strides, tokens, heads, total, rounding,
    D: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Clears both marks; noise: rounding squared times the mean square of ROWS of the `total` keys."""
    at = (tl.arange(0, ROWS).to(tl.int64) * total) // ROWS
    n = at // heads // tokens
    place = n * k_strides[0] + at // heads % tokens * k_strides[1] + at % heads * k_strides[2]
    k = load_rows(p_k + place, at < total, D, PAD, True).to(tl.float32)
    k = tl.where(k - k == 0.0, k, 0.0)
    square = tl.sum(tl.sum(k * k, 1), 0) / ROWS
    tl.store(p_noise, rounding * rounding * square)
    tl.store(p_marks + tl.arange(0, 2), tl.zeros([2], tl.int32))


@triton.jit
def _leave(size, before, limit, at, length, rate):
    """Which rows are done, how far the last step goes, and what it leaves: squares of residuals."""
    left = tl.maximum(4.0 * size / tl.where(before > 0.0, before, 1.0), LEAST)
    steps = left < MOST
    end = tl.where(steps, tl.minimum(size * left, size), size)
    short = (size <= limit) | (steps & (end <= limit))
    goes = steps & (rate > 0.0) & (length > 0.0)
    last = at / tl.where(goes, rate * length, 1.0)
    return short, tl.where(goes, last, 0.0), end


@triton.jit
def local_linear_advance(
    p_q, p_image, p_mean, p_x, p_residual, p_direction, p_of_q, p_reached, p_count, p_levels, pitch,
    p_ridge, p_noise, p_marks, q_strides, heads, tokens, longest, count,
    D: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One step of ROWS rows of one head with the image sum w k of their direction.

    image, mean, x, residual, of_q float32 and direction [N, tokens, heads, D]; levels float32 [7, N, heads,
    tokens], `pitch` apart: the square of the residual that is allowed, the step along q, q.A q, noise so far,
    sums of w and of w^2, and what the rounding of the mean took from x.mean.  count: 1 at the first step.
    The second mark is set where an x is longer than `longest`.
    """
    blocks = tl.cdiv(tokens, ROWS)
    program = tl.program_id(0)
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    h = program // blocks % heads
    n = (program // blocks // heads).to(tl.int64)
    held = row < tokens
    p_rows = (n * heads + h) * tokens + row
    reached = tl.load(p_reached + p_rows, mask=held, other=0.0)
    if tl.max(reached, 0) < UNSOLVED:
        return
    place = ((n * tokens + row) * heads + h) * D
    ridge = tl.load(p_ridge + h)
    noise = tl.load(p_noise)
    p_level = p_levels + p_rows
    d = load_rows(p_direction + place, held, D, PAD, True).to(tl.float32)
    mean = load_rows(p_mean + place, held, D, PAD, True)
    image = load_rows(p_image + place, held, D, PAD, True)
    sums = tl.load(p_level + 4 * pitch, mask=held, other=0.0)
    squares = tl.load(p_level + 5 * pitch, mask=held, other=0.0)
    limit = tl.load(p_level, mask=held, other=0.0)
    # The mean was rounded; with this the product stays symmetric.
    image += ridge * d - sums[:, None] * mean
    energy = tl.sum(d * image, 1)
    length = tl.sum(d * d, 1)
    good = energy > 0.0
    energy = tl.where(good, energy, 1.0)
    rate = tl.where(good, energy / tl.where(length > 0.0, length, 1.0), 0.0)
    p_rows_q = p_q + n * q_strides[0] + row.to(tl.int64) * q_strides[1] + h * q_strides[2]
    q = load_rows(p_rows_q, held, D, PAD, True).to(tl.float32)
    of_q = load_rows(p_of_q + place, held, D, PAD, True)
    alpha = tl.load(p_level + pitch, mask=held, other=0.0)
    share = tl.load(p_level + 2 * pitch, mask=held, other=float("inf"))
    if count == 1:
        seen = share > 0.0
        residual = tl.where(seen[:, None], mean - q - alpha[:, None] * of_q, 0.0)
        x = alpha[:, None] * q
    else:
        residual = load_rows(p_residual + place, held, D, PAD, True)
        x = load_rows(p_x + place, held, D, PAD, True)
    before = tl.sum(residual * residual, 1)
    step = tl.where(good & (before > limit), tl.sum(residual * d, 1) / energy, 0.0)
    residual -= step[:, None] * image
    size = tl.sum(residual * residual, 1)
    turn = -tl.sum(residual * image, 1) / energy
    new = residual + turn[:, None] * d
    new -= (tl.sum(residual * of_q, 1) / tl.where(share > 0.0, share, 1.0))[:, None] * q
    x += step[:, None] * d
    drift = step * step * noise * squares + tl.load(p_level + 3 * pitch, mask=held, other=0.0)
    lost = tl.load(p_level + 6 * pitch, mask=held, other=0.0)
    tl.store(p_level + 6 * pitch, lost + step * sums, mask=held)
    square = tl.sum(new * new, 1)
    short, last, end = _leave(size, before, limit, tl.sum(residual * new, 1), square, rate)
    if tl.min(tl.where(short | (row >= tokens), 1, 0), 0) > 0:
        x += last[:, None] * new
        store_rows(p_direction + place, x.to(p_direction.dtype.element_ty), held, D, PAD)
        store_rows(p_residual + place, x * 0.0, held, D, PAD)
        worst = tl.maximum(end, drift / 64.0)
        ratio = tl.sqrt(worst / tl.where(limit > 0.0, limit, 1.0))
        tl.store(p_reached + p_rows, ratio, mask=held)
        tl.store(p_count + p_rows, tl.zeros([ROWS], tl.int32) + count, mask=held)
        if tl.max(tl.sum(x * x, 1), 0) > longest * longest:
            tl.store(p_marks + 1, 1)
    else:
        factor = 64.0 / tl.sqrt(tl.where(square > 1e-30, square, 1.0))
        store_rows(
            p_direction + place,
            (new * factor[:, None]).to(p_direction.dtype.element_ty),
            held,
            D,
            PAD,
        )
        store_rows(p_residual + place, residual, held, D, PAD)
        tl.store(p_level + 3 * pitch, drift, mask=held)
    store_rows(p_x + place, x, held, D, PAD)
