"""The definition of two strips in a row.  Any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.engines.convolution.problem import Convolution
from foveal.engines.convolution.reference import depthwise_in
from foveal.engines.convolution.strips_problem import Strips, column_of, row_of


def refuses(problem: Convolution) -> str | None:
    return None


def caveat(problem: Convolution) -> str | None:
    return None


def depthwise(problem: Convolution, x: Tensor, strips: Strips, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    row, column = strips.row[:, None, :], strips.column[:, :, None]
    inner = depthwise_in(wide, row_of(problem), x.to(wide), row, strips.between)
    return depthwise_in(wide, column_of(problem), inner, column, bias).to(x.dtype)
