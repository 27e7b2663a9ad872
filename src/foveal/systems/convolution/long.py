"""Filters as long as the grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._convolve import convolve
from foveal._errors import OptionError, ShapeError
from foveal._fftconv import fftconv
from foveal._judged import judged_alone
from foveal.layers.convolution_long import FrequencyFilter, LongConvolution, frequency_filter
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.convolution.entries import described, entry, image


@judged_alone
def long_convolution(
    x: Tensor,
    filter: Tensor,
    skip: Tensor,
    *,
    squash: float = 0.1,
    implementation: str | None = None,
) -> Tensor:
    """Causal, with taps shrunk towards 0 by `squash`: x [B, L, C], filter [C, K], skip [C]."""
    if squash < 0:
        raise OptionError("squash", squash, "a number of at least 0 is needed")
    return fftconv(x, F.softshrink(filter, squash), skip=skip, implementation=implementation)


@judged_alone
def fourier_mixer(x: Tensor, weight: Tensor, *, implementation: str | None = None) -> Tensor:
    """irfftn(W rfftn(x)): x [B, *grid, C], weight [C, *frequencies, 2] of real and imaginary parts."""
    if not weight.is_floating_point() or weight.dim() < 1 or weight.shape[-1] != 2:
        got = f"{weight.dtype} {list(weight.shape)}"
        raise ShapeError("weight", got, "real numbers [C, *frequencies, 2] are needed")
    wide = torch.promote_types(weight.dtype, torch.float32)
    spectrum = torch.view_as_complex(weight.to(wide).contiguous())
    return fftconv(x, spectrum, causal=False, implementation=implementation)


def _delay(draw: Draw) -> Claim:
    x = draw.normal(2, draw.integer(4, 20), 3)

    def left(x: Tensor) -> Tensor:
        filter = torch.zeros(3, x.shape[1], dtype=x.dtype)
        filter[:, 2] = 1.1
        return long_convolution(x, filter, torch.zeros(3, dtype=x.dtype))

    return Claim((x,), left, lambda x: F.pad(x, (0, 0, 2, 0))[:, : x.shape[1]])


def _short_filter(draw: Draw) -> Claim:
    return Claim(
        (draw.normal(2, draw.integer(5, 20), 3), draw.normal(3, 4), draw.normal(3)),
        lambda x, f, d: long_convolution(x, f, d, squash=0.0),
        lambda x, f, d: convolve(x, f.flip(1), causal=True) + d * x,
    )


def _without_mask(draw: Draw) -> Claim:
    zero = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    return Claim(
        (image(draw, 6),),
        lambda x: frequency_filter(x, zero, zero[..., 0], zero, zero[..., 0]),
        lambda x: x,
    )


def _constant_mask(draw: Draw) -> Claim:
    zero = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    mask = zero[..., 0].clone()
    mask[0] = 1.01
    return Claim(
        (image(draw, 6),),
        lambda x: frequency_filter(x, zero, zero[..., 0], zero, mask),
        lambda x: 2 * x,
    )


def _flat_spectrum(draw: Draw) -> Claim:
    x = draw.normal(1, 3, 4, draw.integer(3, 6), 2)

    def left(x: Tensor) -> Tensor:
        ones = torch.ones(2, *x.shape[1:3], x.shape[3] // 2 + 1, dtype=x.dtype)
        return fourier_mixer(x, torch.stack([ones, torch.zeros_like(ones)], -1))

    return Claim((x,), left, lambda x: x)


def _long_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    width, (length,) = shape["heads"] * shape["head_dim"], shape["grid"]
    return ((1, length, width), (width, length), (width,))


def _frequency_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    width = shape["heads"] * shape["head_dim"]
    maps = (2, 8, width // 8, width // 8)
    return ((1, *shape["grid"], width), maps, maps[:-1], maps, maps[:-1])


def _mixer_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    width, grid = shape["heads"] * shape["head_dim"], tuple(shape["grid"])
    return ((1, *grid, width), (width, *grid[:-1], grid[-1] // 2 + 1, 2))


SYSTEMS: tuple[System, ...] = (
    entry(
        "flash_butterfly", "Simple hardware-efficient long convolutions", 2023, "2302.06646",
        "A causal filter as long as the sequence, its taps shrunk towards 0.",
        long_convolution, _long_shapes, described((1024,), 1, 768),
        Identity("delay", "one tap of 1 at lag 2 is a delay by 2", _delay),
        Identity("short_filter", "a short filter is the direct convolution", _short_filter),
        layer=LongConvolution,
    ),
    entry(
        "aff", "Adaptive frequency filters", 2023, "2307.14008",
        "A mask for every frequency, predicted from the spectrum it multiplies.",
        frequency_filter, _frequency_shapes, described((28, 28), 1, 96),
        Identity("without_mask", "maps of zeros leave x", _without_mask),
        Identity("constant_mask", "a mask of 1 adds x once more", _constant_mask),
        layer=FrequencyFilter,
    ),
    entry(
        "fourier_mixer_3d", "Frequency domain learning in 3-D vessel segmentation", 2024, "arXiv not known",
        "A learned weight for every frequency of a volume.",
        fourier_mixer, _mixer_shapes, described((32, 32, 32), 1, 16),
        Identity("flat_spectrum", "weights of 1 leave x", _flat_spectrum),
    ),
)  # fmt: skip
