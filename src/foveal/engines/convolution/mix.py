"""Kernels of the local mix: weighted sums over windows, forward and both gradients.

A program holds PIXELS tokens of one head.  On each axis, BORDER 0 is zero, 1 a window shifted into the
grid, 2 causal; then the tap `t` of a token meets the place `first + t dilation`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["size_z", "size_y", "size_x", "window_z", "window_y", "window_x"]


@triton.jit
def first_of_window(place, size, window, STEP: tl.constexpr, BORDER: tl.constexpr):
    reach = STEP * (window - 1)
    if BORDER == 2:
        first = place - reach
    elif BORDER == 0:
        first = place - reach // 2
    else:
        residue = place % STEP
        count = (size - residue + STEP - 1) // STEP
        g = tl.maximum(place // STEP - window // 2, 0)
        first = residue + STEP * tl.minimum(g, count - window)
    return first


@triton.jit
def readers(place, size, window, STEP: tl.constexpr, BORDER: tl.constexpr):
    """The first token whose window holds the place, and how many such tokens there are at most.

    They are STEP apart; those beyond the grid, and what their windows hold, remain to be asked.
    """
    reach = STEP * (window - 1)
    if BORDER == 2:
        first = place
        last = place + reach
    elif BORDER == 0:
        first = place + reach // 2 - reach
        last = place + reach // 2
    else:
        residue = place % STEP
        g = place // STEP
        count = (size - residue + STEP - 1) // STEP
        first = residue + STEP * tl.where(g < window, 0, g + window // 2 - window + 1)
        last = residue + STEP * tl.where(g >= count - window, count - 1, g + window // 2)
    return first, (last - first) // STEP + 1


@triton.jit(do_not_specialize=_SIZES)
def convolution_mix_forward(
    p_weights, p_v, p_o,
    w_stride_b, w_stride_z, w_stride_y, w_stride_x, w_stride_h, w_stride_t,
    v_stride_b, v_stride_z, v_stride_y, v_stride_x, v_stride_h,
    o_stride_b, o_stride_z, o_stride_y, o_stride_x, o_stride_h,
    heads, size_z, size_y, size_x, window_z, window_y, window_x,
    STEP_Z: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    BORDER_Z: tl.constexpr, BORDER_Y: tl.constexpr, BORDER_X: tl.constexpr,
    D: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """o = sum_t weights[t] v[first + t dilation]"""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    h = tl.program_id(1) % heads
    b = (tl.program_id(1) // heads).to(tl.int64)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    x = pixel % size_x
    y = (pixel // size_x) % size_y
    z = pixel // (size_x * size_y)
    real = z < size_z
    first_x = first_of_window(x, size_x, window_x, STEP_X, BORDER_X)
    first_y = first_of_window(y, size_y, window_y, STEP_Y, BORDER_Y)
    first_z = first_of_window(z, size_z, window_z, STEP_Z, BORDER_Z)
    p_own = p_weights + b * w_stride_b + h * w_stride_h
    p_own += z * w_stride_z + y * w_stride_y + x * w_stride_x
    p_v += b * v_stride_b + h * v_stride_h + d[None, :]
    acc = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for tz in range(window_z):
        at_z = first_z + tz * STEP_Z
        for ty in range(window_y):
            at_y = first_y + ty * STEP_Y
            there = real & (at_z >= 0) & (at_z < size_z) & (at_y >= 0) & (at_y < size_y)
            row = at_z * v_stride_z + at_y * v_stride_y
            tap = (tz * window_y + ty) * window_x
            for tx in range(window_x):
                at_x = first_x + tx * STEP_X
                met = there & (at_x >= 0) & (at_x < size_x)
                weight = tl.load(p_own + (tap + tx) * w_stride_t, mask=met, other=0.0)
                place = (row + at_x * v_stride_x)[:, None]
                value = tl.load(p_v + place, mask=met[:, None] & (d < D)[None, :], other=0.0)
                acc += weight.to(tl.float32)[:, None] * value.to(tl.float32)
    p_o += b * o_stride_b + h * o_stride_h
    p_row = p_o + (z * o_stride_z + y * o_stride_y + x * o_stride_x)[:, None]
    out = acc.to(p_o.dtype.element_ty)
    tl.store(p_row + d[None, :], out, mask=real[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def convolution_mix_values_backward(
    p_weights, p_do, p_dv,
    w_stride_b, w_stride_z, w_stride_y, w_stride_x, w_stride_h, w_stride_t,
    o_stride_b, o_stride_z, o_stride_y, o_stride_x, o_stride_h,
    v_stride_b, v_stride_z, v_stride_y, v_stride_x, v_stride_h,
    heads, size_z, size_y, size_x, window_z, window_y, window_x,
    STEP_Z: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    BORDER_Z: tl.constexpr, BORDER_Y: tl.constexpr, BORDER_X: tl.constexpr,
    D: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dv = sum over the tokens p whose window holds the place of weights[p, t] do[p]"""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    h = tl.program_id(1) % heads
    b = (tl.program_id(1) // heads).to(tl.int64)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    x = pixel % size_x
    y = (pixel // size_x) % size_y
    z = pixel // (size_x * size_y)
    real = z < size_z
    first_x, count_x = readers(x, size_x, window_x, STEP_X, BORDER_X)
    first_y, count_y = readers(y, size_y, window_y, STEP_Y, BORDER_Y)
    first_z, count_z = readers(z, size_z, window_z, STEP_Z, BORDER_Z)
    most_x = tl.max(tl.where(real, count_x, 0), 0)
    most_y = tl.max(tl.where(real, count_y, 0), 0)
    most_z = tl.max(tl.where(real, count_z, 0), 0)
    p_weights += b * w_stride_b + h * w_stride_h
    p_do += b * o_stride_b + h * o_stride_h + d[None, :]
    acc = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for rz in range(most_z):
        at_z = first_z + rz * STEP_Z
        tz = (z - first_of_window(at_z, size_z, window_z, STEP_Z, BORDER_Z)) // STEP_Z
        met_z = real & (rz < count_z) & (at_z >= 0) & (at_z < size_z)
        for ry in range(most_y):
            at_y = first_y + ry * STEP_Y
            ty = (y - first_of_window(at_y, size_y, window_y, STEP_Y, BORDER_Y)) // STEP_Y
            there = met_z & (ry < count_y) & (at_y >= 0) & (at_y < size_y)
            row = at_z * o_stride_z + at_y * o_stride_y
            weight_row = at_z * w_stride_z + at_y * w_stride_y
            tap = (tz * window_y + ty) * window_x
            for rx in range(most_x):
                at_x = first_x + rx * STEP_X
                tx = (x - first_of_window(at_x, size_x, window_x, STEP_X, BORDER_X)) // STEP_X
                met = there & (rx < count_x) & (at_x >= 0) & (at_x < size_x)
                place = weight_row + at_x * w_stride_x + (tap + tx) * w_stride_t
                weight = tl.load(p_weights + place, mask=met, other=0.0)
                place = (row + at_x * o_stride_x)[:, None]
                value = tl.load(p_do + place, mask=met[:, None] & (d < D)[None, :], other=0.0)
                acc += weight.to(tl.float32)[:, None] * value.to(tl.float32)
    p_dv += b * v_stride_b + h * v_stride_h
    p_row = p_dv + (z * v_stride_z + y * v_stride_y + x * v_stride_x)[:, None]
    out = acc.to(p_dv.dtype.element_ty)
    tl.store(p_row + d[None, :], out, mask=real[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def convolution_mix_weights_backward(
    p_do, p_v, p_dweights,
    o_stride_b, o_stride_z, o_stride_y, o_stride_x, o_stride_h,
    v_stride_b, v_stride_z, v_stride_y, v_stride_x, v_stride_h,
    w_stride_b, w_stride_z, w_stride_y, w_stride_x, w_stride_h, w_stride_t,
    heads, size_z, size_y, size_x, window_z, window_y, window_x,
    STEP_Z: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    BORDER_Z: tl.constexpr, BORDER_Y: tl.constexpr, BORDER_X: tl.constexpr,
    D: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """dweights[t] = do . v[first + t dilation]; TAPS taps of a row are stored at a time."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    h = tl.program_id(1) % heads
    b = (tl.program_id(1) // heads).to(tl.int64)
    d = tl.arange(0, CHANNELS)
    x = pixel % size_x
    y = (pixel // size_x) % size_y
    z = pixel // (size_x * size_y)
    real = z < size_z
    first_x = first_of_window(x, size_x, window_x, STEP_X, BORDER_X)
    first_y = first_of_window(y, size_y, window_y, STEP_Y, BORDER_Y)
    first_z = first_of_window(z, size_z, window_z, STEP_Z, BORDER_Z)
    p_row = p_do + b * o_stride_b + h * o_stride_h + d[None, :]
    p_row += (z * o_stride_z + y * o_stride_y + x * o_stride_x)[:, None]
    do = tl.load(p_row, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    p_v += b * v_stride_b + h * v_stride_h + d[None, :]
    p_dweights += b * w_stride_b + h * w_stride_h
    p_own = p_dweights + (z * w_stride_z + y * w_stride_y + x * w_stride_x)[:, None]
    t = tl.arange(0, TAPS)
    for tz in range(window_z):
        at_z = first_z + tz * STEP_Z
        for ty in range(window_y):
            at_y = first_y + ty * STEP_Y
            there = real & (at_z >= 0) & (at_z < size_z) & (at_y >= 0) & (at_y < size_y)
            row = at_z * v_stride_z + at_y * v_stride_y
            for start in range(0, window_x, TAPS):
                found = tl.zeros([PIXELS, TAPS], tl.float32)
                for tx in range(start, tl.minimum(start + TAPS, window_x)):
                    at_x = first_x + tx * STEP_X
                    met = there & (at_x >= 0) & (at_x < size_x)
                    place = (row + at_x * v_stride_x)[:, None]
                    v = tl.load(p_v + place, mask=met[:, None] & (d < D)[None, :], other=0.0)
                    own = tl.sum(do * v.to(tl.float32), 1)
                    found = tl.where((t == tx - start)[None, :], own[:, None], found)
                place = ((tz * window_y + ty) * window_x + start + t)[None, :] * w_stride_t
                kept = real[:, None] & (start + t < window_x)[None, :]
                tl.store(p_own + place, found.to(p_dweights.dtype.element_ty), mask=kept)
