"""Which pairs of tiles a pattern visits, in the token order in which an engine would walk it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.patterns.base import FULL, PARTIAL, SKIPPED, Bounds, Extent, Pattern

_TILES_PER_SIDE = 40
_LEAST_TILE = 4
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Visits:
    """The map of (query tile, key tile) pairs of a pattern on an extent.

    states uint8 [q_tiles, kv_tiles] holds SKIPPED, PARTIAL, FULL.  `q_edges` and `k_edges` count
    the tokens in front of each tile, [tiles + 1].  `q_cuts` and `k_cuts` are the token counts where
    one independent sub-problem ends and the next begins.  `q_tile` and `kv_tile` are the sides of
    the tiles of the first one.  `elements` bool [Lq, Lk] is the mask in the order of the map, or
    None where it was not asked for.
    """

    states: Tensor
    q_edges: tuple[int, ...]
    k_edges: tuple[int, ...]
    q_cuts: tuple[int, ...]
    k_cuts: tuple[int, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    pairs: int
    elements: Tensor | None

    @property
    def total(self) -> int:
        return self.states.numel()

    @property
    def full(self) -> int:
        return int((self.states == FULL).sum())

    @property
    def partial(self) -> int:
        return int((self.states == PARTIAL).sum())

    @property
    def skipped(self) -> int:
        return int((self.states == SKIPPED).sum())

    @property
    def parts(self) -> int:
        """Independent sub-problems."""
        return len(self.q_cuts) + 1


def visits(pattern: Pattern, extent: Extent, with_elements: bool = False) -> Visits:
    """The map of the pattern, with tiles just large enough for a readable picture."""
    volume = tile_volume(extent)
    plain = pattern.simplify(extent)
    pieces = [piece for piece in _pieces(plain, extent) if piece.extent.Lq]
    maps = [_piece_map(piece, volume, with_elements) for piece in pieces]
    rows = sum(each.states.shape[0] for each in maps)
    columns = sum(each.states.shape[1] for each in maps)
    states = torch.full((rows, columns), SKIPPED, dtype=torch.uint8)
    row = column = 0
    for each in maps:
        height, width = each.states.shape
        states[row : row + height, column : column + width] = each.states
        row, column = row + height, column + width
    q_edges, q_cuts = _joined([each.q_sizes for each in maps])
    k_edges, k_cuts = _joined([each.k_sizes for each in maps])
    elements = None
    if with_elements:
        elements = torch.block_diag(*(each.elements.float() for each in maps)).bool()
    first = maps[0] if maps else None
    return Visits(
        states,
        q_edges,
        k_edges,
        q_cuts,
        k_cuts,
        first.q_tile if first else (1,),
        first.kv_tile if first else (1,),
        sum(piece.pairs() for piece in pieces),
        elements,
    )


def tile_volume(extent: Extent) -> int:
    """Tokens per tile, a power of two, such that the longer side holds at most 40 tiles."""
    length = max(extent.Lq, extent.Lk, 1)
    least = math.ceil(math.log2(max(length / _TILES_PER_SIDE, _LEAST_TILE)))
    return int(2**least)


def visible(pattern: Pattern, q_pos: Tensor, extent: Extent) -> Tensor:
    """Keys that some queries see, of the first batch entry and head.  bool [queries, Lk]"""
    mask = pattern.allows(q_pos[:, None], extent.k_positions()[None], extent)
    return mask.reshape(-1, *mask.shape[-2:])[0]


@dataclass(frozen=True)
class _Piece:
    """A sub-problem that is walked on its own."""

    pattern: Pattern
    extent: Extent

    @functools.cached_property
    def bounds(self) -> Bounds | None:
        return self.pattern.bounds(self.extent)

    def pairs(self) -> int:
        if self.bounds is not None:
            return self.bounds.pairs
        chunks = torch.split(self.extent.q_positions(), _ROWS_AT_ONCE)
        return sum(int(visible(self.pattern, chunk, self.extent).sum()) for chunk in chunks)


@dataclass(frozen=True)
class _Map:
    states: Tensor
    q_sizes: list[int]
    k_sizes: list[int]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    elements: Tensor


def _pieces(pattern: Pattern, extent: Extent) -> Iterator[_Piece]:
    parts = pattern.parts(extent)
    if parts is None:
        yield _Piece(pattern, extent)
        return
    for part in parts:
        inner = list(_pieces(part.pattern.simplify(part.extent), part.extent))
        for _ in range(len(part.q_tokens)):
            yield from inner


def _piece_map(piece: _Piece, volume: int, with_elements: bool) -> _Map:
    nothing = torch.zeros(0, 0, dtype=torch.bool)
    bounds, extent = piece.bounds, piece.extent
    if bounds is None:
        unit = piece.pattern.tile_unit() or (volume, volume)
        q_tile, kv_tile = (_divisor_near(size, volume) for size in unit)
        states = piece.pattern.tile_map(extent, q_tile, kv_tile)
        return _Map(
            states.reshape(-1, *states.shape[-2:])[0],
            _sizes(extent.Lq, q_tile),
            _sizes(extent.Lk, kv_tile),
            (q_tile,),
            (kv_tile,),
            visible(piece.pattern, extent.q_positions(), extent) if with_elements else nothing,
        )
    sides = tile_sides(bounds.extent.kv_grid, volume)
    states = _product(bounds, sides)
    q_sizes = _box_sizes(bounds.extent.q_grid, sides)
    k_sizes = _box_sizes(bounds.extent.kv_grid, sides)
    elements = _box_elements(bounds, sides) if with_elements else nothing
    return _Map(states, q_sizes, k_sizes, sides, sides, elements)


def tile_sides(grid: tuple[int, ...], volume: int) -> tuple[int, ...]:
    """Sides of a box of at least `volume` tokens that cuts every axis into about as many pieces."""
    sides = [1] * len(grid)
    cube = len(set(grid)) == 1
    while math.prod(sides) < volume or (cube and len(set(sides)) > 1):
        counts = [length / side for length, side in zip(grid, sides, strict=True)]
        if max(counts) <= 1:
            break
        sides[counts.index(max(counts))] *= 2
    return tuple(min(side, max(length, 1)) for side, length in zip(sides, grid, strict=True))


def _product(bounds: Bounds, sides: tuple[int, ...]) -> Tensor:
    """States of box tiles: the least of the axes' states.  [q_tiles, kv_tiles]"""
    axes = [bounds.tile_counts(axis, side, side) for axis, side in enumerate(sides)]
    rank = len(axes)
    total = torch.full((1,) * (2 * rank), FULL, dtype=torch.uint8)
    for axis, states in enumerate(axes):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = states.shape
        total = torch.minimum(total, states.view(shape))
    return total.reshape(math.prod(states.shape[0] for states in axes), -1)


