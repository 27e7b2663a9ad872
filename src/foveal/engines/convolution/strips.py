"""Two strips in a row in one kernel, channels last: what the row gives stays in registers.

A program holds, for each of LANES columns' parts, HEIGHT x STRIP outputs of CHANNELS channels; the HEIGHT
rows of a lane lie STEP_Y apart, so that they read the same rows of x.  For every such row it computes
STRIP values of the row strip, as the direct kernel does, and adds each to the outputs whose
taps meet it.
"""

# mypy: disable-error-code="assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["size_y", "size_x", "out_y", "out_x", "pad_y", "pad_x", "taps_y", "taps_x"]
"""Arguments whose values must not make another kernel."""


@triton.jit(do_not_specialize=_SIZES)
def convolution_strips_forward(
    p_x, p_row, p_column, p_between, p_bias, p_y,
    x_stride_b, x_stride_y, y_stride_b, y_stride_y,
    size_y, size_x, out_y, out_x, pad_y, pad_x, taps_y, taps_x,
    X_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, TAPS: tl.constexpr,
    LANES: tl.constexpr, HEIGHT: tl.constexpr, STRIP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y [b, y, x, WIDTH]; row [taps_x, WIDTH] and column [taps_y, WIDTH] in float32."""
    program = tl.program_id(0)
    c = (program % tl.cdiv(WIDTH, CHANNELS)) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // tl.cdiv(WIDTH, CHANNELS)
    left = (program % tl.cdiv(out_x, STRIP)) * STRIP
    program = program // tl.cdiv(out_x, STRIP)
    groups = tl.cdiv(tl.cdiv(out_y, HEIGHT * STEP_Y) * STEP_Y, LANES)
    lane = (program % groups) * LANES + tl.arange(0, LANES)
    b = (program // groups).to(tl.int64)
    top = lane // STEP_Y * (HEIGHT * STEP_Y) + lane % STEP_Y
    real = c < WIDTH

    REACH: tl.constexpr = (TAPS - 1) * STEP_X
    STEP: tl.constexpr = TAPS * STEP_X
    low_x = tl.maximum(tl.cdiv(pad_x - left - STRIP - REACH + 1, STEP), 0)
    high_x = tl.minimum(tl.cdiv(size_x + pad_x - left, STEP), tl.cdiv(taps_x, TAPS))
    bias = tl.zeros([CHANNELS], tl.float32)
    if p_bias is not None:
        bias = tl.load(p_bias + c, mask=real, other=0.0).to(tl.float32)
    between = tl.zeros([CHANNELS], tl.float32)
    if p_between is not None:
        between = tl.load(p_between + c, mask=real, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(HEIGHT * STRIP):
        sums += (tl.zeros([LANES, CHANNELS], tl.float32) + bias[None, :],)
    p_x += b * x_stride_b + c[None, :]
    for met in range(0, HEIGHT + taps_y - 1):
        row = top + met * STEP_Y - pad_y
        within = (row >= 0) & (row < size_y)
        inside = real[None, :] & within[:, None]
        columns = tl.where(inside, size_x, 0).to(tl.uint32)  # as unsigned, -1 lies beyond
        inner = ()
        for _ in tl.static_range(STRIP):
            inner += (tl.where(within[:, None], between[None, :], 0.0),)
        for ox in range(low_x, high_x):
            start = left - pad_x + ox * STEP
            p_own = p_x + row[:, None] * x_stride_y + start * X_STRIDE
            count = tl.where(real, taps_x - ox * TAPS, 0)
            taps = ()
            for k in tl.static_range(TAPS):
                p_tap = p_row + (ox * TAPS + k) * WIDTH + c
                taps += (tl.load(p_tap, mask=count > k, other=0.0)[None, :],)
            xs = ()
            for i in tl.static_range(REACH):
                there = columns > (start + i).to(tl.uint32)
                xs += (tl.load(p_own + i * X_STRIDE, mask=there, other=0.0).to(tl.float32),)
            new = ()
            for j in tl.static_range(STRIP):
                there = columns > (start + j + REACH).to(tl.uint32)
                x = tl.load(p_own + (j + REACH) * X_STRIDE, mask=there, other=0.0)
                xs += (x.to(tl.float32),)
                total = inner[j]
                for k in tl.static_range(TAPS):
                    total += xs[j + k * STEP_X] * taps[k]
                new += (total,)
            inner = new
        new = ()
        for h in tl.static_range(HEIGHT):
            place = tl.where(real, met - h, -1)
            own = (place >= 0) & (place < taps_y)
            tap = tl.load(p_column + place * WIDTH + c, mask=own, other=0.0)[None, :]
            for j in tl.static_range(STRIP):
                new += (sums[h * STRIP + j] + inner[j] * tap,)
        sums = new
    p_y += b * y_stride_b + left * Y_STRIDE + c[None, :]
    for h in tl.static_range(HEIGHT):
        y = top + h * STEP_Y
        count = tl.where(real[None, :] & (y < out_y)[:, None], out_x - left, 0)
        p_own = p_y + y[:, None] * y_stride_y
        for j in tl.static_range(STRIP):
            found = sums[h * STRIP + j].to(p_y.dtype.element_ty)
            tl.store(p_own + j * Y_STRIDE, found, mask=count > j)
