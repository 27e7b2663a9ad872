"""Direct depthwise convolution, channels last: float32 sums, a strip of outputs in registers.

A program holds ROWS x STRIP outputs of CHANNELS channels.  For each row of taps it keeps TAPS taps and
walks along the row of x, so that a loaded value takes part in up to TAPS products.  Along a row, taps are
taken in chunks of TAPS.  The strides along a row are compile-time constants: as variables they cost
more registers than all sums.
"""

# mypy: disable-error-code="assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

_SIZES = [
    *("size_z", "size_y", "size_x", "out_z", "out_y", "out_x", "pad_z", "pad_y", "pad_x"),
    *("taps_z", "taps_y", "taps_x", "samples", "items", "splits"),
]
"""Arguments whose values must not make another kernel."""


@triton.jit(do_not_specialize=_SIZES[:12])
def convolution_direct_forward(
    p_x, p_filter, p_bias, p_y,
    x_stride_b, x_stride_z, x_stride_y, y_stride_b, y_stride_z, y_stride_y, filter_stride_b,
    size_z, size_y, size_x, out_z, out_y, out_x, pad_z, pad_y, pad_x, taps_z, taps_y, taps_x,
    X_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    STEP_Z: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, STRIP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y [b, z, y, x, WIDTH]; the filter is [taps_z, taps_y, taps_x, WIDTH] in float32."""
    program = tl.program_id(0)
    c = (program % tl.cdiv(WIDTH, CHANNELS)) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // tl.cdiv(WIDTH, CHANNELS)
    left = (program % tl.cdiv(out_x, STRIP)) * STRIP
    program = program // tl.cdiv(out_x, STRIP)
    first = (program % tl.cdiv(out_y, ROWS)) * ROWS
    program = program // tl.cdiv(out_y, ROWS)
    z = program % out_z
    b = (program // out_z).to(tl.int64)
    y = first + tl.arange(0, ROWS)
    real = c < WIDTH

    REACH: tl.constexpr = (TAPS - 1) * STEP_X
    STEP: tl.constexpr = TAPS * STEP_X
    low_z = tl.maximum(tl.cdiv(pad_z - z, STEP_Z), 0)
    high_z = tl.minimum(tl.cdiv(size_z + pad_z - z, STEP_Z), taps_z)
    low_y = tl.maximum(tl.cdiv(pad_y - first - ROWS + 1, STEP_Y), 0)
    high_y = tl.minimum(tl.cdiv(size_y + pad_y - first, STEP_Y), taps_y)
    low_x = tl.maximum(tl.cdiv(pad_x - left - STRIP - REACH + 1, STEP), 0)
    high_x = tl.minimum(tl.cdiv(size_x + pad_x - left, STEP), tl.cdiv(taps_x, TAPS))

    bias = tl.zeros([CHANNELS], tl.float32)
    if p_bias is not None:
        bias = tl.load(p_bias + c, mask=real, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(STRIP):
        sums += (tl.zeros([ROWS, CHANNELS], tl.float32) + bias[None, :],)
    p_filter += b * filter_stride_b + c
    p_x += b * x_stride_b + y[:, None] * x_stride_y + c[None, :]
    for oz in range(low_z, high_z):
        for oy in range(low_y, high_y):
            row = y + oy * STEP_Y - pad_y
            inside = real[None, :] & ((row >= 0) & (row < size_y))[:, None]
            columns = tl.where(inside, size_x, 0).to(tl.uint32)  # as unsigned, -1 lies beyond
            shift = (z + oz * STEP_Z - pad_z) * x_stride_z + (oy * STEP_Y - pad_y) * x_stride_y
            for ox in range(low_x, high_x):
                start = left - pad_x + ox * STEP
                p_row = p_x + shift + start * X_STRIDE
                p_tap = p_filter + ((oz * taps_y + oy) * taps_x + ox * TAPS) * WIDTH
                count = tl.where(real, taps_x - ox * TAPS, 0)
                taps = ()
                for k in tl.static_range(TAPS):
                    taps += (tl.load(p_tap + k * WIDTH, mask=count > k, other=0.0)[None, :],)
                xs = ()
                for i in tl.static_range(REACH):
                    there = columns > (start + i).to(tl.uint32)
                    xs += (tl.load(p_row + i * X_STRIDE, mask=there, other=0.0).to(tl.float32),)
                new = ()
                for j in tl.static_range(STRIP):
                    there = columns > (start + j + REACH).to(tl.uint32)
                    x = tl.load(p_row + (j + REACH) * X_STRIDE, mask=there, other=0.0)
                    xs += (x.to(tl.float32),)
                    total = sums[j]
                    for k in tl.static_range(TAPS):
                        total += xs[j + k * STEP_X] * taps[k]
                    new += (total,)
                sums = new
    p_y += b * y_stride_b + z * y_stride_z + y[:, None] * y_stride_y + left * Y_STRIDE + c[None, :]
    count = tl.where(real[None, :] & (y < out_y)[:, None], out_x - left, 0)
    for j in tl.static_range(STRIP):
        tl.store(p_y + j * Y_STRIDE, sums[j].to(p_y.dtype.element_ty), mask=count > j)


@triton.jit(do_not_specialize=_SIZES)
def convolution_direct_filter_backward(
    p_x, p_dy, p_parts,
    x_stride_b, x_stride_z, x_stride_y, y_stride_b, y_stride_z, y_stride_y,
    size_z, size_y, size_x, out_z, out_y, out_x, pad_z, pad_y, pad_x, taps_z, taps_y, taps_x,
    samples, items, splits,
    X_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    STEP_Z: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, STRIP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """parts [samples, splits, taps_z, taps_y, taps_x, WIDTH]: sums of x dy over a part of all strips.

    One program per part, chunk of taps and block of channels; `items` strips of ROWS rows belong to
    each of `samples` filters.
    """
    program = tl.program_id(0)
    c = (program % tl.cdiv(WIDTH, CHANNELS)) * CHANNELS + tl.arange(0, CHANNELS)
    program = program // tl.cdiv(WIDTH, CHANNELS)
    ox = program % tl.cdiv(taps_x, TAPS)
    program = program // tl.cdiv(taps_x, TAPS)
    oy = program % taps_y
    program = program // taps_y
    oz = program % taps_z
    part = program // taps_z
    sample = part // splits
    split = part % splits
    real = c < WIDTH
    REACH: tl.constexpr = (TAPS - 1) * STEP_X
    shift_z = oz * STEP_Z - pad_z
    shift_y = oy * STEP_Y - pad_y
    shift_x = ox * TAPS * STEP_X - pad_x
    sums = ()
    for _ in tl.static_range(TAPS):
        sums += (tl.zeros([ROWS, CHANNELS], tl.float32),)
    begin = sample * items + (split.to(tl.int64) * items // splits).to(tl.int32)
    end = sample * items + ((split + 1).to(tl.int64) * items // splits).to(tl.int32)
    for item in range(begin, end):
        left = (item % tl.cdiv(out_x, STRIP)) * STRIP
        rest = item // tl.cdiv(out_x, STRIP)
        first = (rest % tl.cdiv(out_y, ROWS)) * ROWS
        rest = rest // tl.cdiv(out_y, ROWS)
        z = rest % out_z
        b = (rest // out_z).to(tl.int64)
        start = left + shift_x
        met = (z + shift_z >= 0) & (z + shift_z < size_z)
        met = met & (first + ROWS + shift_y > 0) & (first + shift_y < size_y)
        met = met & (start + STRIP + REACH > 0) & (start < size_x)
        if met:
            y = first + tl.arange(0, ROWS)
            row = y + shift_y
            inside = real[None, :] & ((y < out_y) & (row >= 0) & (row < size_y))[:, None]
            p_row = p_x + b * x_stride_b + (z + shift_z) * x_stride_z + start * X_STRIDE
            p_row += row[:, None] * x_stride_y + c[None, :]
            p_out = p_dy + b * y_stride_b + z * y_stride_z + left * Y_STRIDE
            p_out += y[:, None] * y_stride_y + c[None, :]
            columns = tl.where(inside, size_x, 0).to(tl.uint32)
            count = tl.where(inside, out_x - left, 0)
            xs = ()
            for i in tl.static_range(REACH):
                there = columns > (start + i).to(tl.uint32)
                xs += (tl.load(p_row + i * X_STRIDE, mask=there, other=0.0).to(tl.float32),)
            own = ()  # strip by strip: one long sum has four times the error
            for _ in tl.static_range(TAPS):
                own += (tl.zeros([ROWS, CHANNELS], tl.float32),)
            for j in tl.static_range(STRIP):
                there = columns > (start + j + REACH).to(tl.uint32)
                x = tl.load(p_row + (j + REACH) * X_STRIDE, mask=there, other=0.0)
                xs += (x.to(tl.float32),)
                dy = tl.load(p_out + j * Y_STRIDE, mask=count > j, other=0.0).to(tl.float32)
                new = ()
                for k in tl.static_range(TAPS):
                    new += (own[k] + xs[j + k * STEP_X] * dy,)
                own = new
            new = ()
            for k in tl.static_range(TAPS):
                new += (sums[k] + own[k],)
            sums = new
    place = ((part.to(tl.int64) * taps_z + oz) * taps_y + oy) * taps_x + ox * TAPS
    count = tl.where(real, taps_x - ox * TAPS, 0)
    for k in tl.static_range(TAPS):
        tl.store(p_parts + (place + k) * WIDTH + c, tl.sum(sums[k], 0), mask=count > k)
