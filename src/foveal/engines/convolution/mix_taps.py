"""A local mix on a CPU, sample by sample and one tap of the window after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.engines.convolution.mix_problem import LocalMix

_WIDE = torch.float32, torch.float64


def refuses(problem: LocalMix) -> str | None:
    if problem.device != "cpu":
        return f"it runs on CPU tensors; these are on {problem.device}"
    if "shift" in problem.borders:
        return "windows that are moved inside the grid meet other tokens than their taps say"
    if problem.dtype not in _WIDE:
        return f"its sums would be in {str(problem.dtype)[6:]}"
    return None


def caveat(problem: LocalMix) -> str | None:
    return None


def mix(problem: LocalMix, weights: Tensor, v: Tensor) -> Tensor:
    """[B, *grid, H, D]"""
    if not problem.needs_grad:
        return _mixed(problem, weights, v)
    o: Tensor = _Mixture.apply(weights, v, problem)  # type: ignore[no-untyped-call]
    return o


Box = tuple[slice, ...]


def _taps(problem: LocalMix) -> Iterator[tuple[int, Box, Box]]:
    """Each tap, the tokens for which it is on the grid, and the tokens which they meet there."""
    axes = zip(problem.grid, problem.window, problem.dilation, problem.borders, strict=True)
    steps = [
        [o * d - (d * (k - 1) if border == "causal" else d * (k - 1) // 2) for o in range(k)]
        for _, k, d, border in axes
    ]
    for number, lags in enumerate(itertools.product(*steps)):
        pairs = list(zip(lags, problem.grid, strict=True))
        if all(abs(lag) < size for lag, size in pairs):
            own = tuple(slice(max(-lag, 0), size - max(lag, 0)) for lag, size in pairs)
            met = tuple(slice(max(lag, 0), size - max(-lag, 0)) for lag, size in pairs)
            yield number, own, met


def _mixed(problem: LocalMix, weights: Tensor, v: Tensor) -> Tensor:
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for total, factors, values in zip(o, weights, v, strict=True):
        for tap, own, met in _taps(problem):
            total[own].addcmul_(factors[(*own, ..., tap, None)], values[met])
    return o


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, problem: LocalMix) -> Tensor:
        ctx.save_for_backward(weights, v)
        ctx.problem = problem
        return _mixed(problem, weights, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, v = ctx.saved_tensors
        problem: LocalMix = ctx.problem
        dweights = torch.empty_like(weights, memory_format=torch.contiguous_format)
        dv = torch.zeros_like(v, memory_format=torch.contiguous_format)
        for sample in range(problem.batch):
            factors, values, above = weights[sample], v[sample], do[sample]
            products = weights.new_zeros(problem.taps, *factors.shape[:-1])
            for tap, own, met in _taps(problem):
                products[tap][own] = torch.linalg.vecdot(values[met], above[own])
                dv[sample][met].addcmul_(factors[(*own, ..., tap, None)], above[own])
            dweights[sample] = products.movedim(0, -1)
        return dweights, dv, None
