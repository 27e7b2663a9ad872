"""Convolutions that implementations get wrong, their definition by PyTorch, and the comparison."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import foveal as fv
from foveal.testing.bounds import check_near, error, neighbour

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """x [batch, *grid, channels], a filter of these sizes, and the options of `convolve`."""

    x: tuple[int, ...]
    filter: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = True
    channels_first: bool = False

    def first(self) -> Shape:
        return dataclasses.replace(self, channels_first=True)


SHAPES: dict[str, Shape] = {
    "square": Shape((2, 9, 8, 5), (5, 3, 3)),
    "even and dilated": Shape((2, 9, 8, 5), (5, 4, 6), {"dilation": (2, 1)}),
    "causal sequence": Shape((3, 20, 6), (6, 7), {"causal": True}),
    "dilated sequence": Shape((3, 20, 6), (6, 7), {"causal": True, "dilation": 2}),
    "volume": Shape((1, 5, 6, 7, 4), (4, 3, 5, 3)),
    "larger than the grid": Shape((2, 5, 4, 6), (6, 9, 7)),
    "thirteen": Shape((1, 6, 7, 3), (3, 13, 13)),
    "padding of two kinds": Shape((2, 8, 8, 4), (4, 3, 3), {"padding": ((5, 0), (0, 4))}),
    "one axis causal": Shape((1, 6, 7, 3), (3, 3, 4), {"causal": (False, True)}),
    "a filter for two channels": Shape((2, 6, 5, 6), (3, 3, 3)),
    "a filter for each sample": Shape((2, 6, 5, 6), (2, 6, 3, 3), bias=False),
    "a sequence filter for each sample": Shape((2, 15, 3), (2, 3, 17)),
    "one pixel": Shape((1, 1, 1, 2), (2, 5, 5), bias=False),
    "no samples": Shape((0, 4, 4, 2), (2, 3, 3)),
    "no samples, own filters": Shape((0, 4, 4, 2), (0, 2, 3, 3), bias=False),
    "strip": Shape((1, 6, 9, 4), (4, 1, 11)),
}


def definition(shape: Shape, x: Tensor, filter: Tensor, bias: Tensor | None) -> Tensor:
    """By PyTorch's grouped convolution, one sample after the other, channels last."""
    axes = x.dim() - 2
    groups = x.shape[-1] // filter.shape[-axes - 1]
    filter = filter.repeat_interleave(groups, dim=-axes - 1)
    pads = padding_of(shape, tuple(filter.shape[-axes:]))
    padded = F.pad(x.movedim(-1, 1), [zeros for pair in reversed(pads) for zeros in pair])
    call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    samples = [
        call(
            padded[n : n + 1],
            (filter[n] if filter.dim() == axes + 2 else filter)[:, None],
            bias,
            dilation=shape.options.get("dilation", 1),
            groups=x.shape[-1],
        )
        for n in range(len(x))
    ]
    if not samples:
        return x + filter.sum() + (0 if bias is None else bias)
    return torch.cat(samples).movedim(1, -1)


def padding_of(shape: Shape, window: tuple[int, ...]) -> list[tuple[int, int]]:
    given = shape.options.get("padding")
    if given is not None:
        return list(given)
    causal, step = shape.options.get("causal", False), shape.options.get("dilation", 1)
    found = []
    for axis, k in enumerate(window):
        reach = (step if isinstance(step, int) else step[axis]) * (k - 1)
        past = causal if isinstance(causal, bool) else causal[axis]
        before = reach if past else reach // 2
        found.append((before, reach - before))
    return found


