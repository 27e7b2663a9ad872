"""The systems of `convolution` written a second time, from their equations, in plain PyTorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.systems.convolution_generated import GENERATED_DEFINITIONS, orders
from tests.systems.definitions import Example, draw
from tests.systems.grouped import grouped


def lka(source: torch.Generator) -> Example:
    def expected(x: Tensor, near: Tensor, far: Tensor, mixing: Tensor) -> Tensor:
        return x * torch.einsum("oc,bhwc->bhwo", mixing, grouped(grouped(x, near), far, 3))

    shapes = ((2, 6, 11, 3), (3, 5, 5), (3, 7, 7), (3, 3))
    return Example(tuple(draw(source, *shape) for shape in shapes), expected)


def unireplk(source: torch.Generator) -> Example:
    windows, dilations = (9, 5, 5, 3, 3), (1, 1, 2, 3, 4)

    def expected(x: Tensor, *filters: Tensor) -> Tensor:
        parts = (grouped(x, f, r) for f, r in zip(filters, dilations, strict=True))
        return torch.stack(list(parts)).sum(0)

    filters = (draw(source, 3, k, k) for k in windows)
    return Example((draw(source, 2, 5, 8, 3), *filters), expected, {"dilations": dilations[1:]})


def replk(source: torch.Generator) -> Example:
    shapes = ((2, 5, 8, 3), (3, 11, 11), (3, 5, 5))
    return Example(
        tuple(draw(source, *shape) for shape in shapes),
        lambda x, f, g: grouped(x, f) + grouped(x, g),
    )


def inception(source: torch.Generator) -> Example:
    def expected(x: Tensor, square: Tensor, row: Tensor, column: Tensor) -> Tensor:
        parts = [x[..., :3], grouped(x[..., 3:5], square)]
        parts += [grouped(x[..., 5:7], row), grouped(x[..., 7:], column)]
        return torch.cat(parts, dim=-1)

    shapes = ((2, 5, 8, 8), (2, 3, 3), (2, 1, 11), (1, 11, 1))
    return Example(tuple(draw(source, *shape) for shape in shapes), expected)


def oversize(source: torch.Generator) -> Example:
    def expected(x: Tensor, column: Tensor, row: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        y = torch.zeros_like(x)
        for i, j, k, m in itertools.product(
            range(height), range(width), range(height), range(width)
        ):
            weight = column[:, k - i + height - 1] * row[:, m - j + width - 1]
            place = torch.zeros(height, width, dtype=x.dtype)
            place[i, j] = 1.0
            y = y + place[None, :, :, None] * (weight * x[:, k, m])[:, None, None]
        return y

    shapes = ((2, 4, 3, 2), (2, 7), (2, 5))
    return Example(tuple(draw(source, *shape) for shape in shapes), expected)


def lkca(source: torch.Generator) -> Example:
    def expected(v: Tensor, filter: Tensor) -> Tensor:
        heads = [
            grouped(v[..., h, :], filter[h].expand(v.shape[-1], -1, -1)) for h in range(len(filter))
        ]
        return torch.stack(heads, dim=-2)

    return Example((draw(source, 2, 5, 6, 2, 3), draw(source, 2, 7, 7)), expected)


def contmix(source: torch.Generator) -> Example:
    """Every token, its window moved inside the grid."""

    def expected(q: Tensor, k: Tensor, v: Tensor, to_taps: Tensor, bias: Tensor) -> Tensor:
        height, width = q.shape[1:3]
        rows = []
        for i, j in itertools.product(range(height), range(width)):
            affinity = torch.einsum("bhd,brhd->bhr", q[:, i, j], k) / math.sqrt(q.shape[-1])
            weights = torch.softmax(affinity @ to_taps.T + bias, dim=-1)
            top, left = min(max(i - 1, 0), height - 3), min(max(j - 1, 0), width - 3)
            near = v[:, top : top + 3, left : left + 3].flatten(1, 2)
            rows.append(torch.einsum("bht,bthd->bhd", weights, near))
        return torch.stack(rows, dim=1).unflatten(1, (height, width))

    shapes = ((2, 4, 5, 2, 3), (2, 6, 2, 3), (2, 4, 5, 2, 4), (9, 6), (2, 9))
    return Example(tuple(draw(source, *shape) for shape in shapes), expected, {"window": 3})


def taps_of_each(x: Tensor, weights: Tensor, causal: bool) -> Tensor:
    """Sums over taps, token by token; weights [B, L, H, K]."""
    count = weights.shape[-1]
    before = count - 1 if causal else (count - 1) // 2
    rows = []
    for i in range(x.shape[1]):
        total = torch.zeros_like(x[:, 0])
        for tap in range(count):
            if 0 <= i + tap - before < x.shape[1]:
                total = total + weights[:, i, :, tap, None] * x[:, i + tap - before]
        rows.append(total)
    return torch.stack(rows, dim=1)


def dynamic(causal: bool) -> Callable[[torch.Generator], Example]:
    def make(source: torch.Generator) -> Example:
        return Example(
            (draw(source, 2, 9, 2, 3), draw(source, 2, 9, 2, 5)),
            lambda x, logits: taps_of_each(x, torch.softmax(logits, -1), causal),
            {"causal": causal},
        )

    return make


def light(source: torch.Generator) -> Example:
    def expected(x: Tensor, logits: Tensor) -> Tensor:
        weights = torch.softmax(logits, -1).expand(*x.shape[:3], -1)
        return taps_of_each(x, weights, True)

    return Example((draw(source, 2, 9, 2, 3), draw(source, 2, 4)), expected)


def long_convolution(source: torch.Generator) -> Example:
    def expected(x: Tensor, filter: Tensor, skip: Tensor) -> Tensor:
        taps = torch.sign(filter) * torch.clamp(filter.abs() - 0.1, min=0)
        rows = []
        for t in range(x.shape[1]):
            lags = range(min(t + 1, filter.shape[1]))
            rows.append(torch.stack([taps[:, s] * x[:, t - s] for s in lags]).sum(0))
        return torch.stack(rows, dim=1) + skip * x

    return Example((draw(source, 2, 9, 3), draw(source, 3, 7), draw(source, 3)), expected)


def frequency_filter(source: torch.Generator) -> Example:
    def expected(x: Tensor, *maps: Tensor) -> Tensor:
        first, first_bias, second, second_bias = maps
        seen = torch.fft.fft2(x, dim=(1, 2), norm="ortho").unflatten(-1, (2, 3))
        a, b = seen.real, seen.imag

        def layer(a: Tensor, b: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            real = torch.einsum("bxykc,kcd->bxykd", a, m[0])
            real = real - torch.einsum("bxykc,kcd->bxykd", b, m[1]) + s[0]
            other = torch.einsum("bxykc,kcd->bxykd", a, m[1])
            return real, other + torch.einsum("bxykc,kcd->bxykd", b, m[0]) + s[1]

        c, d = layer(a, b, first, first_bias)
        c, d = layer(torch.relu(c), torch.relu(d), second, second_bias)
        c, d = (torch.sign(p) * torch.relu(p.abs() - 0.01) for p in (c, d))
        product = torch.complex(a * c - b * d, a * d + b * c).flatten(-2)
        # Real data fixes the other half of the frequencies; the mask is asked for one half only.
        half = product[:, :, : x.shape[2] // 2 + 1]
        return x + torch.fft.irfft2(half, x.shape[1:3], dim=(1, 2), norm="ortho")

    shapes = ((2, 4, 5, 6), (2, 2, 3, 3), (2, 2, 3), (2, 2, 3, 3), (2, 2, 3))
    return Example(tuple(draw(source, *shape) for shape in shapes), expected)


def fourier_mixer(source: torch.Generator) -> Example:
    """Circular convolution with the taps that have this spectrum."""

    def expected(x: Tensor, weight: Tensor) -> Tensor:
        grid = x.shape[1:4]
        taps = torch.fft.irfftn(torch.complex(weight[..., 0], weight[..., 1]), grid, dim=(1, 2, 3))
        y = torch.zeros_like(x)
        for shift in itertools.product(*(range(n) for n in grid)):
            y = y + taps[(slice(None), *shift)] * torch.roll(x, shift, dims=(1, 2, 3))
        return y

    return Example((draw(source, 1, 3, 2, 4, 2), draw(source, 2, 3, 2, 3, 2)), expected)


CONVOLUTION_DEFINITIONS: dict[str, tuple[Callable[[torch.Generator], Example], ...]] = {
    "lka": (lka,),
    "unireplk": (unireplk,),
    "replk": (replk,),
    "inception_dwconv": (inception,),
    "parc_oversized": (oversize,),
    "lkca": (lkca,),
    "spartan_multiorder": (orders,),
    "contmix": (contmix,),
    "dynamic_conv": (dynamic(True), dynamic(False)),
    "light_conv": (light,),
    **GENERATED_DEFINITIONS,
    "flash_butterfly": (long_convolution,),
    "aff": (frequency_filter,),
    "fourier_mixer_3d": (fourier_mixer,),
}
