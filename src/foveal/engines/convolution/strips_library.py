"""Two strips in a row as two convolutions, each by the implementation that its own plan chooses."""

from __future__ import annotations

from torch import Tensor

from foveal.engines.convolution.problem import Convolution
from foveal.engines.convolution.strips_problem import Strips, column_of, row_of


def refuses(problem: Convolution) -> str | None:
    return None


def caveat(problem: Convolution) -> str | None:
    return None


def depthwise(problem: Convolution, x: Tensor, strips: Strips, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C], stored as x is: channels last or first."""
    from foveal._convolve_plan import CONVOLUTION_IMPLEMENTATIONS, choose_convolution

    steps = (
        (row_of(problem), strips.row[:, None, :], strips.between),
        (column_of(problem), strips.column[:, :, None], bias),
    )
    for one, filter, own in steps:
        name = choose_convolution(one, CONVOLUTION_IMPLEMENTATIONS).implementation
        x = CONVOLUTION_IMPLEMENTATIONS[name].depthwise(one, x, filter, own)
    return x
