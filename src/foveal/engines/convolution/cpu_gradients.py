"""Gradients of a depthwise convolution on a CPU, each in the way that is fastest for its window.

That of x is a convolution with the flipped filter: oneDNN's own routine for it is no faster for any window.
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

from foveal.engines.convolution import classes
from foveal.engines.convolution.cpu import WIDE, convolved, layout
from foveal.engines.convolution.library import CONVOLVE, grouped
from foveal.engines.convolution.problem import Convolution, turned
from foveal.engines.convolution.spectral import smooth

_COLUMNS = 3
"""Taps of a row up to which oneDNN has a routine for the gradient of a filter."""
_WORTH = 130
"""Products for each point of two transforms above which transforms are faster (measured: 108 and 133)."""
_SUMMED = 1024
"""Tokens over which a convolution sums one after the other."""
_CALLED = 4096
"""Tokens over which oneDNN's routine does, where the plan of PyTorch would take another."""
_HELD = 1 << 20
"""Points that are transformed at once, so that they stay in the cache."""


def of_input(problem: Convolution, weight: Tensor, dy: Tensor) -> Tensor:
    """dx [B, C, *grid], stored as the problem says."""
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
    filter = weight.flip(tuple(range(-len(problem.grid), 0)))
    return convolved(shorn, dy[(slice(None), slice(None), *place)], filter, None)


def of_filter(problem: Convolution, x: Tensor, dy: Tensor) -> Tensor:
    """dw [C, *window]"""
    if max(problem.dilation) > 1:
        plain, seen = classes.gathered(problem, x)
        return of_filter(plain, seen, classes.gathered_result(problem, dy))
    row = problem.window[-1]
    axes = zip(problem.before, problem.after, problem.window, strict=True)
    centred = all(before == after <= taps // 2 for before, after, taps in axes)
    if len(problem.grid) == 2 and centred:
        if row <= _COLUMNS:
            return _called(problem, x, dy)
        if problem.window[0] == 1 < problem.grid[0] and not problem.channels_first:
            return _of_row(problem, x, dy)
    sizes = _transforms(problem)
    points = 2 * problem.batch * problem.channels * torch.Size(sizes).numel()
    if row >= WIDE and problem.products > _WORTH * points:
        return _by_transforms(problem, x, dy, sizes)
    return _by_convolution(problem, x, dy)


def _called(problem: Convolution, x: Tensor, dy: Tensor) -> Tensor:
    """PyTorch's own gradient of a filter [C, *window]."""
    planes = layout(problem, not problem.channels_first)
    found = torch.ops.aten.convolution_backward(
        dy.contiguous(memory_format=planes), x.contiguous(memory_format=planes),
        x.new_empty(problem.channels, 1, *problem.window), None,
        [1, 1], list(problem.before), [1, 1], False, [0, 0], problem.channels, [False, True, False],
    )  # fmt: skip
    wanted: Tensor = found[1]
    return wanted[:, 0]


def _of_row(problem: Convolution, x: Tensor, dy: Tensor) -> Tensor:
    """A row of taps is a column of images whose axes are exchanged, some of them at a time."""

    def exchanged(pair: tuple[int, ...]) -> tuple[int, ...]:
        return pair[1], pair[0]

    column = replace(
        problem,
        grid=exchanged(problem.grid),
        window=exchanged(problem.window),
        before=exchanged(problem.before),
        after=exchanged(problem.after),
    )
    total = x.new_zeros(problem.channels, *column.window)
    images = max(1, _CALLED // torch.Size(problem.out_grid).numel())
    for own, above in zip(x.split(images), dy.split(images), strict=True):
        total += _called(column, own.mT, above.mT)
    return total.mT


def _by_convolution(problem: Convolution, x: Tensor, dy: Tensor) -> Tensor:
    """Pieces of dy as filters side by side: a sum over many tokens one after the other loses digits."""
    out, axes = problem.out_grid, len(problem.grid)
    pieces = -(-torch.Size(out).numel() // _SUMMED)
    if pieces == 1 and problem.window[-1] < WIDE:
        count = problem.batch * problem.channels
        swapped = replace(problem, window=out, batch=1, channels=count)
        images = x.reshape(1, count, *problem.grid).contiguous()
        found = grouped(swapped, images, dy.reshape(count, *out), None)
        return found.view(problem.batch, problem.channels, *problem.window).sum(0)
    axis = 0 if out[0] > 1 else axes - 1
    each = -(-out[axis] // pieces)
    pieces = -(-out[axis] // each)
    total = x.new_zeros(problem.channels, *problem.window)
    sizes = [n + taps - 1 for n, taps in zip(out, problem.window, strict=True)]
    sizes[axis] = each + problem.window[axis] - 1
    seen = x.new_zeros(problem.channels, pieces, *sizes)
    for own, above in zip(x, dy, strict=True):
        _fill(problem, seen, own, axis, each)
        behind = [0, 0] * (axes - 1 - axis) + [0, pieces * each - out[axis]]
        above = F.pad(above, behind) if behind[-1] else above
        filters = above.unflatten(1 + axis, (pieces, each)).movedim(1 + axis, 1)
        filters = filters.reshape(-1, 1, *filters.shape[2:])
        found = CONVOLVE[axes](seen.flatten(0, 1)[None], filters, groups=len(filters))
        total += found.view(problem.channels, pieces, *problem.window).sum(1)
    return total


def _fill(problem: Convolution, seen: Tensor, x: Tensor, axis: int, each: int) -> None:
    """Writes what each piece sees of a sample x [C, *grid] to seen [C, pieces, ...]."""
    size, before = problem.grid[axis], problem.before
    for piece in range(seen.shape[1]):
        start = piece * each - before[axis]
        first, last = max(start, 0), min(start + seen.shape[2 + axis], size)
        if first < last:
            own = seen[:, piece].narrow(1 + axis, first - start, last - first)
            for other in range(len(before)):
                if other != axis:
                    own = own.narrow(1 + other, before[other], problem.grid[other])
            own.copy_(x.narrow(1 + axis, first, last - first))


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
