"""PyTorch's CPU convolutions, each in the memory layout in which its library is fast.

oneDNN has one routine for rows of up to 13 taps and another for wider ones.  The first is best channels
first (from 11 taps on), the second runs channels last only: elsewhere it is 15 to 50 times slower.  So
wide filters are laid channels last, and rows of 11 to 13 taps of an input that is channels last are widened
to 15 with zeros.  Dilated filters meet each class of tokens as a batch of its own.  Gradients: see
`cpu_gradients`; PyTorch's own gradient of a filter takes 3 to 100 times as long from rows of 4 taps on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.engines.common.step import Gradients, recorded
from foveal.engines.convolution import classes
from foveal.engines.convolution.library import grouped
from foveal.engines.convolution.problem import Convolution

WIDE = 14
"""Taps of a row from which the second routine runs."""
_SLOW = 10
"""Taps of a row from which the first routine is slow channels last."""
_FEW, _SOME, _LARGE = 3, 5, 512
"""Taps of a row up to which PyTorch's gradients are as fast; channels last on more tokens than _LARGE."""

_SOON, _SOON_FORWARD = 2**19, 2**22
"""Products below which PyTorch's one call ends before those here, with gradients and without (measured)."""


def refuses(problem: Convolution) -> str | None:
    if problem.device != "cpu":
        return f"it runs on CPU tensors; these are on {problem.device}"
    if problem.dtype not in (torch.float32, torch.float64):
        return f"its layouts were measured in float32; this is {str(problem.dtype)[6:]}"
    if problem.batch == 0:
        return "an empty batch has no samples to lay out"
    return None


def caveat(problem: Convolution) -> str | None:
    """Why the plan passes by this edition although it runs when it is named."""
    if len(problem.grid) == 1 or problem.reach[-1] + 1 >= WIDE:
        return None
    row = problem.window[-1]
    if not problem.needs_grad:
        if row < _SLOW or problem.channels_first:
            return f"PyTorch's one call is the same routine for rows of {row} taps"
        if problem.products < _SOON_FORWARD:
            return f"PyTorch's one call ends sooner for {problem.products:,} products"
        return None
    if problem.products < _SOON:
        return f"PyTorch's one call ends sooner for {problem.products:,} products"
    plain = len(problem.grid) == 2 and problem.before == problem.after
    large = math.prod(problem.grid) > _LARGE and max(problem.window) <= _SOME
    few = _SOME if large and not problem.channels_first else _FEW
    if row <= few and plain and max(problem.dilation) == 1:
        return f"PyTorch's own gradients are as fast for rows of {row} taps"
    return None


def depthwise(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C], stored as x is: channels last or first."""
    return planes(problem, x.movedim(-1, 1), weight, bias).movedim(1, -1)


def planes(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, C, *out_grid] of x [B, C, *grid], each stored channels last or first as the problem says."""
    if len(problem.grid) == 1:  # rows of images
        return planes(as_image(problem), x.unsqueeze(2), weight.unsqueeze(-2), bias).squeeze(2)
    if problem.per_sample:
        return _own_filters(problem, x, weight, bias)
    if max(problem.dilation) > 1 and problem.reach[-1] + 1 >= WIDE:
        parts, gathered = classes.gathered(problem, x)
        return classes.scattered(problem, planes(parts, gathered, weight, bias))
    return recorded(_Depthwise(problem), x, weight, *(() if bias is None else (bias,)))


def direct(problem: Convolution) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The call alone, of x as the problem stores it."""
    if problem.channels_first:
        return functools.partial(planes, problem)
    return functools.partial(depthwise, problem)


def as_image(problem: Convolution) -> Convolution:
    """A sequence as an image of one row."""
    return replace(
        problem,
        grid=(1, *problem.grid),
        window=(1, *problem.window),
        dilation=(1, *problem.dilation),
        before=(0, *problem.before),
        after=(0, *problem.after),
    )


def _own_filters(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Samples as channels."""
    count = problem.batch * problem.channels
    whole = replace(problem, batch=1, channels=count, per_sample=False, channels_first=True)
    bias = None if bias is None else bias.repeat(problem.batch)
    y = planes(whole, x.reshape(1, count, *problem.grid), weight.flatten(0, 1), bias)
    y = y.view(problem.batch, problem.channels, *problem.out_grid)
    return y if problem.channels_first else y.contiguous(memory_format=layout(problem, last=True))


@dataclass(frozen=True)
class _Depthwise:
    """The step of autograd of x, a filter and perhaps a bias."""

    problem: Convolution
    name = "cpu"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return convolved(self.problem, x, weight, bias)

    def backward(
        self, tensors: Sequence[Tensor], above: Tensor, needed: Sequence[bool]
    ) -> Gradients:
        from foveal.engines.convolution import cpu_gradients as gradients

        x, weight, *bias = tensors
        found: list[Tensor | None] = [None] * len(tensors)
        if needed[0]:
            found[0] = gradients.of_input(self.problem, weight, above)
        if needed[1]:
            found[1] = gradients.of_filter(self.problem, x, above)
        if bias and needed[2]:
            found[2] = above.sum((0, *range(2, above.dim())))
        return found


def layout(problem: Convolution, last: bool) -> torch.memory_format:
    if not last:
        return torch.contiguous_format
    return torch.channels_last if len(problem.grid) == 2 else torch.channels_last_3d


def convolved(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, C, *out_grid] of x [B, C, *grid] and a filter [C, *window], as `planes` stores it."""
    last = problem.window[-1] >= WIDE or not problem.channels_first
    plain = len(problem.grid) == 2 and problem.dilation[-1] == 1
    if last and plain and _SLOW <= problem.window[-1] < WIDE:
        problem, weight = _widened(problem, weight)
    x = x.contiguous(memory_format=layout(problem, last))
    y = grouped(problem, x, weight, bias)
    return y.contiguous(memory_format=layout(problem, not problem.channels_first))


def _widened(problem: Convolution, weight: Tensor) -> tuple[Convolution, Tensor]:
    """The same convolution with zeros beside the rows of the filter."""
    more = WIDE + 1 - problem.window[-1]
    # As many zeros before as behind the axis, if that can be: others are copies of x with zeros around.
    left = min(max((more + problem.after[-1] - problem.before[-1]) // 2, 0), more)
    right = more - left
    problem = replace(
        problem,
        window=(*problem.window[:-1], WIDE + 1),
        before=(*problem.before[:-1], problem.before[-1] + left),
        after=(*problem.after[:-1], problem.after[-1] + right),
    )
    return problem, F.pad(weight, (left, right))
