"""Patterns whose tokens stand in another order, in which flat tiles see less: box after box of a grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._kept import kept
from foveal.patterns.base import FULL, PARTIAL, Extent, Part, Pattern, TokenBoxes

# Tokens of a box: those of the tiles in which flat orders are walked.
_VOLUME = 64


@dataclass(frozen=True, slots=True, repr=False)
class Reordered(Pattern):
    """`inner` on a grid, its tokens in another order."""

    inner: Pattern
    grid: tuple[int, ...]

    @property
    def order(self) -> Tensor:
        """Raster positions of the tokens, in the order in which they stand.  int64 [L]"""
        raise NotImplementedError

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        order = self.order
        return self.inner.allows(order[q_pos], order[k_pos], Extent(self.grid, self.grid))


@dataclass(frozen=True, slots=True, repr=False)
class Blocked(Reordered):
    """Tokens in the order of boxes of `sides`, raster inside each."""

    sides: tuple[int, ...]

    @property
    def order(self) -> Tensor:
        return box_order(self.grid, self.sides)

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        q_owner, q_boxes = pieces(self.grid, self.sides, q_tile)
        k_owner, k_boxes = pieces(self.grid, self.sides, kv_tile)
        states = self.inner.box_states(Extent(self.grid, self.grid), q_boxes, k_boxes)
        assert states is not None, "only patterns that judge boxes are put in this order"
        return joined(states, q_owner, k_owner)


def blocked_parts(pattern: Pattern, extent: Extent) -> tuple[Part, ...] | None:
    """The pattern as one part with its tokens box after box; None where that says nothing."""
    grid = extent.kv_grid
    if len(grid) == 1 or extent.q_grid != grid or pattern.depends_on_data or not extent.Lk:
        return None
    corner = TokenBoxes.of_corner(len(grid))
    if pattern.box_states(extent, corner, corner) is None:
        return None
    sides = box_sides(grid)
    order = box_order(grid, sides)[None]
    line = (extent.Lk,)
    return (Part(Blocked(pattern, grid, sides), Extent(line, line), order, order),)


def box_sides(grid: tuple[int, ...], volume: int = _VOLUME) -> tuple[int, ...]:
    """Powers of two of at least `volume` tokens together, as equal as the grid lets them be."""
    sides = [1] * len(grid)
    while math.prod(sides) < volume:
        open_axes = [a for a, (side, n) in enumerate(zip(sides, grid, strict=True)) if side < n]
        if not open_axes:
            break
        shortest = min(open_axes, key=lambda a: (sides[a], -a))
        sides[shortest] *= 2
    return tuple(sides)


@kept(32)
def box_order(grid: tuple[int, ...], sides: tuple[int, ...]) -> Tensor:
    """Raster positions of the tokens, box after box.  int64 [L]"""
    return _numbered_order(grid, sides)[0]


@kept(32)
def _numbered_order(grid: tuple[int, ...], sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The order, and the number of the box of each of its tokens."""
    index = torch.arange(math.prod(grid)).view(grid)
    tokens = [index[box].flatten() for box in _boxes(grid, sides)]
    sizes = torch.tensor([len(box) for box in tokens])
    return torch.cat(tokens), torch.arange(len(sizes)).repeat_interleave(sizes)


def _boxes(grid: tuple[int, ...], sides: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Whole boxes first; what no whole box covers, strips at the ends of the axes, by boxes of its own."""
    halves = []
    for n, side in zip(grid, sides, strict=True):
        whole = n // side * side
        halves.append([(start, stop) for start, stop in ((0, whole), (whole, n)) if stop > start])
    for region in itertools.product(*halves):
        extents = tuple(stop - start for start, stop in region)
        fits = all(n >= side for n, side in zip(extents, sides, strict=True))
        own = sides if fits else box_sides(extents)
        cuts = (
            [slice(at, min(at + side, stop)) for at in range(start, stop, side)]
            for (start, stop), side in zip(region, own, strict=True)
        )
        yield from itertools.product(*cuts)


@kept(32)
def pieces(grid: tuple[int, ...], sides: tuple[int, ...], tile: int) -> tuple[Tensor, TokenBoxes]:
    """Tiles cut where a box of the grid ends: the tile of each piece, and the box around its tokens."""
    order, box = _numbered_order(grid, sides)
    places = torch.stack(torch.unravel_index(order, grid), dim=-1)  # [L, axes]
    owner = torch.arange(len(order)) // tile
    begins = torch.ones(len(order), dtype=torch.bool)
    begins[1:] = (box.diff() != 0) | (owner.diff() != 0)
    piece = begins.cumsum(0) - 1
    count = int(piece[-1]) + 1
    index = piece[:, None].expand_as(places)
    low = places.new_zeros(count, len(grid)).scatter_reduce_(
        0, index, places, "amin", include_self=False
    )
    high = places.new_zeros(count, len(grid)).scatter_reduce_(
        0, index, places, "amax", include_self=False
    )
    return owner[begins], TokenBoxes(low, high + 1)


def joined(states: Tensor, q_owner: Tensor, k_owner: Tensor) -> Tensor:
    """States of tiles from those of their pieces: seen if any is, full if all are."""
    counts = []
    for chosen in (states >= PARTIAL, states == FULL):
        by_row = torch.zeros(int(q_owner[-1]) + 1, states.shape[1], dtype=torch.int32)
        by_row.index_add_(0, q_owner, chosen.to(torch.int32))
        both = torch.zeros(len(by_row), int(k_owner[-1]) + 1, dtype=torch.int32)
        counts.append(both.index_add_(1, k_owner, by_row))
    pieces = torch.bincount(q_owner)[:, None] * torch.bincount(k_owner)
    seen, full = counts
    return (seen > 0).to(torch.uint8) + (full == pieces).to(torch.uint8)
