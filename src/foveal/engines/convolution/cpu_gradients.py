"""Gradients of a plain depthwise convolution on a CPU, each in the way that is fastest for its window.

That of a filter, dw[c, o] = sum of dy[b, p, c] x[b, p + o - before, c], is computed
by oneDNN's routine for it, which knows rows of up to 3 taps;
as one more convolution, of x with dy as its filter, of which the samples are channels too;
by Fourier transforms, where that convolution is long.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.engines.convolution.cpu import WIDE, convolved, layout
from foveal.engines.convolution.library import CONVOLVE, grouped
from foveal.engines.convolution.problem import Convolution, turned
from foveal.engines.convolution.spectral import smooth

_KNOWN = 11
"""Taps of a row up to which oneDNN's routine for the gradient of x is used: wider ones are slower there."""
_COLUMNS = 3
"""Taps of a row up to which oneDNN has a routine for the gradient of a filter."""
_WORTH = 130
"""Products for each point of two transforms above which transforms are faster (measured: 108 and 133)."""
_SUMMED = 1024
"""Tokens over which the library sums one after the other."""
_HELD = 1 << 20
"""Points that are transformed at once, so that they stay in the cache."""


def of_input(problem: Convolution, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """dx [B, C, *grid], stored as the problem says."""
    axes = len(problem.grid)
    if axes == 2 and problem.window[-1] <= _KNOWN and problem.before == problem.after:
        return _called(problem, x, weight[:, None], dy, problem.before, of_filter=False)
    back = turned(problem)
    place = tuple(
        slice(max(-before, 0), size - max(-after, 0))
        for size, before, after in zip(back.grid, back.before, back.after, strict=True)
    )
    shorn = replace(
        back,
        grid=tuple(p.stop - p.start for p in place),
        before=tuple(max(b, 0) for b in back.before),
        after=tuple(max(a, 0) for a in back.after),
    )
    filter = weight.flip(tuple(range(-axes, 0)))
    return convolved(shorn, dy[(slice(None), slice(None), *place)], filter, None)


def of_filter(problem: Convolution, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """dw [C, *window]"""
    row = problem.window[-1]
    axes = zip(problem.before, problem.after, problem.window, strict=True)
    centred = all(before == after <= taps // 2 for before, after, taps in axes)
    if len(problem.grid) == 2 and row <= _COLUMNS and centred:
        return _called(problem, x, weight[:, None], dy, problem.before, of_filter=True)[:, 0]
    sizes = _transforms(problem)
    points = 2 * problem.batch * problem.channels * torch.Size(sizes).numel()
    if row >= WIDE and problem.products > _WORTH * points:
        return _by_transforms(problem, x, dy, sizes)
    return _by_convolution(problem, x, dy)


def _called(
    problem: Convolution,
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    padding: tuple[int, ...],
    of_filter: bool,
) -> Tensor:
    """PyTorch's own gradient of x or of a filter [C, 1, *window]."""
    planes = layout(problem, not problem.channels_first)
    ones, zeros = [1] * len(padding), [0] * len(padding)
    found = torch.ops.aten.convolution_backward(
        dy.contiguous(memory_format=planes),
        x.contiguous(memory_format=planes),
        weight,
        None,
        ones,
        list(padding),
        ones,
        False,
        zeros,
        problem.channels,
        [not of_filter, of_filter, False],
    )
    wanted: Tensor = found[1 if of_filter else 0]
    return wanted


def _by_convolution(problem: Convolution, x: Tensor, dy: Tensor) -> Tensor:
    """Some rows of dy at a time: a sum over many tokens one after the other loses digits."""
    count = problem.batch * problem.channels
    images = x.reshape(1, count, *problem.grid)
    filters = dy.reshape(count, 1, *problem.out_grid)
    out = problem.out_grid
    pieces = -(-torch.Size(out).numel() // _SUMMED)
    if pieces == 1 and problem.window[-1] < WIDE:
        swapped = replace(problem, window=out, batch=1, channels=count)
        found = grouped(swapped, images.contiguous(), filters.squeeze(1), None)
        return found.view(problem.batch, problem.channels, *problem.window).sum(0)
    pairs = zip(reversed(problem.before), reversed(problem.after), strict=True)
    images = F.pad(images, [zeros for pair in pairs for zeros in pair])
    axis = 0 if out[0] > 1 else len(out) - 1
    step = -(-out[axis] // pieces)
    total = x.new_zeros(problem.channels, *problem.window)
    for first in range(0, out[axis], step):
        length = min(step, out[axis] - first)
        seen = images.narrow(2 + axis, first, length + problem.window[axis] - 1)
        own = filters.narrow(2 + axis, first, length)
        found = CONVOLVE[len(out)](seen, own, groups=count)
        total += found.view(problem.batch, problem.channels, *problem.window).sum(0)
    return total


def _transforms(problem: Convolution) -> list[int]:
    """Sizes at which no lag of the window meets another of the circle."""
    axes = zip(
        problem.grid, problem.out_grid, problem.window, problem.before, problem.after, strict=True
    )
    return [
        smooth(max(size + before, size + after, out, taps))
        for size, out, taps, before, after in axes
    ]


def _by_transforms(problem: Convolution, x: Tensor, dy: Tensor, sizes: list[int]) -> Tensor:
    """The spectrum of x times the conjugate one of dy, some channels at a time."""
    axes = tuple(range(-len(sizes), 0))
    step = max(1, _HELD // (problem.batch * torch.Size(sizes).numel()))
    dw = x.new_empty(problem.channels, *problem.window)
    for first in range(0, problem.channels, step):
        own = slice(first, first + step)
        seen, met = (torch.fft.rfftn(t[:, own].contiguous(), sizes, axes) for t in (x, dy))
        found = torch.fft.irfftn((seen * met.conj()).sum(0), sizes, axes)
        lags = found.roll(problem.before, axes)
        dw[own] = lags[(slice(None), *(slice(0, taps) for taps in problem.window))]
    return dw
