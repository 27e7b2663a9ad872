"""The tiles that the CPU edition visits, in the order in which it visits them.

A sweep lays some queries and keys out as plain matrices; each of its tiles takes some rows of
the one and some columns of the other.  Separable patterns become boxes of the grid that start
where the window starts, so no tile is wider than its rows need; every other pattern becomes
runs of flat key tiles, or per-head lists.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveal.patterns.base import PARTIAL, SKIPPED, Bounds, Extent, Pattern

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Mask:
    """Pairs of a tile that take no part."""

    hidden: Tensor  # bool [rows, columns], or [N or 1, heads or 1, rows, columns]

    @functools.cached_property
    def additive(self) -> Tensor:
        """-inf where hidden, else 0."""
        return torch.zeros(self.hidden.shape).masked_fill_(self.hidden, -torch.inf)

    @functools.cached_property
    def blind(self) -> Tensor | None:
        """Rows that see no key of the tile, or None when every row sees one.  [..., rows, 1]"""
        rows = self.hidden.all(-1, keepdim=True)
        return rows if bool(rows.any()) else None


@dataclass(frozen=True)
class Runs:
    """Columns as runs of neighbouring keys: views, never copies."""

    slices: Slices

    @property
    def width(self) -> int:
        return sum(s.stop - s.start for s in self.slices)

    def take(self, keys: Tensor) -> Tensor:
        """[M, columns, D] of keys [M, C, D]"""
        if len(self.slices) == 1:
            return keys[:, self.slices[0]]
        return torch.cat([keys[:, s] for s in self.slices], dim=1)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total[:, columns] += left [M, columns, rows] @ right [M, rows, D]"""
        widths = [s.stop - s.start for s in self.slices]
        for run, piece in zip(self.slices, left.split(widths, dim=1), strict=True):
            total[:, run].baddbmm_(piece, right)


@dataclass(frozen=True)
class Listed:
    """Columns as one list of keys per matrix.  index int64 [M, columns]"""

    index: Tensor

    @property
    def width(self) -> int:
        return self.index.shape[-1]

    def take(self, keys: Tensor) -> Tensor:
        return keys.gather(1, self._rows(keys.shape[-1]))

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        total.scatter_add_(1, self._rows(total.shape[-1]), torch.bmm(left, right))

    def _rows(self, width: int) -> Tensor:
        return self.index[..., None].expand(-1, -1, width)


@dataclass(frozen=True)
class Tile:
    """Rows of a sweep's queries against some of its keys."""

    rows: slice
    runs: Runs | None  # None: the keys differ per head, `k_tokens` lists them
    mask: Mask | None
    q_tokens: Tensor  # [rows] index among the queries
    k_tokens: Tensor  # [columns] index among the keys, or [N or 1, heads or 1, columns]


@dataclass(frozen=True)
class Sweep:
    """A box of the grids laid out as matrices; without slices the tokens as they are."""

    extent: Extent
    q_box: Slices = ()
    k_box: Slices = ()
    tiles: tuple[Tile, ...] = field(default=(), repr=False)

    def queries(self, tokens: Tensor) -> Tensor:
        """[..., R, D] of tokens [..., Lq, D]"""
        return _box(tokens, self.extent.q_grid, self.q_box)

    def keys(self, tokens: Tensor) -> Tensor:
        """[..., C, D] of tokens [..., Lk, D]"""
        return _box(tokens, self.extent.kv_grid, self.k_box)

    def query_buffer(self, total: Tensor) -> Tensor:
        """Where a result [..., R, D] is gathered; without a box the result itself."""
        return torch.empty_like(self.queries(total)) if self.q_box else total

    def key_buffer(self, total: Tensor) -> Tensor:
        """Where sums over queries are gathered [..., C, D]; without a box the result itself."""
        return torch.zeros_like(self.keys(total)) if self.k_box else total

    def store_queries(self, total: Tensor, buffer: Tensor) -> None:
        if self.q_box:
            view = _on_grid(total, self.extent.q_grid)[(..., *self.q_box, slice(None))]
            view.copy_(buffer.view(view.shape))

    def add_keys(self, total: Tensor, buffer: Tensor) -> None:
        if self.k_box:
            view = _on_grid(total, self.extent.kv_grid)[(..., *self.k_box, slice(None))]
            view += buffer.view(view.shape)


