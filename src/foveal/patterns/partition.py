"""The grid cut in pieces: window partitions, shifted windows, overlapping chunks."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import PatternError
from foveal.patterns.base import Bounds, Extent, Part, Pattern, per_axis
from foveal.patterns.dense import Dense
from foveal.patterns.grid import FAR, common_rank, raster


@dataclass(frozen=True, slots=True, repr=False)
class Partition(Pattern):
    """Every axis is cut in pieces of `size`; a query sees its own piece and a margin on both sides.

    Query i stands in piece p = floor((i - shift) / size) and sees the keys
    p size + shift - before <= j < (p + 1) size + shift + after that lie on the grid; several axes: the
    product.  Pieces cut off by the border stay smaller, so a shift is a shifted window without rolling
    the grid and without a mask for wrapped tokens.

    Options: one integer for all axes or one per axis; size >= 1, 0 <= shift < size, margins >= 0 tokens.
    Equals: size = grid is Dense(); size dividing the grid is Neighborhood(window=size, stride=size).
    Cost: prod(size + before + after) / prod(grid) of dense.
    Paper: Swin Transformer (2103.14030); margins: Local Self-Attention over Long Text (2005.04908).
    """

    size: int | tuple[int, ...]
    shift: int | tuple[int, ...] = 0
    before: int | tuple[int, ...] = 0
    after: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("shift", 0), ("before", 0), ("after", 0)):
            given = getattr(self, name)
            values = per_axis(given, 1) if isinstance(given, int | tuple) else (given,)
            if not values or any(
                isinstance(v, bool) or not isinstance(v, int) or v < least for v in values
            ):
                raise PatternError(
                    name, getattr(self, name), f"integers of at least {least} are needed"
                )
        rank = self.rank or 1
        pairs = zip(per_axis(self.shift, rank), per_axis(self.size, rank), strict=True)
        if any(shift >= size for shift, size in pairs):
            raise PatternError("shift", self.shift, f"less than the size, {self.size}, is needed")

    @property
    def rank(self) -> int | None:
        return common_rank(self, ("size", "shift", "before", "after"))

    def validate(self, extent: Extent) -> None:
        Pattern.validate(self, extent)
        if len(extent.kv_grid) > 1 and extent.q_grid != extent.kv_grid:
            raise PatternError("pattern", repr(self), "queries and keys must share the grid")

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        axes = zip(extent.coordinates(q_pos), extent.coordinates(k_pos), strict=True)
        visible = []
        for axis, (q, k) in enumerate(axes):
            lo, hi = self._interval(axis, q, extent)
            visible.append((k >= lo) & (k < hi))
        return functools.reduce(torch.logical_and, visible)

    def simplify(self, extent: Extent) -> Pattern:
        pieces = (self._pieces(axis, extent) for axis in range(len(extent.kv_grid)))
        whole = all(len(axis_pieces) == 1 for axis_pieces in pieces)
        return Dense() if whole and extent.Lq <= extent.Lk else self

    def bounds(self, extent: Extent) -> Bounds:
        rank = len(extent.kv_grid)
        intervals = [self._interval(a, extent.axis_positions(a), extent) for a in range(rank)]
        lower, upper = zip(*intervals, strict=True)
        return Bounds(extent, lower, upper)

    def parts(self, extent: Extent) -> tuple[Part, ...] | None:
        rank = len(extent.kv_grid)
        margins = (*per_axis(self.before, rank), *per_axis(self.after, rank))
        if any(margins) or extent.q_grid != extent.kv_grid:
            return None
        groups = []
        for axis in range(rank):
            by_length: dict[int, list[Tensor]] = {}
            for piece in self._pieces(axis, extent):
                by_length.setdefault(len(piece), []).append(piece)
            groups.append([torch.stack(pieces) for pieces in by_length.values()])
        parts = []
        for chosen in itertools.product(*groups):
            grid = tuple(coordinates.shape[1] for coordinates in chosen)
            tokens = raster(list(chosen), extent.kv_grid)
            parts.append(Part(Dense(), Extent(grid, grid), tokens, tokens))
        return tuple(parts)

    def _interval(self, axis: int, q: Tensor, extent: Extent) -> tuple[Tensor, Tensor]:
        rank = len(extent.kv_grid)
        size, shift, before, after = (
            min(per_axis(value, rank)[axis], FAR)
            for value in (self.size, self.shift, self.before, self.after)
        )
        start = (q - shift).div(size, rounding_mode="floor") * size + shift
        length = extent.kv_grid[axis]
        return (start - before).clamp(0, length), (start + size + after).clamp(0, length)

    def _pieces(self, axis: int, extent: Extent) -> list[Tensor]:
        """Coordinates of the pieces of one axis."""
        rank, length = len(extent.kv_grid), extent.kv_grid[axis]
        size, shift = per_axis(self.size, rank)[axis], per_axis(self.shift, rank)[axis]
        cuts = sorted({0, length, *range(shift, length, size)})
        return [torch.arange(start, stop) for start, stop in itertools.pairwise(cuts)]
