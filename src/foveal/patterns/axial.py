"""Attention along one axis of the grid."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import PatternError
from foveal.patterns.base import Bounds, Extent, Part, Pattern
from foveal.patterns.dense import Causal, Dense
from foveal.patterns.grid import raster


@dataclass(frozen=True, slots=True, repr=False)
class Axial(Pattern):
    """A query sees the keys that differ from it on `axis` only (up to its own place when causal).

    Options: axis counts from 0, negative from the end.
    Equals: on a grid of one axis Dense(), or Causal() when causal.
    Cost: 1 / (product of the other axes) of dense.
    Paper: Axial Attention in Multidimensional Transformers (1912.12180).
    """

    axis: int
    causal: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.axis, bool) or not isinstance(self.axis, int):
            raise PatternError("axis", self.axis, "an integer is needed")

    def validate(self, extent: Extent) -> None:
        rank = len(extent.kv_grid)
        if not -rank <= self.axis < rank:
            raise PatternError("axis", self.axis, f"the grid {extent.kv_grid} has {rank} axes")
        if rank > 1 and extent.q_grid != extent.kv_grid:
            raise PatternError("pattern", repr(self), "queries and keys must share the grid")

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        own = self.axis % len(extent.kv_grid)
        axes = zip(extent.coordinates(q_pos), extent.coordinates(k_pos), strict=True)
        visible = []
        for axis, (q, k) in enumerate(axes):
            if axis != own:
                visible.append(q == k)
            else:
                visible.append(k <= q if self.causal else (k == k) & (q == q))
        return functools.reduce(torch.logical_and, visible)

    def simplify(self, extent: Extent) -> Pattern:
        if len(extent.kv_grid) > 1:
            return self
        return Causal() if self.causal else Dense()

    def bounds(self, extent: Extent) -> Bounds | None:
        own = self.axis % len(extent.kv_grid)
        intervals = []
        for axis, length in enumerate(extent.kv_grid):
            place = extent.axis_positions(axis)
            if axis != own:
                intervals.append((place, place + 1))
            else:
                stop = (place + 1).clamp(min=0) if self.causal else place * 0 + length
                intervals.append((place * 0, stop))
        lower, upper = zip(*intervals, strict=True)
        return Bounds(extent, lower, upper)

    def parts(self, extent: Extent) -> tuple[Part, ...] | None:
        if extent.q_grid != extent.kv_grid:
            return None
        own = self.axis % len(extent.kv_grid)
        coordinates = []
        for axis, length in enumerate(extent.kv_grid):
            place = torch.arange(length)
            coordinates.append(place[None] if axis == own else place[:, None])
        tokens = raster(coordinates, extent.kv_grid)
        line = (extent.kv_grid[own],)
        return (Part(Causal() if self.causal else Dense(), Extent(line, line), tokens, tokens),)
