"""Long causal convolutions as one Fourier transform of the sequence's own length, and one back.

With M >= length points, D = exp(-i pi n / (2 M)) and the transform F of length M,

    y = Re conj(D) F^-1 (F D filter) (F D x)

is the causal convolution: F D x is the odd half of the transform of 2 M real numbers, x and as many
zeros, and conjugate symmetry makes the odd half all of it.  No zeros are transformed.

A piece of SIZE = FIRST x SECOND x STEP tokens, STEP apart, is transformed by FIRST points in registers (a
tuple of values per thread), an exchange through shared memory, and SECOND points.  Results stand in
place, in digit-reversed order, and the inverse starts from there.  A longer sequence takes several
launches with pieces of it.  Gluon, because the passes of Triton that choose layouts take minutes
for tuples of this length, and because the exchange wants shared memory.
"""

# mypy: disable-error-code="assignment,var-annotated"
from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _cosine(turn: int, turns: int) -> float:
    return math.cos(2 * math.pi * turn / turns)


@gluon.constexpr_function
def _sine(turn: int, turns: int) -> float:
    return math.sin(2 * math.pi * turn / turns)


@gluon.constexpr_function
def _steps(count: int) -> int:
    return count.bit_length() - 1


@gluon.constexpr_function
def _layout(lanes: int, axis: int, warps: int, warp: int) -> gl.BlockedLayout:
    """For tiles of `lanes` along axis 2 and the rows of a tuple's values along `axis`."""
    near = min(lanes, warp)
    far = max(min(lanes // near, warps), 1)
    threads, groups = [1, 1, near], [1, 1, far]
    threads[axis] = warp // near
    groups[axis] = warps // far
    return gl.BlockedLayout([1, 1, 1], threads, groups, [2, axis, 1 - axis])


@gluon.jit
def _halved(re, im, HALF: gl.constexpr, STRIDE: gl.constexpr, SIGN: gl.constexpr):
    """One step of a transform: STRIDE of 2 HALF points each, to twice as many of half as many."""
    new_re = ()
    new_im = ()
    for p in gl.static_range(HALF):
        for q in gl.static_range(STRIDE):
            new_re += (re[q + STRIDE * p] + re[q + STRIDE * (p + HALF)],)
            new_im += (im[q + STRIDE * p] + im[q + STRIDE * (p + HALF)],)
        for q in gl.static_range(STRIDE):
            a = re[q + STRIDE * p] - re[q + STRIDE * (p + HALF)]
            b = im[q + STRIDE * p] - im[q + STRIDE * (p + HALF)]
            if p == 0:
                new_re += (a,)
                new_im += (b,)
            elif 2 * p == HALF:  # times -i forward, i back
                new_re += (SIGN * b,)
                new_im += (-SIGN * a,)
            else:
                new_re += (a * _cosine(p, 2 * HALF) + b * (SIGN * _sine(p, 2 * HALF)),)
                new_im += (b * _cosine(p, 2 * HALF) - a * (SIGN * _sine(p, 2 * HALF)),)
    return new_re, new_im


@gluon.jit
def _transformed(re, im, COUNT: gl.constexpr, SIGN: gl.constexpr):
    """sum_n z[n] exp(-SIGN 2 pi i k n / COUNT) for tuples of COUNT values, a power of two."""
    for step in gl.static_range(_steps(COUNT)):
        re, im = _halved(re, im, COUNT >> (step + 1), 1 << step, SIGN)
    return re, im


@gluon.jit(do_not_specialize=["length"])
def convolution_fourier_forward(
    p_x, p_pre, p_z, p_filter, p_skip, p_post, p_plain, p_y, p_turn, p_near_turn,
    length,
    WIDTH: gl.constexpr, EACH: gl.constexpr,
    POINTS: gl.constexpr, SIZE: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr,
    NEAR: gl.constexpr, CHANNELS: gl.constexpr, WARP: gl.constexpr,
    FORWARD: gl.constexpr, INVERSE: gl.constexpr, CONJUGATE: gl.constexpr,
    FROM_GRID: gl.constexpr, TO_GRID: gl.constexpr,
):  # fmt: skip
    """Transforms of x or z, along pieces of SIZE of POINTS tokens, times the spectrum of a filter, and back.

    x and y with their gates and plain (y before its gate) are [B, length, WIDTH]; z and the spectrum of the
    filter, EACH elements per sample apart, [B, 2, POINTS, WIDTH], real parts first.
    turn [2, SIZE] and near_turn [2, SIZE / FIRST]: cosine and sine of what stands behind a transform of
    FIRST and of SECOND points.  A program holds NEAR neighbouring tokens and CHANNELS.
    """
    STEP: gl.constexpr = SIZE // (FIRST * SECOND)
    PART: gl.constexpr = SIZE // FIRST
    LANES: gl.constexpr = NEAR * CHANNELS
    BLOCKS: gl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    OUTER: gl.constexpr = _layout(LANES, 1, gl.num_warps(), WARP)
    INNER: gl.constexpr = _layout(LANES, 0, gl.num_warps(), WARP)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    item = gl.program_id(0)
    first_c = (item % BLOCKS) * CHANNELS
    rest = item // BLOCKS
    first_near = (rest % (STEP // NEAR)) * NEAR
    rest = rest // (STEP // NEAR)
    piece = (rest % (POINTS // SIZE)) * SIZE
    b = (rest // (POINTS // SIZE)).to(gl.int64)

    lane = gl.arange(0, LANES, gl.SliceLayout(0, gl.SliceLayout(1, OUTER)))[None, None, :]
    row = gl.arange(0, SECOND, gl.SliceLayout(0, gl.SliceLayout(2, OUTER)))[None, :, None]
    c = first_c + lane % CHANNELS
    real = c < WIDTH
    outer = row * STEP + first_near + lane // CHANNELS
    left = gl.where(real, length - outer, 0)
    place = outer * WIDTH + c
    turn = outer
    if p_z is not None:
        p_z += b * (2 * POINTS * WIDTH) + piece * WIDTH
    if FORWARD:
        re = ()
        im = ()
        for r in gl.static_range(FIRST):
            if FROM_GRID:
                own = b * length * WIDTH + r * PART * WIDTH
                x = gl.load(p_x + own + place, mask=left > r * PART, other=0.0).to(gl.float32)
                if p_pre is not None:
                    x *= gl.load(p_pre + own + place, mask=left > r * PART, other=0.0).to(
                        gl.float32
                    )
                re += (x * _cosine(r, 4 * FIRST),)
                im += (x * -_sine(r, 4 * FIRST),)
            else:
                p_own = p_z + r * PART * WIDTH
                re += (gl.load(p_own + place, mask=real, other=0.0),)
                im += (gl.load(p_own + POINTS * WIDTH + place, mask=real, other=0.0),)
        re, im = _transformed(re, im, FIRST, 1)
        new_re = ()
        new_im = ()
        for r in gl.static_range(FIRST):
            cosine = gl.load(p_turn + r * PART + turn)
            sine = gl.load(p_turn + SIZE + r * PART + turn)
            new_re += (re[r] * cosine + im[r] * sine,)
            new_im += (im[r] * cosine - re[r] * sine,)
        re = new_re
        im = new_im
        if SECOND == 1:
            for r in gl.static_range(FIRST):
                gl.store(p_z + r * PART * WIDTH + place, re[r], mask=real)
                gl.store(p_z + (POINTS + r * PART) * WIDTH + place, im[r], mask=real)
    if SECOND > 1:
        shared_re = gl.allocate_shared_memory(gl.float32, [FIRST, SECOND, LANES], SHARED)
        shared_im = gl.allocate_shared_memory(gl.float32, [FIRST, SECOND, LANES], SHARED)
        lane = gl.arange(0, LANES, gl.SliceLayout(0, gl.SliceLayout(1, INNER)))[None, None, :]
        row = gl.arange(0, FIRST, gl.SliceLayout(1, gl.SliceLayout(2, INNER)))[:, None, None]
        c2 = first_c + lane % CHANNELS
        near = first_near + lane // CHANNELS
        real2 = c2 < WIDTH
        place2 = (row * PART + near) * WIDTH + c2
        if FORWARD:
            for r in gl.static_range(FIRST):
                shared_re.slice(r, 1, 0).store(re[r])
                shared_im.slice(r, 1, 0).store(im[r])
            re = ()
            im = ()
            for r in gl.static_range(SECOND):
                re += (shared_re.slice(r, 1, 1).load(INNER),)
                im += (shared_im.slice(r, 1, 1).load(INNER),)
            re, im = _transformed(re, im, SECOND, 1)
        else:
            re = ()
            im = ()
            for r in gl.static_range(SECOND):
                p_own = p_z + r * STEP * WIDTH
                re += (gl.load(p_own + place2, mask=real2, other=0.0),)
                im += (gl.load(p_own + POINTS * WIDTH + place2, mask=real2, other=0.0),)
        if STEP > 1 or p_filter is not None:
            new_re = ()
            new_im = ()
            for r in gl.static_range(SECOND):
                if p_filter is not None:
                    p_own = p_filter + b * EACH + (piece + r * STEP) * WIDTH
                    cosine = gl.load(p_own + place2, mask=real2, other=0.0) * (1.0 / POINTS)
                    sine = gl.load(p_own + POINTS * WIDTH + place2, mask=real2, other=0.0)
                    sine *= (-1.0 if CONJUGATE else 1.0) / POINTS
                else:
                    cosine = gl.load(p_near_turn + r * STEP + near)
                    sine = gl.load(p_near_turn + PART + r * STEP + near)
                    if FORWARD:
                        sine = -sine
                new_re += (re[r] * cosine - im[r] * sine,)
                new_im += (im[r] * cosine + re[r] * sine,)
            re = new_re
            im = new_im
        if INVERSE:
            re, im = _transformed(re, im, SECOND, -1)
            for r in gl.static_range(SECOND):
                shared_re.slice(r, 1, 1).store(re[r])
                shared_im.slice(r, 1, 1).store(im[r])
            re = ()
            im = ()
            for r in gl.static_range(FIRST):
                re += (shared_re.slice(r, 1, 0).load(OUTER),)
                im += (shared_im.slice(r, 1, 0).load(OUTER),)
        else:
            for r in gl.static_range(SECOND):
                p_own = p_z + r * STEP * WIDTH
                gl.store(p_own + place2, re[r], mask=real2)
                gl.store(p_own + POINTS * WIDTH + place2, im[r], mask=real2)
    elif INVERSE:
        re = ()
        im = ()
        for r in gl.static_range(FIRST):
            p_own = p_z + r * PART * WIDTH
            re += (gl.load(p_own + place, mask=real, other=0.0),)
            im += (gl.load(p_own + POINTS * WIDTH + place, mask=real, other=0.0),)
    if INVERSE:
        new_re = ()
        new_im = ()
        for r in gl.static_range(FIRST):
            cosine = gl.load(p_turn + r * PART + turn)
            sine = gl.load(p_turn + SIZE + r * PART + turn)
            new_re += (re[r] * cosine - im[r] * sine,)
            new_im += (im[r] * cosine + re[r] * sine,)
        re, im = _transformed(new_re, new_im, FIRST, -1)
        for r in gl.static_range(FIRST):
            if TO_GRID:
                y = re[r] * _cosine(r, 4 * FIRST) - im[r] * _sine(r, 4 * FIRST)
                own = b * length * WIDTH + r * PART * WIDTH
                there = left > r * PART
                if p_plain is not None:
                    gl.store(p_plain + own + place, y.to(p_plain.dtype.element_ty), mask=there)
                if p_post is not None:
                    y *= gl.load(p_post + own + place, mask=there, other=0.0).to(gl.float32)
                if p_skip is not None:
                    x = gl.load(p_x + own + place, mask=there, other=0.0).to(gl.float32)
                    y += x * gl.load(p_skip + c, mask=real, other=0.0).to(gl.float32)
                gl.store(p_y + own + place, y.to(p_y.dtype.element_ty), mask=there)
            else:
                gl.store(p_z + r * PART * WIDTH + place, re[r], mask=real)
                gl.store(p_z + (POINTS + r * PART) * WIDTH + place, im[r], mask=real)
