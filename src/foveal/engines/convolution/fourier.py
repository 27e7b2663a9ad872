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
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from foveal.engines.common.early import gdc_launch_dependents, gdc_wait
from foveal.engines.tile.hopper_compat import load_elements


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


@gluon.constexpr_function
def _shared(first: int, second: int, lanes: int) -> gl.SharedLinearLayout:
    """Rows of axis 1, turned by those of axis 0, so that neighbours along both lie in other banks."""
    bases = [[0, 0, 1 << bit] for bit in range(_steps(lanes))]
    bases += [[0, 1 << bit, 0] for bit in range(_steps(second))]
    turned = min(max(32 // lanes, 1), second)
    bases += [[1 << bit, (1 << bit) % turned, 0] for bit in range(_steps(first))]
    return gl.SharedLinearLayout(bases)


@gluon.constexpr_function
def _copied(second: int, lanes: int, warps: int, warp: int) -> gl.BlockedLayout:
    """For tiles that are copied to shared memory: 16 bytes of float32 for each thread."""
    near = lanes // 4
    rows = warp // near
    far = max(min(second // rows, warps), 1)
    return gl.BlockedLayout([1, 1, 4], [1, rows, near], [warps // far, far, 1], [2, 1, 0])


@gluon.jit
def _start_copy(
    shared, p_x, first_c, length, WIDTH: gl.constexpr, FIRST: gl.constexpr,
    SECOND: gl.constexpr, LANES: gl.constexpr, WARP: gl.constexpr,
):  # fmt: skip
    """Begins to copy FIRST x SECOND tokens of LANES channels to shared memory; there is no waiting."""
    LAYOUT: gl.constexpr = _copied(SECOND, LANES, gl.num_warps(), WARP)
    far = gl.arange(0, FIRST, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    row = gl.arange(0, SECOND, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    lane = gl.arange(0, LANES, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    token = far * SECOND + row
    c = first_c + lane
    load_elements(shared, p_x + (token * WIDTH + c), mask=(token < length) & (c < WIDTH))
    async_copy.commit_group()


@gluon.jit
def _joined(values, COUNT: gl.constexpr, AXIS: gl.constexpr):
    """A tuple of COUNT tiles, one value wide along AXIS 0 or 1, as one tile."""
    ROWS: gl.constexpr = values[0].shape[1 - AXIS]
    LANES: gl.constexpr = values[0].shape[2]
    for step in gl.static_range(_steps(COUNT)):
        pairs = ()
        for r in gl.static_range(COUNT >> (step + 1)):
            pairs += (gl.join(values[r], values[r + (COUNT >> (step + 1))]),)
        values = pairs
    tile = gl.reshape(values[0], [ROWS, LANES, COUNT])
    if AXIS == 0:
        tile = gl.permute(tile, [2, 0, 1])
    else:
        tile = gl.permute(tile, [0, 2, 1])
    return tile


@gluon.jit
def _parted(tile, COUNT: gl.constexpr, AXIS: gl.constexpr, LAYOUT: gl.constexpr):
    """The tile of `_joined` as a tuple again."""
    ROWS: gl.constexpr = tile.shape[1 - AXIS]
    LANES: gl.constexpr = tile.shape[2]
    if AXIS == 0:
        tile = gl.permute(tile, [1, 2, 0])
    else:
        tile = gl.permute(tile, [0, 2, 1])
    values = (tile,)
    for step in gl.static_range(_steps(COUNT)):
        evens = ()
        odds = ()
        for r in gl.static_range(1 << step):
            pairs = gl.reshape(values[r], [ROWS, LANES, COUNT >> (step + 1), 2])
            even, odd = gl.split(pairs)
            evens += (even,)
            odds += (odd,)
        values = evens + odds
    flat = ()
    for r in gl.static_range(COUNT):
        one = gl.reshape(values[r], [1, ROWS, LANES] if AXIS == 0 else [ROWS, 1, LANES])
        flat += (gl.convert_layout(one, LAYOUT, assert_trivial=True),)
    return flat


@gluon.constexpr_function
def _held(layout: gl.BlockedLayout, axis: int, count: int) -> gl.BlockedLayout:
    """As `layout` with `count` values per thread along `axis`."""
    size = [1, 1, 1]
    size[axis] = count
    return gl.BlockedLayout(size, layout.threads_per_warp, layout.warps_per_cta, layout.order)


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


@gluon.jit
def _turned(re, im, p_turn, place, COUNT: gl.constexpr, PART: gl.constexpr, SIGN: gl.constexpr):
    """z[r] exp(-SIGN i angle[r]), the turn of r as the product of those of r % 4 and r // 4."""
    SINES: gl.constexpr = (4 + COUNT // 4) * PART
    cosines = ()
    sines = ()
    for r in gl.static_range(4):
        cosines += (gl.load(p_turn + r * PART + place),)
        sines += (gl.load(p_turn + SINES + r * PART + place),)
    new_re = ()
    new_im = ()
    for far in gl.static_range(COUNT // 4):
        if far > 0:
            cosine = gl.load(p_turn + (4 + far) * PART + place)
            sine = gl.load(p_turn + SINES + (4 + far) * PART + place)
        for r in gl.static_range(4):
            if far > 0:
                c = cosines[r] * cosine - sines[r] * sine
                s = sines[r] * cosine + cosines[r] * sine
            else:
                c = cosines[r]
                s = sines[r]
            a = re[4 * far + r]
            b = im[4 * far + r]
            new_re += (a * c + SIGN * (b * s),)
            new_im += (b * c - SIGN * (a * s),)
    return new_re, new_im


@gluon.jit(do_not_specialize=["length"])
def convolution_fourier_forward(
    p_x, p_pre, p_z, p_filter, p_skip, p_post, p_plain, p_y, p_turn, p_near_turn,
    length,
    WIDTH: gl.constexpr, EACH: gl.constexpr,
    POINTS: gl.constexpr, SIZE: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr,
    NEAR: gl.constexpr, CHANNELS: gl.constexpr, WARP: gl.constexpr,
    FORWARD: gl.constexpr, INVERSE: gl.constexpr, CONJUGATE: gl.constexpr,
    FROM_GRID: gl.constexpr, TO_GRID: gl.constexpr, COPIED: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Transforms of x or z, along pieces of SIZE of POINTS tokens, times the spectrum of a filter, and back.

    x and y with their gates and plain (y before its gate) are [B, length, WIDTH]; z and the spectrum of the
    filter, EACH elements per sample apart, [B, 2, POINTS, WIDTH], real parts first.
    turn and near_turn: cosines, then sines of what stands behind a transform of FIRST and of SECOND
    points, as `_turned` reads them.  A program holds NEAR neighbouring tokens and CHANNELS.
    COPIED: the gate of y comes to shared memory while the inner transforms are computed; y waits for it.
    EARLY: the launch that makes a filter's spectrum lets the next one start, which waits where it reads it.
    """
    STEP: gl.constexpr = SIZE // (FIRST * SECOND)
    PART: gl.constexpr = SIZE // FIRST
    LANES: gl.constexpr = NEAR * CHANNELS
    BLOCKS: gl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    OUTER: gl.constexpr = _layout(LANES, 1, gl.num_warps(), WARP)
    INNER: gl.constexpr = _layout(LANES, 0, gl.num_warps(), WARP)
    SHARED: gl.constexpr = _shared(FIRST, SECOND, LANES)
    ALONG: gl.constexpr = _held(OUTER, 0, FIRST)
    ACROSS: gl.constexpr = _held(INNER, 1, SECOND)
    if EARLY and p_filter is None:
        gdc_launch_dependents()
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
        re, im = _turned(re, im, p_turn, outer, FIRST, PART, 1)
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
            shared_re.store(gl.convert_layout(_joined(re, FIRST, 0), ALONG, assert_trivial=True))
            shared_im.store(gl.convert_layout(_joined(im, FIRST, 0), ALONG, assert_trivial=True))
            re = _parted(shared_re.load(ACROSS), SECOND, 1, INNER)
            im = _parted(shared_im.load(ACROSS), SECOND, 1, INNER)
            if COPIED:
                PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
                gate = gl.allocate_shared_memory(
                    p_post.dtype.element_ty, [FIRST, SECOND, LANES], PLAIN
                )
                # not before the exchange: x and its gate would come later
                _start_copy(
                    gate, p_post + b * length * WIDTH, first_c, length,
                    WIDTH, FIRST, SECOND, LANES, WARP,
                )  # fmt: skip
            re, im = _transformed(re, im, SECOND, 1)
        else:
            re = ()
            im = ()
            for r in gl.static_range(SECOND):
                p_own = p_z + r * STEP * WIDTH
                re += (gl.load(p_own + place2, mask=real2, other=0.0),)
                im += (gl.load(p_own + POINTS * WIDTH + place2, mask=real2, other=0.0),)
        if p_filter is not None:
            if EARLY:
                gdc_wait()
            new_re = ()
            new_im = ()
            for r in gl.static_range(SECOND):
                p_own = p_filter + b * EACH + (piece + r * STEP) * WIDTH
                x = gl.load(p_own + place2, mask=real2, other=0.0)
                y = gl.load(p_own + POINTS * WIDTH + place2, mask=real2, other=0.0)
                if CONJUGATE:
                    y = -y
                new_re += (re[r] * x - im[r] * y,)
                new_im += (im[r] * x + re[r] * y,)
            re = new_re
            im = new_im
        elif STEP > 1:
            re, im = _turned(re, im, p_near_turn, near, SECOND, STEP, 1 if FORWARD else -1)
        if INVERSE:
            re, im = _transformed(re, im, SECOND, -1)
            shared_re.store(gl.convert_layout(_joined(re, SECOND, 1), ACROSS, assert_trivial=True))
            shared_im.store(gl.convert_layout(_joined(im, SECOND, 1), ACROSS, assert_trivial=True))
            re = _parted(shared_re.load(ALONG), FIRST, 0, OUTER)
            im = _parted(shared_im.load(ALONG), FIRST, 0, OUTER)
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
        re, im = _turned(re, im, p_turn, outer, FIRST, PART, -1)
        re, im = _transformed(re, im, FIRST, -1)
        if COPIED:
            async_copy.wait_group(0)
        for r in gl.static_range(FIRST):
            if TO_GRID:
                y = re[r] * (_cosine(r, 4 * FIRST) / POINTS) - im[r] * (
                    _sine(r, 4 * FIRST) / POINTS
                )
                own = b * length * WIDTH + r * PART * WIDTH
                there = left > r * PART
                if p_plain is not None:
                    gl.store(p_plain + own + place, y.to(p_plain.dtype.element_ty), mask=there)
                if COPIED:
                    y *= gate.slice(r, 1, 0).load(OUTER)
                elif p_post is not None:
                    y *= gl.load(p_post + own + place, mask=there, other=0.0).to(gl.float32)
                if p_skip is not None:
                    x = gl.load(p_x + own + place, mask=there, other=0.0).to(gl.float32)
                    y += x * gl.load(p_skip + c, mask=real, other=0.0).to(gl.float32)
                gl.store(p_y + own + place, y.to(p_y.dtype.element_ty), mask=there)
            else:
                gl.store(p_z + r * PART * WIDTH + place, re[r], mask=real)
                gl.store(p_z + (POINTS + r * PART) * WIDTH + place, im[r], mask=real)