def draw(shape: Shape, source: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    sizes = [shape.x, shape.filter, *([(shape.x[-1],)] if shape.bias else [])]
    return [torch.randn(size, generator=source, dtype=torch.float64).to(dtype) for size in sizes]


def convolved(shape: Shape, implementation: str | None) -> Call:
    def call(x: Tensor, filter: Tensor, bias: Tensor | None = None) -> Tensor:
        seen = x.movedim(-1, 1).contiguous() if shape.channels_first else x
        y = fv.convolve(
            seen,
            filter,
            bias=bias,
            channels_first=shape.channels_first,
            implementation=implementation,
            **shape.options,
        )
        return y.movedim(1, -1) if shape.channels_first else y

    return call


def defined(shape: Shape) -> Call:
    def call(x: Tensor, filter: Tensor, bias: Tensor | None = None) -> Tensor:
        return definition(shape, x, filter, bias)

    return call


def results(call: Call, tensors: list[Tensor], signs: bool = True) -> dict[str, Tensor]:
    """The output and all gradients for a fixed weight of the outputs; without `signs`, of its size."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = call(*leaves)
    weight = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y)
    gradients = torch.autograd.grad(y, leaves, weight if signs else weight.abs())
    return {"y": y.detach()} | {f"gradient {n}": g for n, g in enumerate(gradients)}


def failures(got: Call, plain: Call, tensors: list[Tensor], source: torch.Generator) -> list[str]:
    """What `got` computes worse than the precision allows, `plain` being an ordinary computation."""

    def errors_at(number: int) -> dict[str, float]:
        near = [neighbour(x, source) for x in tensors] if number else tensors
        exact = results(plain, [x.double() for x in near])
        return {name: error(x, exact[name]) for name, x in results(plain, near).items()}

    exact = results(plain, [x.double() for x in tensors])
    unsigned = [x.double().abs() for x in tensors]  # all of these sums cancel
    terms = results(plain, unsigned, signs=False)
    verdicts = check_near(results(got, tensors), exact, errors_at, terms)
    return [str(verdict) for verdict in verdicts if not verdict.ok]


@dataclass(frozen=True)
class Row:
    """x [batch, H, W, channels], taps of a row and of a column, and the options of `convolve`."""

    x: tuple[int, ...]
    taps: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    filters: int | None = None

    def draw(self, source: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
        """x, row, column, what is added between them, and the bias."""
        width, count = self.x[-1], self.filters or self.x[-1]
        sizes = (self.x, *((count, k) for k in self.taps), (width,), (width,))
        return [torch.randn(n, generator=source, dtype=torch.float64).to(dtype) for n in sizes]

    def call(self, implementation: str | None, first: bool = False) -> Call:
        def call(x: Tensor, row: Tensor, column: Tensor, between: Tensor, bias: Tensor) -> Tensor:
            y = fv.convolve(
                x.movedim(-1, 1).contiguous() if first else x,
                fv.Strips(row, column, between),
                bias=bias,
                channels_first=first,
                implementation=implementation,
                **self.options,
            )
            return y.movedim(1, -1) if first else y

        return call

    def definition(
        self, x: Tensor, row: Tensor, column: Tensor, between: Tensor, bias: Tensor
    ) -> Tensor:
        """By PyTorch's grouped convolution, one strip after the other."""
        window = self.taps[1], self.taps[0]
        down, across = padding_of(Shape(self.x, (1, *window), self.options), window)
        step = self.options.get("dilation", 1)
        steps = (step, step) if isinstance(step, int) else step
        width = x.shape[-1]
        row, column = (t.repeat_interleave(width // len(t), dim=0) for t in (row, column))
        y = F.pad(x.movedim(-1, 1), across)
        y = F.conv2d(y, row[:, None, None], between, dilation=(1, steps[1]), groups=width)
        y = F.pad(y, (0, 0, *down))
        y = F.conv2d(y, column[:, None, :, None], bias, dilation=(steps[0], 1), groups=width)
        return y.movedim(1, -1)


ROWS: dict[str, Row] = {
    "eleven": Row((2, 13, 14, 5), (11, 11)),
    "dilated": Row((1, 17, 9, 6), (5, 3), {"dilation": (3, 2)}),
    "longer than the grid": Row((1, 5, 4, 3), (19, 23)),
    "one axis causal": Row((1, 9, 7, 4), (4, 3), {"causal": (False, True)}),
    "padding of two kinds": Row((1, 8, 10, 4), (3, 5), {"padding": ((5, 0), (0, 4))}, filters=2),
    "one pixel": Row((2, 1, 1, 3), (3, 3)),
}


@dataclass(frozen=True)
class Mix:
    """v [batch, *grid, heads, head_dim], a window, and the options of `local_mix`."""

    v: tuple[int, ...]
    window: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[int, ...]:
        return (*self.v[:-1], math.prod(self.window))


MIXES: dict[str, Mix] = {
    "sequence": Mix((2, 9, 3, 4), (5,)),
    "shifted sequence": Mix((2, 9, 3, 4), (5,), {"border": "shift"}),
    "causal sequence": Mix((2, 9, 3, 4), (4,), {"causal": True}),
    "even, shifted, dilated": Mix((2, 9, 3, 4), (4,), {"border": "shift", "dilation": 2}),
    "image": Mix((1, 7, 8, 2, 5), (3, 5)),
    "shifted image": Mix((1, 7, 8, 2, 5), (3, 5), {"border": "shift"}),
    "shifted, dilated image": Mix(
        (1, 9, 10, 2, 3), (3, 3), {"border": "shift", "dilation": (2, 3)}
    ),
    "window of the whole grid": Mix((1, 4, 5, 2, 3), (4, 5), {"border": "shift"}),
    "one axis causal": Mix((1, 4, 5, 2, 3), (7, 4), {"causal": (True, False)}),
    "volume": Mix((1, 3, 4, 5, 1, 3), (3, 3, 3), {"border": "shift"}),
    "no samples": Mix((0, 4, 2, 3), (3,)),
}


def mixed(case: Mix, implementation: str | None) -> Call:
    def call(weights: Tensor, v: Tensor) -> Tensor:
        return fv.local_mix(weights, v, case.window, implementation=implementation, **case.options)

    return call


def mix_definition(case: Mix) -> Call:
    """Token by token, tap by tap."""

    def call(weights: Tensor, v: Tensor) -> Tensor:
        grid = v.shape[1:-2]
        places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid)).tolist()
        taps = torch.cartesian_prod(*(torch.arange(n) for n in case.window))
        rows = []
        for place in places:
            total = torch.zeros_like(v[(slice(None), *(0,) * len(grid))])
            for number, tap in enumerate(taps.view(-1, len(grid)).tolist()):
                met = [axis_place(case, axis, p, t, grid) for axis, (p, t) in enumerate(zip(place, tap, strict=True))]  # fmt: skip  # noqa: E501
                if all(0 <= m < n for m, n in zip(met, grid, strict=True)):
                    weight = weights[(slice(None), *place, slice(None), number)]
                    total = total + weight[..., None] * v[(slice(None), *met)]
            rows.append(total)
        return torch.stack(rows, dim=1).unflatten(1, grid)

    return call


def axis_place(case: Mix, axis: int, place: int, tap: int, grid: Any) -> int:
    window = case.window[axis]
    step = case.options.get("dilation", 1)
    step = step if isinstance(step, int) else step[axis]
    causal = case.options.get("causal", False)
    if causal if isinstance(causal, bool) else causal[axis]:
        return place - step * (window - 1 - tap)
    if case.options.get("border") != "shift":
        return place - step * (window - 1) // 2 + step * tap
    same = list(range(place % step, grid[axis], step))
    begin = min(max(same.index(place) - window // 2, 0), len(same) - window)
    return same[begin + tap]


@dataclass(frozen=True)
class Long:
    """x [batch, length, channels], a causal filter of these sizes, and what stands around it."""

    x: tuple[int, int, int]
    filter: tuple[int, ...]
    pre: bool = True
    post: bool = True
    skip: bool = True

    def draw(self, source: torch.Generator) -> list[Tensor]:
        """x, the filter, and what the problem has of both gates and skip, in float32."""
        around = [self.x] * (self.pre + self.post) + [self.x[-1:]] * self.skip
        return [torch.randn(size, generator=source) for size in (self.x, self.filter, *around)]

    def _named(self, rest: tuple[Tensor, ...]) -> dict[str, Tensor]:
        names = [
            name
            for name, there in (
                ("pre_gate", self.pre),
                ("post_gate", self.post),
                ("skip", self.skip),
            )
            if there
        ]
        return dict(zip(names, rest, strict=True))

    def call(self, implementation: str | None) -> Call:
        def run(x: Tensor, filter: Tensor, *rest: Tensor) -> Tensor:
            return fv.fftconv(x, filter, **self._named(rest), implementation=implementation)

        return run

    def definition(self, x: Tensor, filter: Tensor, *rest: Tensor) -> Tensor:
        """By PyTorch's transforms of twice the length, in the precision of x."""
        around = self._named(rest)
        seen = x * around["pre_gate"] if self.pre else x
        size = 2 * x.shape[1]
        spectrum = torch.fft.rfft(filter[..., : x.shape[1]], size)
        y = torch.fft.irfft(torch.fft.rfft(seen.mT, size) * spectrum, size)[..., : x.shape[1]].mT
        y = y * around["post_gate"] if self.post else y
        return y + around["skip"] * x if self.skip else y


LONG: dict[str, Long] = {
    "one token": Long((2, 1, 3), (3, 1)),
    "gated": Long((2, 100, 5), (5, 100)),
    "bare": Long((1, 37, 3), (3, 37), pre=False, post=False, skip=False),
    "a short filter for each sample": Long((2, 70, 2), (2, 2, 9), pre=False),
    "longer than the sequence": Long((2, 20, 3), (3, 33), post=False),
    "a thousand": Long((1, 1000, 2), (2, 1000), skip=False),
    "in three launches": Long((1, 1300, 1), (1, 1300)),
    "channels of four": Long((2, 300, 20), (20, 300)),
    "channels of four, a filter for each sample": Long((2, 9, 36), (2, 36, 9), skip=False),
}
