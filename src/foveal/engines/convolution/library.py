"""PyTorch's own grouped convolution, with its gradients: any device, any dtype."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from foveal.engines.convolution.problem import Convolution

CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def refuses(problem: Convolution) -> str | None:
    if problem.per_sample and problem.batch == 0:
        return "PyTorch knows no convolution of no groups"
    return None


def caveat(problem: Convolution) -> str | None:
    return None


def depthwise(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C], stored as x is: channels last or first."""
    first = x.movedim(-1, 1)
    if problem.per_sample:
        bias = None if bias is None else bias.repeat(problem.batch)
        y = grouped(problem, first.reshape(1, -1, *problem.grid), weight.flatten(0, 1), bias)
        y = y.view(problem.batch, problem.channels, *problem.out_grid)
    else:
        y = grouped(problem, first, weight, bias)
    return y.movedim(1, -1)


def grouped(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [N, G, *out_grid] of x [N, G, *grid] and a filter [G, *window], one for each of G channels."""
    before, padding = problem.before, problem.before
    if problem.after != before:
        pairs = zip(reversed(before), reversed(problem.after), strict=True)
        x, padding = F.pad(x, [zeros for pair in pairs for zeros in pair]), (0,) * len(before)
    return CONVOLVE[len(before)](
        x,
        weight[:, None],
        bias,
        padding=padding,
        dilation=problem.dilation,
        groups=len(weight),
    )
