"""The definitions, written for reading: one tap after the other.  Any device, differentiable."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.engines.convolution.problem import Convolution


def refuses(problem: Convolution) -> str | None:
    return None


def caveat(problem: Convolution) -> str | None:
    return None


def depthwise(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C] and a filter [C, *window] or [B, C, *window]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return depthwise_in(wide, problem, x, weight, bias)


def depthwise_in(
    dtype: torch.dtype, problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """As `depthwise` with all arithmetic in `dtype`."""
    axes = len(problem.grid)
    pads = [*zip(problem.before, problem.after, strict=True), (0, 0)]
    padded = F.pad(x.to(dtype), [zeros for pair in reversed(pads) for zeros in pair])
    taps = weight.to(dtype).movedim(-axes - 1, -1)  # [.., *window, C]
    y = padded.new_zeros(problem.batch, *problem.out_grid, problem.channels)
    places = itertools.product(*(range(k) for k in problem.window))
    for number, tap in enumerate(places):
        seen = padded
        for axis, o in enumerate(tap):
            seen = seen.narrow(1 + axis, o * problem.dilation[axis], problem.out_grid[axis])
        factor = taps.flatten(-axes - 1, -2).select(-2, number)
        y = y + seen * factor.view(-1, *(1,) * axes, problem.channels)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)
