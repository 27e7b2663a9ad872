"""Launches of the kernel of two strips."""

from __future__ import annotations

import triton
from torch import Tensor

from foveal.engines.convolution.launch import power_of_two
from foveal.engines.convolution.problem import Convolution
from foveal.engines.convolution.strips import convolution_strips_forward
from foveal.engines.convolution.strips_problem import Strips

_STRIP = 8
"""Neighbouring outputs along a row that a thread holds."""
_PAIRS = 256
"""Channels times columns' parts of a program of 128 threads."""
_LONGEST = 16
"""Taps of a row that the body of the loop spells out."""


def height(taps: int) -> int:
    """Outputs along a column that a thread holds, of so many taps."""
    return 4 if taps <= 7 else 8


def launch_strips(problem: Convolution, x: Tensor, strips: Strips, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C] with unit stride along C."""
    width = problem.channels
    y = x.new_empty(problem.batch, *problem.out_grid, width)
    if not y.numel():
        return y
    out_y, out_x = problem.out_grid
    step_y, step_x = problem.dilation
    taps_y, taps_x = problem.window
    high = height(taps_y)
    lanes_all = triton.cdiv(out_y, high * step_y) * step_y
    channels = min(power_of_two(width), _PAIRS // min(power_of_two(lanes_all), 4))
    lanes = min(_PAIRS // channels, power_of_two(lanes_all))
    strip = min(_STRIP, out_x)
    taps = triton.cdiv(taps_x, triton.cdiv(taps_x, _LONGEST))
    programs = triton.cdiv(width, channels) * triton.cdiv(out_x, strip)
    programs *= triton.cdiv(lanes_all, lanes) * problem.batch
    row, column = (t.float().T.contiguous() for t in (strips.row, strips.column))
    convolution_strips_forward[(programs,)](
        x, row, column, strips.between, bias, y,
        x.stride(0), x.stride(1), y.stride(0), y.stride(1),
        *problem.grid, out_y, out_x, *problem.before, taps_y, taps_x,
        X_STRIDE=x.stride(2), Y_STRIDE=y.stride(2), WIDTH=width, STEP_Y=step_y, STEP_X=step_x,
        TAPS=taps, LANES=lanes, HEIGHT=high, STRIP=strip, CHANNELS=channels,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y
