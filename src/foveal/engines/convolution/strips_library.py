"""Two strips in a row as two convolutions, each by the implementation that its own plan chooses."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from foveal.engines.convolution.problem import Convolution
from foveal.engines.convolution.strips_problem import Strips, column_of, row_of

Call = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def refuses(problem: Convolution) -> str | None:
    return None


def caveat(problem: Convolution) -> str | None:
    return None


def depthwise(problem: Convolution, x: Tensor, strips: Strips, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C], stored as x is: channels last or first."""
    row, column = _in_turn(problem)
    y = row(x, strips.row[:, None, :], strips.between)
    return column(y, strips.column[:, :, None], bias)


@functools.lru_cache(maxsize=512)
def _in_turn(problem: Convolution) -> tuple[Call, Call]:
    """What runs the row and the column: finding them takes longer than small images."""
    from foveal._convolve_plan import CONVOLUTION_IMPLEMENTATIONS, choose_convolution

    def planned(one: Convolution) -> Call:
        name = choose_convolution(one, CONVOLUTION_IMPLEMENTATIONS).implementation
        return functools.partial(CONVOLUTION_IMPLEMENTATIONS[name].depthwise, one)

    return planned(row_of(problem)), planned(column_of(problem))
