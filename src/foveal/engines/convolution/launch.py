"""Launches of the convolution kernels: axes, strides, tile sizes, the second stage of reductions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from foveal.engines.convolution.direct import (
    convolution_direct_filter_backward,
    convolution_direct_forward,
)
from foveal.engines.convolution.problem import Convolution

_UNROLLED = 384
"""Products that the loop body of a kernel spells out; twice as many compile twice as long."""


@dataclass(frozen=True)
class Axes:
    """A convolution on three axes, with the batch in front."""

    batch: int
    samples: int
    sizes: tuple[int, int, int]
    out: tuple[int, int, int]
    pads: tuple[int, int, int]
    taps: tuple[int, int, int]
    steps: tuple[int, int, int]
    per_batch_axis: bool

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Of the batch, z and y; x is [B, *grid, C]."""
        inner = x.stride()[1:-2]
        if self.per_batch_axis:
            return 0, 0, x.stride(0)
        return x.stride(0), *((0,) * (2 - len(inner)) + tuple(inner))  # type: ignore[return-value]


def on_three_axes(problem: Convolution) -> Axes:
    """A sequence for each sample is a grid of one row for each sample, unless filters differ."""

    def three(values: tuple[int, ...], fill: int) -> Any:
        return (fill,) * (3 - len(values)) + tuple(values)

    axes = Axes(
        batch=problem.batch,
        samples=problem.batch if problem.per_sample else 1,
        sizes=three(problem.grid, 1),
        out=three(problem.out_grid, 1),
        pads=three(problem.before, 0),
        taps=three(problem.window, 1),
        steps=three(problem.dilation, 1),
        per_batch_axis=False,
    )
    if len(problem.grid) > 1 or problem.per_sample:
        return axes
    rows = (1, problem.batch)
    return dataclasses.replace(
        axes,
        batch=1,
        sizes=(*rows, axes.sizes[2]),
        out=(*rows, axes.out[2]),
        per_batch_axis=True,
    )


@dataclass(frozen=True)
class Tiles:
    """Taps of a row, rows, outputs along a row and channels that a program holds."""

    taps: int
    rows: int
    strip: int
    channels: int

    def constants(self, axes: Axes) -> dict[str, int]:
        step_z, step_y, step_x = axes.steps
        return {
            "STEP_Z": step_z, "STEP_Y": step_y, "STEP_X": step_x,
            "TAPS": self.taps, "ROWS": self.rows, "STRIP": self.strip, "CHANNELS": self.channels,
        }  # fmt: skip

    def programs(self, axes: Axes, channels: int) -> int:
        z, y, x = axes.out
        tiles = triton.cdiv(y, self.rows) * triton.cdiv(x, self.strip)
        return axes.batch * z * int(tiles * triton.cdiv(channels, self.channels))


def direct_tiles(axes: Axes, channels: int, item_bytes: int) -> Tiles:
    """128 threads with two channels each."""
    per_program = 256
    width = min(power_of_two(channels), per_program // min(power_of_two(axes.out[1]), 4))
    rows = min(per_program // width, power_of_two(axes.out[1]))
    chunks = triton.cdiv(axes.taps[2], 16)
    taps = triton.cdiv(axes.taps[2], chunks)
    longest = max(min(28 if taps <= 13 else 16, _UNROLLED // taps), 4)
    strips = triton.cdiv(axes.out[2], longest)
    return Tiles(taps, rows, triton.cdiv(axes.out[2], strips), width)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def launch_direct(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C] of x [B, *grid, C] with unit stride along C."""
    axes = on_three_axes(problem)
    width = problem.channels
    y = x.new_empty(problem.batch, *problem.out_grid, width)
    if not y.numel():
        return y
    tiles = direct_tiles(axes, width, x.element_size())
    filters = taps_first(problem, weight)
    convolution_direct_forward[(tiles.programs(axes, width),)](
        x, filters, bias, y, *axes.strides(x), *axes.strides(y),
        filters.stride(0) if problem.per_sample else 0,
        *axes.sizes, *axes.out, *axes.pads, *axes.taps,
        X_STRIDE=x.stride(-2), Y_STRIDE=y.stride(-2), WIDTH=width, **tiles.constants(axes),
        num_warps=4, enable_fp_fusion=True, **_registers(axes, tiles, x),
    )  # fmt: skip
    return y


def _registers(axes: Axes, tiles: Tiles, x: Tensor) -> dict[str, int]:
    """128 per thread for rows of up to 7 taps in 16 bits, so that four programs share a processor."""
    small = tiles.taps <= 7 and axes.steps[2] == 1 and x.element_size() == 2
    return {"maxnreg": 128} if small and x.is_cuda and torch.version.hip is None else {}


def taps_first(problem: Convolution, weight: Tensor) -> Tensor:
    """float32 [samples, *window, C] of a filter [C, *window] or [B, C, *window]."""
    each = weight if problem.per_sample else weight[None]
    shape = (len(each), *problem.window, problem.channels)
    return each.new_empty(shape, dtype=torch.float32).copy_(each.movedim(1, -1))


def launch_direct_filter(problem: Convolution, x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of the filter in float32, shaped as it."""
    axes = on_three_axes(problem)
    width = problem.channels
    tiles = direct_tiles(axes, width, x.element_size())
    chunks = triton.cdiv(axes.taps[2], tiles.taps)
    blocks = triton.cdiv(width, tiles.channels)
    rows = tiles.programs(axes, width) // blocks
    items = rows // axes.samples
    each = axes.taps[0] * axes.taps[1] * chunks * blocks
    splits = max(min(_wanted_programs(x) // max(each * axes.samples, 1), items), 1)
    parts = x.new_empty(axes.samples, splits, *axes.taps, width, dtype=torch.float32)
    if not dy.numel():
        return parts.new_zeros((axes.samples, width, *axes.taps))
    convolution_direct_filter_backward[(each * axes.samples * splits,)](
        x, dy, parts, *axes.strides(x), *axes.strides(dy),
        *axes.sizes, *axes.out, *axes.pads, *axes.taps, axes.samples, items, splits,
        X_STRIDE=x.stride(-2), Y_STRIDE=dy.stride(-2), WIDTH=width, **tiles.constants(axes),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return parts.sum(1).movedim(-1, 1)


def _wanted_programs(x: Tensor) -> int:
    if x.device.type != "cuda":
        return 8
    return 12 * int(torch.cuda.get_device_properties(x.device).multi_processor_count)
