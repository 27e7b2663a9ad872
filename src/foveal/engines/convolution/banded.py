"""The edition for large filters in 16 bits: products with Toeplitz matrices on matrix units."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.engines.convolution.problem import Convolution
from foveal.engines.convolution.triton import caveat_of_device, interpreted, recorded
from foveal.engines.convolution.triton import refuses as refuses_any


def refuses(problem: Convolution) -> str | None:
    refusal = refuses_any(problem)
    if refusal is not None:
        return refusal
    if problem.dtype == torch.float32 and not interpreted():
        return "matrix units do not compute in float32"
    if problem.per_sample:
        return "the matrices of a filter are made once for all samples"
    if len(problem.grid) == 1:
        return "a sequence has one row for each sample and channel: too few to fill a tile"
    if set(problem.dilation) != {1}:
        return "rows of a dilated filter do not meet neighbouring rows of x"
    return None


def caveat(problem: Convolution) -> str | None:
    """Why the plan passes by this edition although it runs when it is named."""
    found = caveat_of_device(problem)
    if found is not None:
        return found
    banded, direct = seconds(problem)
    if banded >= direct:
        return (
            f"sums of single products are estimated to be faster: {direct * 1e3:.3f} ms "
            f"against {banded * 1e3:.3f} ms on an H100"
        )
    return None


_MATRIX = 640e12
"""FLOP per second of the Toeplitz products on an H100, beside `_MATRIX_START` seconds (measured)."""
_MATRIX_START = 150e-6
_SINGLE = 17.4e12
"""Products per second of the direct kernel there, beside `_SINGLE_START` seconds (measured)."""
_SINGLE_START = 45e-6
_TO_FIRST, _TO_LAST = 0.97e12, 2.4e12
"""Bytes per second, read and written, of the changes of layout around the one and the other (measured)."""


def seconds(problem: Convolution) -> tuple[float, float]:
    """Estimates for an H100: of this edition, and of the direct one."""
    from foveal.engines.convolution.launch_toeplitz import multiplied

    tokens = math.prod(problem.grid) + math.prod(problem.out_grid)
    copied = 2 * tokens * problem.batch * problem.channels * problem.dtype.itemsize
    banded = _MATRIX_START + multiplied(problem) / _MATRIX
    direct = _SINGLE_START + problem.products / _SINGLE
    if problem.channels_first:
        return banded, direct + copied / _TO_LAST
    return banded + copied / _TO_FIRST, direct


def depthwise(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C], stored as x is: channels last or first."""
    return recorded(problem, x, weight, bias, Banded())


class Banded:
    """Forward and gradient of the filter by Toeplitz matrices."""

    def ready(self, x: Tensor) -> Tensor:
        from foveal.engines.convolution.launch_toeplitz import aligned

        return aligned(x)

    def forward(
        self, problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        from foveal.engines.convolution.launch_toeplitz import launch_toeplitz

        return launch_toeplitz(problem, x, weight, bias)

    def filter_gradient(self, problem: Convolution, x: Tensor, dy: Tensor) -> Tensor:
        from foveal.engines.convolution.launch_toeplitz import launch_toeplitz_filter

        return launch_toeplitz_filter(problem, x, dy)
