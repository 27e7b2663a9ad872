"""Launches of the local mix."""

from __future__ import annotations

import math
from typing import Any

import triton
from torch import Tensor

from foveal.engines.convolution.launch import power_of_two
from foveal.engines.convolution.mix import (
    convolution_mix_forward,
    convolution_mix_values_backward,
    convolution_mix_weights_backward,
)
from foveal.engines.convolution.mix_problem import LocalMix

_TILE = 2048
"""Elements of a tile of pixels and channels."""
_BORDERS = {"zero": 0, "shift": 1, "causal": 2}


def launch_mix(problem: LocalMix, weights: Tensor, v: Tensor) -> Tensor:
    """o [B, *grid, H, D]"""
    o = v.new_empty(v.shape)
    if v.numel():
        width, pixels, programs = _tile(problem)
        convolution_mix_forward[programs](
            weights, v, o, *_strides(weights, 2), *_strides(v, 1), *_strides(o, 1),
            *_sizes(problem), **_constants(problem), PIXELS=pixels, CHANNELS=width,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return o


def launch_mix_values(problem: LocalMix, weights: Tensor, do: Tensor) -> Tensor:
    """The gradient of v."""
    dv = do.new_empty(do.shape)
    if do.numel():
        width, pixels, programs = _tile(problem)
        convolution_mix_values_backward[programs](
            weights, do, dv, *_strides(weights, 2), *_strides(do, 1), *_strides(dv, 1),
            *_sizes(problem), **_constants(problem), PIXELS=pixels, CHANNELS=width,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return dv


def launch_mix_weights(problem: LocalMix, do: Tensor, v: Tensor) -> Tensor:
    """The gradient of the weights."""
    dweights = v.new_empty(*v.shape[:-1], problem.taps)
    if not dweights.numel():
        return dweights
    if not v.numel():
        return dweights.zero_()
    width = power_of_two(problem.head_dim)
    pixels = max(_TILE // width, 1)
    taps = min(power_of_two(problem.window[-1]), 16)
    programs = (triton.cdiv(math.prod(problem.grid), pixels), problem.batch * problem.heads)
    convolution_mix_weights_backward[programs](
        do, v, dweights, *_strides(do, 1), *_strides(v, 1), *_strides(dweights, 2),
        *_sizes(problem), **_constants(problem), PIXELS=pixels, CHANNELS=width, TAPS=taps,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return dweights


def _tile(problem: LocalMix) -> tuple[int, int, tuple[int, int, int]]:
    width = min(power_of_two(problem.head_dim), 128)
    pixels = _TILE // width
    tiles = triton.cdiv(math.prod(problem.grid), pixels)
    blocks = triton.cdiv(problem.head_dim, width)
    return width, pixels, (tiles, problem.batch * problem.heads, blocks)


def _three(values: tuple[Any, ...], fill: Any) -> tuple[Any, ...]:
    return (fill,) * (3 - len(values)) + tuple(values)


def _sizes(problem: LocalMix) -> tuple[int, ...]:
    return (problem.heads, *_three(problem.grid, 1), *_three(problem.window, 1))


def _strides(x: Tensor, inner: int) -> tuple[int, ...]:
    """Of the batch, z, y, x, the heads, and with `inner` 2 of the taps; a last axis of D has stride 1."""
    batch, *grid = x.stride()[:-2]
    return (batch, *_three(tuple(grid), 0), *x.stride()[-2:][:inner])


def _constants(problem: LocalMix) -> dict[str, int]:
    steps = _three(problem.dilation, 1)
    borders = _three(tuple(_BORDERS[border] for border in problem.borders), 0)
    return {
        "STEP_Z": steps[0], "STEP_Y": steps[1], "STEP_X": steps[2],
        "BORDER_Z": borders[0], "BORDER_Y": borders[1], "BORDER_X": borders[2],
        "D": problem.head_dim,
    }  # fmt: skip
