"""PyTorch's CPU convolutions, each in the memory layout in which its library is fast.

oneDNN has one routine for rows of up to 14 taps and another for wider ones.  The first is best channels
first (from 11 taps on), the second runs channels last only: elsewhere it is 15 to 50 times slower.  So
wide filters are laid channels last, and rows of 11 to 14 taps of an input that is channels last are widened
to 15 with zeros.  The gradient of the filter is one more convolution, of x with dy as its filter, of
which the samples are channels too; PyTorch's own takes 6 to 100 times as long.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from foveal.engines.convolution.library import grouped
from foveal.engines.convolution.problem import Convolution, turned

_NARROW = 14
"""Taps of a row up to which the first routine runs."""
_SLOW = 11
"""Taps of a row from which that routine is slow channels last."""

_FEWEST = 36
"""Taps of an image or volume from which the gradients here are faster (3x3 measured slower, 7x7 faster)."""

_SOON = 2**19
"""Products of an image or volume below which PyTorch's one call ends before the calls here (measured)."""


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
    if len(problem.grid) > 1 and problem.taps < _FEWEST:
        return f"PyTorch's own gradients are as fast for {problem.taps} taps"
    if len(problem.grid) > 1 and problem.products < _SOON:
        return f"PyTorch's one call ends sooner for {problem.products:,} products"
    return None


def depthwise(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C], stored as x is: channels last or first."""
    if not problem.needs_grad:
        return _convolved(problem, x, weight, bias)
    y: Tensor = _Depthwise.apply(x, weight, bias, problem)  # type: ignore[no-untyped-call]
    return y


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, problem: Convolution
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.problem = problem
        return _convolved(problem, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        problem: Convolution = ctx.problem
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            axes = len(problem.grid)
            dx = _convolved(_shorn(turned(problem)), *_cut(turned(problem), dy, weight, axes), None)
        if ctx.needs_input_grad[1]:
            dweight = _filter_gradient(problem, x, dy).reshape(weight.shape)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(tuple(range(dy.dim() - 1)))
        return dx, dweight, dbias, None


def _shorn(problem: Convolution) -> Convolution:
    """The problem without negative padding: where x was padded beyond the filter, dy loses a margin."""
    grid = tuple(
        size + min(before, 0) + min(after, 0)
        for size, before, after in zip(problem.grid, problem.before, problem.after, strict=True)
    )
    return replace(
        problem,
        grid=grid,
        before=tuple(max(b, 0) for b in problem.before),
        after=tuple(max(a, 0) for a in problem.after),
    )


def _cut(problem: Convolution, dy: Tensor, weight: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """dy without the margin that `_shorn` leaves out, and the flipped filter."""
    place = tuple(
        slice(max(-before, 0), size - max(-after, 0))
        for size, before, after in zip(problem.grid, problem.before, problem.after, strict=True)
    )
    return dy[(slice(None), *place)], weight.flip(tuple(range(-axes, 0)))


def _convolved(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    first = x.movedim(-1, 1)
    if problem.per_sample:
        whole = first.reshape(1, -1, *problem.grid)
        bias = None if bias is None else bias.repeat(problem.batch)
        y = _laid(problem, whole, weight.flatten(0, 1), bias, last=_wide(problem))
        y = y.view(problem.batch, problem.channels, *problem.out_grid)
    else:
        last = _wide(problem) or not problem.channels_first
        y = _laid(problem, first, weight, bias, last)
    y = y.movedim(1, -1)
    if problem.channels_first:
        return y.movedim(-1, 1).contiguous().movedim(1, -1)
    return y.contiguous()


def _wide(problem: Convolution) -> bool:
    return problem.window[-1] > _NARROW


def _laid(
    problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None, last: bool
) -> Tensor:
    """y [N, G, *out_grid] of x [N, G, *grid], worked on channels last or first."""
    sequence = len(problem.grid) == 1
    if sequence:  # rows of images: PyTorch's one-dimensional convolution knows channels first only
        x, weight = x.unsqueeze(2), weight.unsqueeze(1)
        problem = replace(
            problem,
            grid=(1, *problem.grid),
            window=(1, *problem.window),
            dilation=(1, *problem.dilation),
            before=(0, *problem.before),
            after=(0, *problem.after),
        )
    plain = len(problem.grid) == 2 and problem.dilation[-1] == 1
    if last and plain and _SLOW <= problem.window[-1] <= _NARROW:
        problem, weight = _widened(problem, weight)
    planes = torch.channels_last if len(problem.grid) == 2 else torch.channels_last_3d
    x = x.contiguous(memory_format=planes if last else torch.contiguous_format)
    y = grouped(problem, x, weight, bias)
    return y.squeeze(2) if sequence else y


def _widened(problem: Convolution, weight: Tensor) -> tuple[Convolution, Tensor]:
    """The same convolution with zeros beside the rows of the filter."""
    more = _NARROW + 1 - problem.window[-1]
    left, right = more // 2, more - more // 2
    problem = replace(
        problem,
        window=(*problem.window[:-1], _NARROW + 1),
        before=(*problem.before[:-1], problem.before[-1] + left),
        after=(*problem.after[:-1], problem.after[-1] + right),
    )
    return problem, F.pad(weight, (left, right))


def _filter_gradient(problem: Convolution, x: Tensor, dy: Tensor) -> Tensor:
    """[.., C, *window]: dw[c, o] = sum of dy[b, p, c] x[b, p + dilation o - before, c]"""
    batch, channels = problem.batch, problem.channels
    swapped = replace(problem, window=problem.out_grid, dilation=(1,) * len(problem.grid))
    images = x.movedim(-1, 1).reshape(1, batch * channels, *problem.grid)
    filters = dy.movedim(-1, 1).reshape(batch * channels, *problem.out_grid)
    wide = problem.reach[-1] >= _NARROW
    found = _laid(swapped, images, filters, None, last=wide and _wide(swapped))
    found = found.view(batch, channels, *swapped.out_grid)
    steps = (slice(None, None, step) for step in problem.dilation)
    found = found[(slice(None), slice(None), *steps)]
    return found if problem.per_sample else found.sum(0)
