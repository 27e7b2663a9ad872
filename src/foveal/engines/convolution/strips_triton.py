"""The GPU edition of two strips in a row: one launch forward, one for the gradient of x."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveal.engines.common.current import on
from foveal.engines.common.once import once_differentiable
from foveal.engines.convolution.problem import Convolution, turned
from foveal.engines.convolution.strips_problem import Strips, column_of, row_of
from foveal.engines.convolution.triton import caveat_of_device, last, stored_as
from foveal.engines.convolution.triton import refuses as refuses_any

_ONE, _ONE_START = 9.4e12, 37e-6
"""Products per second of the one launch on an H100, beside a start in seconds (measured)."""
_TWO, _TWO_START = 17.4e12, 45e-6
"""The same of a launch for each strip."""
_COPY = 2.4e12
"""Bytes per second there, read and written."""


def refuses(problem: Convolution) -> str | None:
    return refuses_any(problem)


def caveat(problem: Convolution) -> str | None:
    """Why the plan passes by this edition although it runs when it is named."""
    found = caveat_of_device(problem)
    if found is not None:
        return found
    one, two = seconds(problem)
    if one > two:
        return (
            f"a launch for each strip is estimated to be faster: {two * 1e3:.3f} ms against "
            f"{one * 1e3:.3f} ms on an H100"
        )
    return None


def seconds(problem: Convolution) -> tuple[float, float]:
    """Estimates for an H100: of one launch, which computes rows again for parts of columns, and of two."""
    from foveal.engines.convolution.launch_strips import height

    outputs = problem.batch * problem.channels * math.prod(problem.out_grid)
    down, across = problem.window
    met = height(down) + down - 1
    one = _ONE_START + outputs * (met / height(down) * across + met) / _ONE
    moved = 2 * outputs * problem.dtype.itemsize
    return one, 2 * _TWO_START + outputs * (across + down) / _TWO + moved / _COPY


def depthwise(problem: Convolution, x: Tensor, strips: Strips, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C], stored as x is: channels last or first."""
    y: Tensor = _InARow.apply(x, strips.row, strips.column, strips.between, bias, problem)  # type: ignore[no-untyped-call]
    return y


class _InARow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row: Tensor,
        column: Tensor,
        between: Tensor | None,
        bias: Tensor | None,
        problem: Convolution,
    ) -> Tensor:
        from foveal.engines.convolution.launch_strips import launch_strips

        ctx.problem = problem
        ctx.save_for_backward(x, row, column, between)
        with on(x.device):
            y = launch_strips(problem, last(x), Strips(row, column, between), bias)
            return stored_as(problem, y)

    @staticmethod
    @once_differentiable("triton")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from foveal.engines.convolution.launch import launch_direct, launch_direct_filter
        from foveal.engines.convolution.launch_strips import launch_strips

        problem: Convolution = ctx.problem
        x, row, column, between = ctx.saved_tensors
        needs, dy, x = ctx.needs_input_grad, last(dy), last(x)
        dx = d_row = d_column = d_between = d_bias = None
        across, down = row_of(problem), column_of(problem)
        flipped = Strips(row.flip(1), column.flip(1))
        if needs[0]:
            dx = stored_as(problem, launch_strips(turned(problem), dy, flipped, None))
        if needs[1] or needs[3]:
            d_inner = launch_direct(turned(down), dy, flipped.column[:, :, None], None)
            if needs[1]:
                d_row = launch_direct_filter(across, x, d_inner).view(row.shape).to(row.dtype)
            if needs[3]:
                d_between = d_inner.sum((0, 1, 2), dtype=torch.float32).to(dy.dtype)
        if needs[2]:
            inner = launch_direct(across, x, row[:, None, :], between)
            d_column = launch_direct_filter(down, inner, dy).view(column.shape).to(column.dtype)
        if needs[4]:
            d_bias = dy.sum((0, 1, 2), dtype=torch.float32).to(dy.dtype)
        return dx, d_row, d_column, d_between, d_bias, None
