"""Launches of the Toeplitz kernels: how a grid is cut in columns, aligned rows, the bands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from foveal.engines.convolution.launch import on_three_axes, power_of_two
from foveal.engines.convolution.launch_layout import swapped
from foveal.engines.convolution.problem import Convolution
from foveal.engines.convolution.toeplitz import (
    convolution_bands_forward,
    convolution_diagonals_backward,
    convolution_products_backward,
    convolution_toeplitz_forward,
)

_WIDEST = 64
"""Columns of a matrix."""
_ALIGNED = 8
"""Elements that a load of 16 bytes takes: rows start at multiples of it."""
_PRODUCTS = 2**25
"""Elements of the matrices whose diagonals are summed, at a time."""


@dataclass(frozen=True)
class Cut:
    """Columns of x (IN in each of TILES, the first LEAD before those of y) and of y (OUT) per matrix,
    GROUP rows side by side, M groups; shift: the tap on the main diagonal of the first matrix."""

    into: int
    out: int
    tiles: int
    lead: int
    shift: int
    group: int
    m: int

    @property
    def constants(self) -> dict[str, int]:
        return {"TILES": self.tiles, "IN": self.into, "OUT": self.out}


def cut(problem: Convolution) -> Cut:
    """A narrow grid is taken whole; else tiles of 64 columns, and those that their taps reach."""
    axes = on_three_axes(problem)
    size, out, pad, taps = axes.sizes[2], axes.out[2], axes.pads[2], axes.taps[2]
    if max(size, out) <= _WIDEST:
        into, lead, tiles = max(power_of_two(size), 16), 0, 1
        columns = max(power_of_two(out), 16)
    else:
        into = columns = _WIDEST
        lead = _whole(pad)
        tiles = triton.cdiv(columns + taps - 1 + lead - pad, into)
    group = min(2 * _WIDEST // columns, power_of_two(axes.out[1]))
    lines = triton.cdiv(axes.out[1], group) * axes.out[0] * axes.batch
    m = min(128, max(power_of_two(lines), 16))
    return Cut(into, columns, tiles, lead, pad - lead, group, m)


def multiplied(problem: Convolution) -> int:
    """FLOPs of the matrix products of a forward, zeros outside the bands included."""
    axes, pieces = on_three_axes(problem), cut(problem)
    lines = triton.cdiv(axes.out[1], pieces.group) * axes.out[0] * axes.batch
    steps = axes.taps[0] * (axes.taps[1] + pieces.group - 1) * pieces.tiles
    columns = triton.cdiv(axes.out[2], pieces.out)
    each = 2 * pieces.into * pieces.out * pieces.group
    return problem.channels * int(columns * triton.cdiv(lines, pieces.m)) * pieces.m * steps * each


def aligned(x: Tensor) -> Tensor:
    """[B, C, z, y, x] with rows that start at multiples of 16 bytes, zeros up to the next multiple."""
    first = x.movedim(-1, 1)
    first = first.reshape(*first.shape[:2], *(1,) * (5 - first.dim()), *first.shape[2:])
    strides = first.stride()
    width = first.shape[-1]
    ragged = any(step % _ALIGNED for step in (*strides[:-1], width)) or strides[-1] != 1
    if not ragged and 0 not in strides and first.data_ptr() % 16 == 0:
        return first
    if width % _ALIGNED == 0:
        return swapped(x).view(first.shape)
    rows = first.new_zeros(*first.shape[:-1], _whole(width))[..., :width]
    return rows.copy_(first)


def _whole(width: int) -> int:
    """Columns of a row of `aligned`, its zeros included."""
    return -(-width // _ALIGNED) * _ALIGNED


def launch_toeplitz(problem: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [B, *out_grid, C], stored channels first, of x as `aligned` gives it."""
    axes, pieces = on_three_axes(problem), cut(problem)
    y = x.new_empty(problem.batch, problem.channels, *axes.out)
    lines = triton.cdiv(axes.out[1], pieces.group) * axes.out[0] * axes.batch
    columns = triton.cdiv(axes.out[2], pieces.out)
    if y.numel():
        bands = _bands(problem, weight, pieces)
        programs = triton.cdiv(lines, pieces.m) * columns * problem.channels
        convolution_toeplitz_forward[(programs,)](
            x, bands, bias, y, problem.batch, *x.stride()[:3], *y.stride()[:3],
            *axes.sizes[:2], *axes.out, *axes.pads[:2], *axes.taps[:2],
            SIZE_X=_whole(axes.sizes[2]), LEAD=pieces.lead, X_STRIDE=x.stride(3), Y_STRIDE=y.stride(3),
            GROUP=pieces.group, M=pieces.m, PRECISION=_precision(x), **pieces.constants,
            num_warps=4, enable_fp_fusion=True, num_stages=3,
        )  # fmt: skip
    return y.view(problem.batch, problem.channels, *problem.out_grid).movedim(1, -1)


def _bands(problem: Convolution, weight: Tensor, pieces: Cut) -> Tensor:
    taps_z, taps_y, taps_x = on_three_axes(problem).taps
    edge = pieces.group - 1
    rows = taps_y + 2 * edge
    shape = (problem.channels, taps_z, rows, pieces.tiles, pieces.into, pieces.out)
    bands = weight.new_empty(shape)
    convolution_bands_forward[(problem.channels * taps_z * rows,)](
        weight.contiguous(), bands, taps_y, taps_x, pieces.shift,
        EDGE=edge, **pieces.constants, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return bands


def launch_toeplitz_filter(problem: Convolution, x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of the filter [C, *window] in float32, of x and dy as `aligned` gives them."""
    axes, pieces = on_three_axes(problem), cut(problem)
    taps_z, taps_y, taps_x = axes.taps
    found = x.new_empty(problem.channels, *axes.taps, dtype=torch.float32)
    if not dy.numel():
        return found.zero_().view(problem.channels, *problem.window)
    matrices = taps_z * taps_y * pieces.tiles * pieces.into * pieces.out
    each = max(_PRODUCTS // matrices, 1)
    group = min(pieces.group, power_of_two(taps_y))
    per_channel = taps_z * triton.cdiv(taps_y, group) * pieces.tiles
    taps = min(power_of_two(taps_x), 16)
    for start in range(0, problem.channels, each):
        part = found[start : start + each]
        products = x.new_empty(
            len(part), taps_z, taps_y, pieces.tiles, pieces.into, pieces.out, dtype=torch.float32
        )
        convolution_products_backward[(per_channel * len(part),)](
            x[:, start:], dy[:, start:], products, problem.batch,
            *x.stride()[:3], *dy.stride()[:3],
            *axes.sizes[:2], *axes.out, *axes.pads[:2], *axes.taps[:2],
            SIZE_X=_whole(axes.sizes[2]), OUT_X=_whole(axes.out[2]), LEAD=pieces.lead,
            X_STRIDE=x.stride(3), Y_STRIDE=dy.stride(3),
            GROUP=group, M=64, PRECISION=_precision(x), **pieces.constants,
            num_warps=4, enable_fp_fusion=True, num_stages=3,
        )  # fmt: skip
        convolution_diagonals_backward[(len(part) * taps_z * taps_y, triton.cdiv(taps_x, taps))](
            products,
            part,
            taps_x,
            pieces.shift,
            **pieces.constants,
            TAPS=taps,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return found.view(problem.channels, *problem.window)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