def _box_elements(bounds: Bounds, sides: tuple[int, ...]) -> Tensor:
    """The mask with tokens in the order of the boxes.  bool [Lq, Lk]"""
    extent = bounds.extent
    mask = torch.ones(extent.Lq, extent.Lk, dtype=torch.bool)
    q_places = torch.unravel_index(torch.arange(extent.Lq), extent.q_grid)
    k_places = torch.unravel_index(torch.arange(extent.Lk), extent.kv_grid)
    for axis, (q, k) in enumerate(zip(q_places, k_places, strict=True)):
        lower, upper = bounds.lower[axis][q, None], bounds.upper[axis][q, None]
        mask &= (k >= lower) & (k < upper)
    return mask[_box_order(extent.q_grid, sides)][:, _box_order(extent.kv_grid, sides)]


def _box_order(grid: tuple[int, ...], sides: tuple[int, ...]) -> Tensor:
    """Raster indices of the tokens, box after box."""
    index = torch.arange(math.prod(grid)).view(grid)
    boxes = itertools.product(*(_slices(n, side) for n, side in zip(grid, sides, strict=True)))
    return torch.cat([index[box].flatten() for box in boxes])


def _box_sizes(grid: tuple[int, ...], sides: tuple[int, ...]) -> list[int]:
    per_axis = (_sizes(length, side) for length, side in zip(grid, sides, strict=True))
    return [math.prod(box) for box in itertools.product(*per_axis)]


def _slices(length: int, side: int) -> list[slice]:
    return [slice(start, min(start + side, length)) for start in range(0, length, side)]


def _sizes(length: int, side: int) -> list[int]:
    return [each.stop - each.start for each in _slices(length, side)]


def _divisor_near(unit: int, size: int) -> int:
    """The divisor of `unit` whose ratio to `size` is closest to 1."""
    divisors = (d for d in range(1, unit + 1) if unit % d == 0)
    return min(divisors, key=lambda d: abs(math.log(d / size)))


def _joined(sizes: list[list[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Edges of all tiles, and the edges between the groups."""
    edges = tuple(itertools.accumulate(itertools.chain(*sizes), initial=0))
    cuts = tuple(itertools.accumulate(sum(group) for group in sizes))
    return edges, cuts[:-1]
