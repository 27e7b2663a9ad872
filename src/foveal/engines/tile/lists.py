"""Patterns as the numbers that a GPU kernel reads: intervals per axis, or lists of key tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.patterns.base import FULL, SKIPPED, Bounds, Extent, Pattern


@dataclass(frozen=True)
class Boxes:
    """A separable pattern on the device: on axis a, query i sees the keys lower[a][i] <= j < upper[a][i].

    The inverse, for the gradients of keys: on axis a, key j is seen by the queries
    q_lower[a][j] <= i < q_upper[a][j].  All int32, one to three axes, none of them decreasing.
    """

    extent: Extent
    lower: tuple[Tensor, ...]
    upper: tuple[Tensor, ...]
    q_lower: tuple[Tensor, ...]
    q_upper: tuple[Tensor, ...]


@dataclass(frozen=True)
class TileLists:
    """Key tiles that each query tile visits, in raster order of tokens.

    The key-major lists are those of the transposed map with the roles exchanged.

    indices int32 [B or 1, heads or 1, q_tiles, n], ascending; counts int32 [B or 1, heads or 1, q_tiles]
    of them are valid.  `full` int8 like indices: 1 where no pair of the tile is hidden by the list.
    """

    q_tile: int
    kv_tile: int
    indices: Tensor
    counts: Tensor
    full: Tensor


def inverse(bounds: Bounds) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Per axis, the queries [q_lower, q_upper) that see each key."""
    lower, upper = [], []
    for axis, length in enumerate(bounds.extent.kv_grid):
        key = torch.arange(length, device=bounds.lower[axis].device)
        first = torch.searchsorted(bounds.upper[axis], key, right=True)
        stop = torch.searchsorted(bounds.lower[axis], key, right=True)
        lower.append(first)
        upper.append(stop.maximum(first))
    return tuple(lower), tuple(upper)


@functools.lru_cache(maxsize=64)
def boxes(pattern: Pattern, extent: Extent, device: torch.device) -> Boxes | None:
    """The pattern as boxes on the device, or None when it is not separable."""
    bounds = pattern.bounds(extent)
    if bounds is None:
        return None
    q_lower, q_upper = inverse(bounds)

    def to_device(axes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(axis.to(device=device, dtype=torch.int32) for axis in axes)

    return Boxes(
        bounds.extent,
        to_device(bounds.lower),
        to_device(bounds.upper),
        to_device(q_lower),
        to_device(q_upper),
    )


def tile_lists(states: Tensor, q_tile: int, kv_tile: int) -> TileLists:
    """Lists of the tiles that a tile map [..., q_tiles, kv_tiles] does not skip."""
    states = states.reshape(*(1,) * (4 - states.dim()), *states.shape)
    order = torch.argsort((states == SKIPPED).to(torch.uint8), dim=-1, stable=True)
    counts = (states != SKIPPED).sum(-1)
    full = (states.gather(-1, order) == FULL).to(torch.int8)
    return TileLists(
        q_tile,
        kv_tile,
        order.to(torch.int32).contiguous(),
        counts.to(torch.int32),
        full.contiguous(),
    )
