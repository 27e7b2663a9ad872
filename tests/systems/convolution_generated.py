"""More systems of `convolution` written a second time: filters from their input, and choices among them."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.systems.definitions import Example, draw
from tests.systems.grouped import grouped


def drawn(source: torch.Generator, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(draw(source, *shape) for shape in shapes)


def orders(source: torch.Generator) -> Example:
    def expected(x: Tensor, gamma: Tensor, high: Tensor, first: Tensor, second: Tensor) -> Tensor:
        mean = torch.stack([each.flatten(0, 1).mean(0) for each in x])[:, None, None]
        u = (1 + gamma) * x - gamma * mean
        parts = [grouped(u, high), grouped(grouped(u, first, 2), second, 2)]
        return torch.cat([F.gelu(part) for part in parts], dim=-1)

    shapes = ((2, 5, 8, 3), (3,), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    return Example(drawn(source, *shapes), expected)


def separable(source: torch.Generator) -> Example:
    """Each weight of a branch on its own."""

    def expected(
        x: Tensor, square: Tensor, row: Tensor, column: Tensor,
        reduce: Tensor, expand: Tensor, spatial: Tensor, mixing: Tensor,
    ) -> Tensor:  # fmt: skip
        a0 = grouped(x, square)
        branches = [a0, *(strip(a0, taps) for taps in (row, column))]
        s = branches[0] + branches[1] + branches[2]
        pooled = s.sum((1, 2)) / (s.shape[1] * s.shape[2])
        hidden = torch.clamp(pooled @ reduce.T, min=0)
        maps = torch.stack([s.sum(-1) / s.shape[-1], s.max(-1).values], dim=-1)
        total = torch.zeros_like(s)
        for number, branch in enumerate(branches):
            channel = 1 / (1 + torch.exp(-hidden @ expand[number].T))
            place = grouped(maps, spatial[number]).sum(-1, keepdim=True)
            total = total + branch * channel[:, None, None] / (1 + torch.exp(-place))
        return x * (total @ mixing.T)

    def strip(x: Tensor, taps: Tensor) -> Tensor:
        return grouped(x, taps, 2)

    shapes = (
        (2, 5, 8, 3),
        (3, 3, 3),
        (3, 1, 5),
        (3, 5, 1),
        (4, 3),
        (3, 3, 4),
        (3, 2, 7, 7),
        (3, 3),
    )
    return Example(drawn(source, *shapes), expected, {"dilation": 2})


def attentive(source: torch.Generator) -> Example:
    """A filter for every sample and channel, made one by one."""

    def expected(x: Tensor, features: Tensor, generator: Tensor, inhibition: Tensor) -> Tensor:
        samples = []
        for image, own in zip(x, features.flatten(1, 2), strict=True):
            channels = []
            for c in range(x.shape[-1]):
                bounds = [(i * len(own) // 9, -(-(i + 1) * len(own) // 9)) for i in range(9)]
                pooled = torch.stack([own[a:b, c].mean() for a, b in bounds])
                taps = generator @ (pooled * (1 + torch.erf(pooled / math.sqrt(2))) / 2)
                taps = taps - taps.sum() / 9 / (1 + torch.exp(-inhibition[c]))
                channels.append(grouped(image[None, ..., c : c + 1], taps.view(1, 3, 3)))
            samples.append(torch.cat(channels, dim=-1))
        return torch.cat(samples)

    return Example(drawn(source, (2, 5, 7, 3), (2, 5, 7, 3), (9, 9), (3,)), expected)


def hyper(source: torch.Generator) -> Example:
    def expected(x: Tensor, weight: Tensor) -> Tensor:
        rows = [(weight[i, :, None] * x[:, i, :, None] * x).sum(1) for i in range(len(weight))]
        return torch.stack(rows, dim=1)

    return Example(drawn(source, (2, 4, 4, 3), (4, 4, 3)), expected)


def sizes(source: torch.Generator) -> Example:
    def expected(x: Tensor, near: Tensor, far: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
        u = [grouped(x, near), grouped(x, far)]
        hidden = torch.clamp((u[0] + u[1]).mean(1) @ reduce.T, min=0)
        first, second = (torch.exp(hidden @ e.T)[:, None] for e in expand)
        return (first * u[0] + second * u[1]) / (first + second)

    shapes = ((2, 5, 8, 3), (3, 3, 3), (3, 5, 5), (4, 3), (2, 3, 4))
    return Example(drawn(source, *shapes), expected)


def refined(source: torch.Generator) -> Example:
    def expected(logits: Tensor, weight: Tensor) -> Tensor:
        taps = torch.exp(weight / weight.square().sum().sqrt())
        return grouped(logits, (taps / taps.sum()).expand(logits.shape[-1], -1, -1))

    return Example(drawn(source, (2, 5, 6, 3), (3, 3)), expected)


def deformable(source: torch.Generator) -> Example:
    """Bilinear reading as a sum over all tokens with hat functions."""

    def expected(x: Tensor, filter: Tensor, offsets: Tensor, modulation: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        total = torch.zeros(*x.shape[:3], len(filter), dtype=x.dtype)
        for number, (i, j) in enumerate(itertools.product(range(3), range(3))):
            down = torch.arange(height)[:, None] + i - 1 + offsets[..., number, 0]
            right = torch.arange(width)[None] + j - 1 + offsets[..., number, 1]
            hats = [
                torch.clamp(1 - (place[..., None] - torch.arange(size)).abs(), min=0)
                for place, size in ((down, height), (right, width))
            ]
            seen = torch.einsum("bhwy,bhwx,byxc->bhwc", *hats, x) * modulation[..., number, None]
            total = total + seen @ filter[:, :, i, j].T
        return total

    shapes = ((2, 4, 5, 3), (2, 3, 3, 3), (2, 4, 5, 9, 2), (2, 4, 5, 9))
    return Example(drawn(source, *shapes), expected)


GENERATED_DEFINITIONS = {
    "sdlska": (separable,),
    "atconv": (attentive,),
    "hyper_zzw": (hyper,),
    "selective_kernel_attention": (sizes,),
    "slash_ark": (refined,),
    "deformable_conv_transformer": (deformable,),
}