def _on_grid(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    return tokens.view(*tokens.shape[:-2], *grid, tokens.shape[-1])


def _box(tokens: Tensor, grid: tuple[int, ...], box: Slices) -> Tensor:
    if not box:
        return tokens
    return _on_grid(tokens, grid)[(..., *box, slice(None))].flatten(-len(grid) - 1, -2)


def walk(pattern: Pattern, extent: Extent, heads: int) -> Iterator[Sweep]:
    """Every sweep of the pattern; each query belongs to exactly one tile.

    `heads` is the number of score matrices that a tile computes at once (batch x query heads).
    """
    if pattern.depends_on_data:
        yield from _listed_sweeps(pattern, extent)
    elif pattern.bounds(extent) is not None:
        yield from _box_sweeps(pattern, extent, heads)
    else:
        yield from _run_sweeps(pattern, extent)


# What a tile costs, in elements of its score matrices: its elements, more the fewer rows share the
# keys they read (a product of 24 rows runs at half the speed of a tall one), and its calls (60 us
# against 3.2 ns an element: two products and a softmax at D = 64 on two AVX-512 cores).
_CALLS = 20_000
_HALF_SPEED_ROWS = 24
_SIDES = {1: (16, 32, 64, 128, 256, 512), 2: (4, 8, 16, 32), 3: (2, 4, 8)}


def choose_tile(bounds: Bounds, heads: int) -> tuple[int, ...]:
    """The query tile, per axis, that visits the pattern at the least estimated cost.

    `heads` is the number of score matrices that a tile computes (batch x query heads).
    """
    grid = bounds.extent.q_grid
    options = []
    for axis, length in enumerate(grid):
        sides = sorted({min(side, max(length, 1)) for side in _SIDES[len(grid)]})
        options.append([(side, *_swept(bounds, axis, side)) for side in sides])

    def cost(choice: tuple[tuple[int, int, int], ...]) -> float:
        rows = math.prod(side for side, _, _ in choice)
        elements = math.prod(elements for _, elements, _ in choice)
        tiles = math.prod(tiles for _, _, tiles in choice)
        return heads * elements * (1 + _HALF_SPEED_ROWS / rows) + _CALLS * tiles

    return tuple(side for side, _, _ in min(itertools.product(*options), key=cost))


def _swept(bounds: Bounds, axis: int, side: int) -> tuple[int, int]:
    """Elements (rows x columns summed over tiles) and tiles of one axis."""
    first_lo, _, _, last_hi = bounds.tile_ends(axis, side)
    rows = torch.full_like(first_lo, side)
    if len(rows):
        rows[-1] = len(bounds.lower[axis]) - side * (len(rows) - 1)
    return int((rows * (last_hi - first_lo)).sum()), len(rows)


@dataclass(frozen=True)
class _Span:
    """One tile of one axis: its queries, its keys, and which of the keys each query sees."""

    queries: slice
    keys: slice
    visible: Tensor  # bool [rows, columns]
    shape: bytes  # equal for equal `visible`


def _spans(bounds: Bounds, axis: int, side: int) -> list[_Span]:
    lower, upper = bounds.lower[axis], bounds.upper[axis]
    spans = []
    for start in range(0, len(lower), side):
        stop = min(start + side, len(lower))
        lo, hi = lower[start:stop], upper[start:stop]
        first, last = int(lo[0]), max(int(hi[-1]), int(lo[0]))
        column = torch.arange(first, last)
        visible = (column >= lo[:, None]) & (column < hi[:, None])
        ends = torch.stack([lo - first, hi - first]).numpy().tobytes()
        spans.append(_Span(slice(start, stop), slice(first, last), visible, ends))
    return spans


@functools.lru_cache(maxsize=32)
def _box_sweeps(pattern: Pattern, extent: Extent, heads: int) -> tuple[Sweep, ...]:
    bounds = pattern.bounds(extent)
    assert bounds is not None
    extent = bounds.extent
    if extent.Lq == 0:
        return ()
    tile = choose_tile(bounds, heads)
    spans = [_spans(bounds, axis, side) for axis, side in enumerate(tile)]
    masks: dict[tuple[bytes, ...], Mask | None] = {}
    q_index = torch.arange(extent.Lq).view(extent.q_grid)
    k_index = torch.arange(extent.Lk).view(extent.kv_grid)
    sweeps = []
    for inner in itertools.product(*spans[1:]):
        q_width = math.prod(span.queries.stop - span.queries.start for span in inner)
        k_width = math.prod(span.keys.stop - span.keys.start for span in inner)
        tiles = []
        for outer in spans[0]:
            chosen = (outer, *inner)
            shape = tuple(span.shape for span in chosen)
            if shape not in masks:
                masks[shape] = _box_mask([span.visible for span in chosen])
            tiles.append(
                Tile(
                    slice(outer.queries.start * q_width, outer.queries.stop * q_width),
                    Runs((slice(outer.keys.start * k_width, outer.keys.stop * k_width),)),
                    masks[shape],
                    q_index[tuple(span.queries for span in chosen)].flatten(),
                    k_index[tuple(span.keys for span in chosen)].flatten(),
                )
            )
        everything = (slice(None),)
        q_box = (*everything, *(span.queries for span in inner)) if inner else ()
        k_box = (*everything, *(span.keys for span in inner)) if inner else ()
        sweeps.append(Sweep(extent, q_box, k_box, tuple(tiles)))
    return tuple(sweeps)


def _box_mask(visible: list[Tensor]) -> Mask | None:
    """The product of the axes' masks as [rows, columns], or None when nothing is hidden."""
    if all(bool(axis.all()) for axis in visible):
        return None
    rank = len(visible)
    total = torch.ones((1,) * (2 * rank), dtype=torch.bool)
    for axis, mask in enumerate(visible):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = mask.shape
        total = total & mask.view(shape)
    rows = math.prod(mask.shape[0] for mask in visible)
    return Mask(~total.reshape(rows, -1))


def flat_tile(pattern: Pattern) -> tuple[int, int]:
    """Query and key tile of patterns that are walked in raster order."""
    return pattern.tile_unit() or (64, 64)


def _run_sweeps(pattern: Pattern, extent: Extent) -> Iterator[Sweep]:
    flat = extent.flat()
    yield Sweep(flat, tiles=tuple(_run_tiles(pattern, extent, _states(pattern, extent))))


@functools.lru_cache(maxsize=32)
def _states(pattern: Pattern, extent: Extent) -> Tensor:
    return pattern.tile_map(extent, *flat_tile(pattern))


def _run_tiles(pattern: Pattern, extent: Extent, states: Tensor) -> Iterator[Tile]:
    q_tile, kv_tile = flat_tile(pattern)
    q_pos, k_pos = extent.q_positions(), extent.k_positions()
    for row, state in enumerate(states):
        rows = slice(row * q_tile, min((row + 1) * q_tile, extent.Lq))
        seen = torch.nonzero(state != SKIPPED)[:, 0].tolist()
        runs = tuple(
            slice(first * kv_tile, min((last + 1) * kv_tile, extent.Lk))
            for first, last in _runs(seen)
        )
        k_tokens = torch.cat([k_pos[run] for run in runs]) if runs else k_pos[:0]
        mask = None
        if not runs or bool((state == PARTIAL).any()):
            mask = Mask(~pattern.allows(q_pos[rows, None], k_tokens[None], extent))
        yield Tile(
            rows, Runs(runs or (slice(0, 0),)), mask, torch.arange(extent.Lq)[rows], k_tokens
        )


def _runs(ascending: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive integers."""
    for _, group in itertools.groupby(enumerate(ascending), lambda pair: pair[1] - pair[0]):
        members = [value for _, value in group]
        yield members[0], members[-1]


def _listed_sweeps(pattern: Pattern, extent: Extent) -> Iterator[Sweep]:
    q_tile, kv_tile = flat_tile(pattern)
    states = pattern.tile_map(extent, q_tile, kv_tile)
    tiles = (
        _listed_tile(pattern, extent, states[:, :, row], row * q_tile, q_tile, kv_tile)
        for row in range(states.shape[2])
    )
    yield from (Sweep(extent.flat(), tiles=(tile,)) for tile in tiles)


def _listed_tile(
    pattern: Pattern, extent: Extent, states: Tensor, start: int, q_tile: int, kv_tile: int
) -> Tile:
    """One query tile; states [N or 1, heads, kv_tiles] tells what each head visits."""
    rows = slice(start, min(start + q_tile, extent.Lq))
    order = torch.argsort((states == SKIPPED).to(torch.uint8), dim=-1, stable=True)
    width = int((states != SKIPPED).sum(-1).max()) if states.numel() else 0
    chosen = order[..., :width]
    padding = states.gather(-1, chosen) == SKIPPED
    k_tokens = (chosen[..., None] * kv_tile + torch.arange(kv_tile)).flatten(-2)
    outside = (k_tokens >= extent.Lk) | padding.repeat_interleave(kv_tile, dim=-1)
    k_tokens = k_tokens.clamp(max=max(extent.Lk - 1, 0))
    visible = pattern.allows_listed(extent.q_positions()[rows], k_tokens, extent)
    hidden = ~visible | outside[..., None, :]
    mask = Mask(hidden) if width == 0 or bool(hidden.any()) else None
    return Tile(rows, None, mask, torch.arange(extent.Lq)[rows], k_tokens)
