"""The only validation of a local mix: tensors become a frozen `LocalMix`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from foveal._errors import ShapeError
from foveal.engines.convolution.problem import Axes, Flags, check_tensors, flags, per_axis

Border = Literal["zero", "shift"]
AxisBorder = Literal["zero", "shift", "causal"]


@dataclass(frozen=True)
class LocalMix:
    """Weights [batch, *grid, heads, prod(window)] on values [batch, *grid, heads, head_dim]."""

    batch: int
    grid: tuple[int, ...]
    heads: int
    head_dim: int
    window: tuple[int, ...]
    dilation: tuple[int, ...]
    borders: tuple[AxisBorder, ...]
    dtype: torch.dtype
    device: str
    needs_grad: bool

    @property
    def taps(self) -> int:
        return math.prod(self.window)

    @property
    def tokens(self) -> int:
        return self.batch * math.prod(self.grid)


def describe_mix(
    weights: Tensor, v: Tensor, window: Axes, dilation: Axes, border: Border, causal: Flags
) -> LocalMix:
    """Checks the arguments of a local mix against each other and returns what they describe."""
    check_tensors({"weights": weights, "v": v})
    if not 4 <= v.dim() <= 6:
        raise ShapeError("v", list(v.shape), "[B, *grid, H, D] with one to three axes is needed")
    axes = v.dim() - 3
    grid = tuple(v.shape[1:-2])
    sizes = per_axis("window", window, axes, 1)
    steps = per_axis("dilation", dilation, axes, 1)
    past = flags("causal", causal, axes)
    if border not in get_args(Border):
        raise ShapeError("border", repr(border), "'zero' or 'shift' is needed")
    borders: tuple[AxisBorder, ...] = tuple("causal" if p else border for p in past)
    for size, step, length, edge in zip(sizes, steps, grid, borders, strict=True):
        if edge == "shift" and size * step > length > 0:
            needed = f"window * dilation within the axis of {length} tokens, or border='zero'"
            raise ShapeError("window", f"{size} with dilation {step}", needed)
    if weights.shape != (*v.shape[:-1], math.prod(sizes)):
        needed = f"{[*v.shape[:-1], math.prod(sizes)]} is needed"
        raise ShapeError("weights", list(weights.shape), needed)
    return LocalMix(
        batch=len(v),
        grid=grid,
        heads=v.shape[-2],
        head_dim=v.shape[-1],
        window=sizes,
        dilation=steps,
        borders=borders,
        dtype=v.dtype,
        device=v.device.type,
        needs_grad=torch.is_grad_enabled() and (v.requires_grad or weights.requires_grad),
    )


def first_of_window(
    place: Tensor, length: int, window: int, dilation: int, border: AxisBorder
) -> Tensor:
    """Where on its axis the window of each token begins; negative before the axis."""
    reach = dilation * (window - 1)
    if border == "causal":
        return place - reach
    if border == "zero":
        return place - reach // 2
    residue, step = place % dilation, place // dilation
    count = (length - residue + dilation - 1) // dilation
    return residue + dilation * (step - window // 2).clamp(min=0).minimum(count - window)


def places(problem: LocalMix) -> tuple[Tensor, Tensor]:
    """Raster positions [L, taps] of the window of each token, and which of them are on the grid."""
    index, exists = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    axes = (problem.grid, problem.window, problem.dilation, problem.borders)
    for length, window, dilation, border in zip(*axes, strict=True):
        start = first_of_window(torch.arange(length), length, window, dilation, border)
        place = start[:, None] + dilation * torch.arange(window)
        inside = (place >= 0) & (place < length)
        place = place.clamp(0, max(length - 1, 0))
        index = (index[:, None, :, None] * length + place[None, :, None]).flatten(2).flatten(0, 1)
        exists = (exists[:, None, :, None] & inside[None, :, None]).flatten(2).flatten(0, 1)
    return index, exists
