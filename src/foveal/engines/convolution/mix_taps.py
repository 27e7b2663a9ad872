"""A local mix on a CPU, sample by sample and one tap of the window after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.engines.common.step import Gradients, recorded
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
    return recorded(_Mixture(problem), weights, v)


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


@dataclass(frozen=True)
class _Mixture:
    """The step of autograd of weights and v."""

    problem: LocalMix
    name = "taps"

    def forward(self, weights: Tensor, v: Tensor) -> Tensor:
        return _mixed(self.problem, weights, v)

    def backward(
        self, tensors: Sequence[Tensor], above: Tensor, needed: Sequence[bool]
    ) -> Gradients:
        problem, (weights, v) = self.problem, tensors
        dweights = torch.empty_like(weights, memory_format=torch.contiguous_format)
        dv = torch.zeros_like(v, memory_format=torch.contiguous_format)
        for sample in range(problem.batch):
            factors, values, do = weights[sample], v[sample], above[sample]
            products = weights.new_zeros(problem.taps, *factors.shape[:-1])
            for tap, own, met in _taps(problem):
                products[tap][own] = torch.linalg.vecdot(values[met], do[own])
                dv[sample][met].addcmul_(factors[(*own, ..., tap, None)], do[own])
            dweights[sample] = products.movedim(0, -1)
        return dweights, dv
