"""PyTorch's own grouped convolution, with its gradients: any device, any dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
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
    return planes(problem, x.movedim(-1, 1), weight, bias).movedim(1, -1)


def planes(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, C, *out_grid] of x [B, C, *grid], each stored channels last or first as x is."""
    if not problem.per_sample:
        return grouped(problem, x, weight, bias)
    bias = None if bias is None else bias.repeat(problem.batch)
    y = grouped(problem, x.reshape(1, -1, *problem.grid), weight.flatten(0, 1), bias)
    return y.view(problem.batch, problem.channels, *problem.out_grid)


def direct(problem: Convolution) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """The call alone, of x as the problem stores it, where nothing has to be changed around it."""
    if problem.per_sample or problem.after != problem.before:
        return None
    call, padding, dilation = CONVOLVE[len(problem.grid)], problem.before, problem.dilation
    channels, axes = problem.channels, range(1, len(problem.grid) + 1)
    first, last = (0, len(axes) + 1, *axes), (0, *(n + 1 for n in axes), 1)
    ones = (1,) * len(axes)
    onednn = _by_onednn(problem)

    def channels_first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if onednn and torch._C._get_mkldnn_enabled():
            weight = weight.unsqueeze(1)
            return torch.mkldnn_convolution(x, weight, bias, padding, ones, dilation, channels)
        return call(x, weight.unsqueeze(1), bias, 1, padding, dilation, channels)

    def channels_last(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return channels_first(x.permute(first), weight, bias).permute(last)

    return channels_first if problem.channels_first else channels_last


def _by_onednn(problem: Convolution) -> bool:
    """Whether PyTorch hands the call to oneDNN, after checks that take a fiftieth of a millisecond."""
    if problem.device != "cpu" or len(problem.grid) == 1:
        return False
    one = torch.empty((), dtype=problem.dtype)  # no memory
    x = one.expand(problem.batch, problem.channels, *problem.grid)
    weight = one.expand(problem.channels, 1, *problem.window)
    ones, zeros = [1] * len(problem.grid), [0] * len(problem.grid)
    chosen = torch._C._select_conv_backend(
        x, weight, None, ones, list(problem.before), list(problem.dilation),
        False, zeros, problem.channels, None,
    )  # fmt: skip
    return bool(chosen.name == "Mkldnn")


def grouped(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [N, G, *out_grid] of x [N, G, *grid] and a filter [G, *window], one for each of G channels."""
    before, padding = problem.before, problem.before
    if problem.after != before:
        pairs = zip(reversed(before), reversed(problem.after), strict=True)
        x, padding = F.pad(x, [zeros for pair in pairs for zeros in pair]), (0,) * len(before)
    return CONVOLVE[len(before)](
        x, weight.unsqueeze(1), bias, 1, padding, problem.dilation, weight.shape[0]
    )
