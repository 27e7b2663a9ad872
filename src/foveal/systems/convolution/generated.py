"""Filters made from their input or from coordinates, and results of filters weighed by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._convolve import convolve
from foveal.layers.convolution_generated import (
    AttentionRefiningKernel,
    AttentiveConvolution,
    DeformableConvolution,
    HyperProduct,
    attentive_convolution,
    deformable_convolution,
    hyper_product,
    refined_maps,
)
from foveal.layers.convolution_selective import (
    SelectiveKernelAttention,
    SeparableKernelAttention,
    select_sizes,
    separable_kernel_attention,
)
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.convolution.entries import described, entry, image


def _a_quarter_of_each(draw: Draw) -> Claim:
    x, mixing = image(draw), draw.normal(3, 3)
    filters = draw.normal(3, 5, 5), draw.normal(3, 1, 7), draw.normal(3, 7, 1)
    zero = torch.zeros(3, 3, 4, dtype=x.dtype)

    def left(x: Tensor, *tensors: Tensor) -> Tensor:
        square, row, column, mixing = tensors
        places = torch.zeros(3, 2, 7, 7, dtype=x.dtype)
        return separable_kernel_attention(x, square, row, column, zero[0].mT, zero, places, mixing)

    def right(x: Tensor, *tensors: Tensor) -> Tensor:
        square, row, column, mixing = tensors
        near = convolve(x, square)
        total = near + convolve(near, row, dilation=3) + convolve(near, column, dilation=3)
        return x * F.linear(total / 4, mixing)

    return Claim((x, *filters, mixing), left, right)


def _half_a_sum(draw: Draw) -> Claim:
    features, generator = image(draw), draw.normal(9, 9)

    def filtered(inhibition: float, features: Tensor, generator: Tensor) -> Tensor:
        share = torch.full((3,), inhibition, dtype=features.dtype)
        ones = torch.ones_like(features)
        return attentive_convolution(ones, features, generator, share)[:, 1:-1, 1:-1]

    return Claim(
        (features, generator),
        lambda *tensors: filtered(0.0, *tensors),
        lambda *tensors: filtered(-60.0, *tensors) / 2,
    )


def _square_of_a_matrix(draw: Draw) -> Claim:
    size = draw.integer(1, 6)
    x = draw.normal(2, size, size, 3)

    def right(x: Tensor) -> Tensor:
        maps = x.movedim(-1, 1)
        return (maps @ maps).movedim(1, -1)

    return Claim((x,), lambda x: hyper_product(x, torch.ones_like(x[0])), right)


def _mean_of_sizes(draw: Draw) -> Claim:
    filters = draw.normal(3, 3, 3), draw.normal(3, 5, 5)

    def left(x: Tensor, near: Tensor, far: Tensor) -> Tensor:
        zero = torch.zeros(2, 3, 4, dtype=x.dtype)
        return select_sizes(x, near, far, zero[0].mT, zero)

    def right(x: Tensor, near: Tensor, far: Tensor) -> Tensor:
        return (convolve(x, near) + convolve(x, far)) / 2

    return Claim((image(draw), *filters), left, right)


def _one_weight(draw: Draw) -> Claim:
    weight = draw.normal(1, 1)
    return Claim((image(draw),), lambda x: refined_maps(x, weight), lambda x: x)


def _plain_convolution(draw: Draw) -> Claim:
    x, filter = image(draw), draw.normal(4, 3, 3, 3)

    def left(x: Tensor, filter: Tensor) -> Tensor:
        ones = torch.ones(*x.shape[:-1], 9, dtype=x.dtype)
        return deformable_convolution(x, filter, torch.zeros(*ones.shape, 2, dtype=x.dtype), ones)

    def right(x: Tensor, filter: Tensor) -> Tensor:
        return F.conv2d(x.movedim(-1, 1), filter, padding=1).movedim(1, -1)

    return Claim((x, filter), left, right)


def _tokens(shape: Mapping[str, Any]) -> tuple[int, ...]:
    return (1, *shape["grid"], shape["heads"] * shape["head_dim"])


def _separable_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    x = _tokens(shape)
    width = x[-1]
    maps = ((32, width), (3, width, 32), (3, 2, 7, 7), (width, width))
    return (x, (width, 5, 5), (width, 1, 7), (width, 7, 1), *maps)


def _attentive_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    x = _tokens(shape)
    return (x, x, (25, 25), (x[-1],))


def _hyper_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    x = _tokens(shape)
    return (x, x[1:])


def _size_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    x = _tokens(shape)
    width = x[-1]
    return (x, (width, 3, 3), (width, 5, 5), (32, width), (2, width, 32))


def _map_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    return (_tokens(shape), (5, 5))


def _deformable_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    x = _tokens(shape)
    taps = (*x[:-1], 9)
    return (x, (x[-1], x[-1], 3, 3), (*taps, 2), taps)


SYSTEMS: tuple[System, ...] = (
    entry(
        "sdlska", "BEVANet", 2025, "2508.07300",
        "A square filter and dilated strips of its result, weighed by channel and by place, gate the input.",
        separable_kernel_attention, _separable_shapes, described((64, 128), 1, 64),
        Identity("a_quarter_of_each", "maps of 0 weigh every branch by 1/4", _a_quarter_of_each),
        kind="model", layer=SeparableKernelAttention,
    ),
    entry(
        "atconv", "Attentive convolution", 2025, "2510.20092",
        "A filter for each sample and channel from pooled features, whose taps inhibit each other.",
        attentive_convolution, _attentive_shapes, described((28, 28), 1, 96),
        Identity("half_a_sum", "at its start, inhibition halves the sum of the taps", _half_a_sum),
        layer=AttentiveConvolution,
    ),
    entry(
        "hyper_zzw", "HyperZZW", 2024, "2401.17948",
        "Maps weighed by a network of coordinates, then multiplied with themselves as matrices.",
        hyper_product, _hyper_shapes, described((32, 32), 1, 64),
        Identity("square_of_a_matrix", "weights of 1 give the square of every map", _square_of_a_matrix),
        layer=HyperProduct,
    ),
    entry(
        "selective_kernel_attention", "Multi-scale selective kernel attention", 2022, "2204.01005",
        "A softmax over filter sizes for every frequency and channel.",
        select_sizes, _size_shapes, described((200, 80), 1, 64),
        Identity("mean_of_sizes", "maps of 0 average the branches", _mean_of_sizes),
        kind="model", layer=SelectiveKernelAttention,
    ),
    entry(
        "slash_ark", "Shepherding slots to objects, its attention-refining kernel", 2023, "CVPR 2023",
        "One low-pass filter, a softmax of its weights, over the maps of all slots.",
        refined_maps, _map_shapes, described((64, 64), 1, 8),
        Identity("one_weight", "a single weight leaves the maps", _one_weight),
        layer=AttentionRefiningKernel,
    ),
    entry(
        "deformable_conv_transformer", "DC Transformer", 2023, "2303.13827",
        "Taps that read between the tokens, where offsets send them.",
        deformable_convolution, _deformable_shapes, described((52, 52), 1, 32),
        Identity("plain_convolution", "offsets of 0 and factors of 1 are a convolution", _plain_convolution),
        kind="model", layer=DeformableConvolution,
    ),
)  # fmt: skip
