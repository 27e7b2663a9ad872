"""What a pattern is: which query may see which key, as a value without tensors."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveal._errors import PatternError

if TYPE_CHECKING:
    from foveal.patterns.combine import Intersection, Union

SKIPPED, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class Extent:
    """Token extents of queries and keys, one to three axes each, in raster order."""

    q_grid: tuple[int, ...]
    kv_grid: tuple[int, ...]

    @property
    def Lq(self) -> int:
        return math.prod(self.q_grid)

    @property
    def Lk(self) -> int:
        return math.prod(self.kv_grid)

    def flat(self) -> Extent:
        return Extent((self.Lq,), (self.Lk,))

    def q_positions(self) -> Tensor:
        """Absolute positions of the queries, aligned to the last key.  [Lq] int64"""
        return torch.arange(self.Lq) + (self.Lk - self.Lq)

    def k_positions(self) -> Tensor:
        return torch.arange(self.Lk)

    def axis_positions(self, axis: int) -> Tensor:
        """Positions of the queries along one axis.  [q_grid[axis]] int64"""
        return self.q_positions() if len(self.q_grid) == 1 else torch.arange(self.q_grid[axis])

    def coordinates(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Coordinates on the key grid of flat positions; with one axis the position itself."""
        if len(self.kv_grid) == 1:
            return (positions,)
        coordinates = []
        for axis, length in enumerate(self.kv_grid):
            below = math.prod(self.kv_grid[axis + 1 :])
            coordinates.append(positions // below % length)
        return tuple(coordinates)


@dataclass(frozen=True)
class Bounds:
    """A separable pattern: query i sees, on every axis, the keys lo[i] <= j < hi[i].

    `lower[a]` and `upper[a]` are int64 arrays over the query coordinate of axis a; both
    never decrease along the axis, and lo <= hi (equal: the query sees nothing).
    """

    extent: Extent
    lower: tuple[Tensor, ...]
    upper: tuple[Tensor, ...]

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs."""
        per_axis = zip(self.lower, self.upper, strict=True)
        return math.prod(int((hi - lo).sum()) for lo, hi in per_axis)

    def tile_counts(self, axis: int, q_tile: int, kv_tile: int) -> Tensor:
        """State of each (query tile, key tile) of one axis: SKIPPED, PARTIAL or FULL, uint8."""
        length = self.extent.kv_grid[axis]
        first_lo, last_lo, first_hi, last_hi = self.tile_ends(axis, q_tile)
        start = torch.arange(0, max(length, 1), kv_tile)[None]  # [1, kv_tiles]
        stop = (start + kv_tile).clamp(max=length)
        seen = (start < last_hi[:, None]) & (stop > first_lo[:, None])
        whole = (start >= last_lo[:, None]) & (stop <= first_hi[:, None])
        return seen.to(torch.uint8) + (seen & whole).to(torch.uint8)

    def tile_totals(self, axis: int, q_tile: int, kv_tile: int) -> tuple[int, int, int]:
        """Visited, full and all tiles of one axis, counted without laying the map out."""
        length = self.extent.kv_grid[axis]
        first_lo, last_lo, first_hi, last_hi = self.tile_ends(axis, q_tile)
        kv_tiles = -(-max(length, 1) // kv_tile)
        visited = (-(-last_hi // kv_tile) - first_lo // kv_tile)[last_hi > first_lo].sum()
        last_full = torch.where(first_hi == length, kv_tiles, first_hi // kv_tile)
        full = (last_full - -(-last_lo // kv_tile))[first_hi > last_lo].clamp(min=0).sum()
        return int(visited), int(full), len(first_lo) * kv_tiles

    def box_states(self, q_boxes: TokenBoxes, k_boxes: TokenBoxes) -> Tensor:
        """State of each pair of boxes.  uint8 [query boxes, key boxes]"""
        seen = whole = torch.ones(1, 1, dtype=torch.bool)
        for axis, (lo, hi) in enumerate(zip(self.lower, self.upper, strict=True)):
            first, last = q_boxes.low[:, axis], q_boxes.high[:, axis] - 1
            start, stop = k_boxes.low[:, axis], k_boxes.high[:, axis]
            first_lo, last_hi = lo[first, None], hi[last, None]
            seen = seen & (start < last_hi) & (stop > first_lo) & (last_hi > first_lo)
            whole = whole & (start >= lo[last, None]) & (stop <= hi[first, None])
        return seen.to(torch.uint8) + (seen & whole).to(torch.uint8)

    def tile_ends(self, axis: int, q_tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per query tile of one axis: smallest lo, largest lo, smallest hi, largest hi."""
        lo, hi = self.lower[axis], self.upper[axis]
        first = torch.arange(0, len(lo), q_tile)
        last = (first + q_tile).clamp(max=len(lo)) - 1
        return lo[first], lo[last], hi[first], hi[last]


@dataclass(frozen=True)
class TokenBoxes:
    """Boxes of a grid: on axis a, box n holds the places low[n, a] <= i < high[n, a].

    int64 [boxes, axes]; no box is empty.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of_corner(cls, rank: int) -> TokenBoxes:
        """The first token alone."""
        low = torch.zeros(1, rank, dtype=torch.int64)
        return cls(low, low + 1)

    def raster(self, grid: tuple[int, ...]) -> TokenBoxes:
        """On one axis, the runs of raster positions from the first to the last token of each."""
        factors = torch.tensor([math.prod(grid[axis + 1 :]) for axis in range(len(grid))])
        first, last = (self.low * factors).sum(-1), ((self.high - 1) * factors).sum(-1)
        return TokenBoxes(first[:, None], last[:, None] + 1)


@dataclass(frozen=True)
class Part:
    """Independent sub-problems of one shape: `count` of them, stacked on the batch axis.

    `q_tokens` and `k_tokens` [count, L] int64 name the tokens of the whole problem that each
    takes; every query belongs to exactly one part, a key may occur in several.
    """

    pattern: Pattern
    extent: Extent
    q_tokens: Tensor
    k_tokens: Tensor


class Pattern:
    """Which pairs of query and key take part in attention.

    A pattern is a frozen value; `allows` is its definition and all that a new pattern must
    write.  `bounds`, `parts` and `tile_map` describe the same set so that engines visit only
    what it needs.  Combine patterns with `&` (pairs in both) and `|` (pairs in either).
    """

    __slots__ = ()

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        """Whether query `q_pos` sees key `k_pos`.

        Positions are absolute raster positions on the key grid (int64, broadcast against each
        other; with Lq != Lk the last query stands on the last key).  Returns bool of the
        broadcast shape; data-dependent patterns put batch and head axes in front.
        """
        raise NotImplementedError

    def allows_listed(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        """`allows` for keys that differ per batch and head.

        q_pos [q], k_pos [N, heads, k]; returns bool [N or 1, heads or 1, q, k].
        """
        return self.allows(q_pos[:, None], k_pos[..., None, :], extent)

    @property
    def key(self) -> str:
        """A written identity, as the pattern is written in code; equal keys mean equal patterns."""
        if not is_dataclass(self):
            return f"{type(self).__name__} at {id(self):#x}"
        shown: list[str] = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.default is MISSING:
                shown.append(f"{value}" if not shown else f"{entry.name}={value!r}")
            elif value != entry.default:
                shown.append(f"{entry.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def __repr__(self) -> str:
        return self.key

    @property
    def rank(self) -> int | None:
        """Number of grid axes it needs; None: any, read in raster order where order matters."""
        return None

    @property
    def depends_on_data(self) -> bool:
        """True when the set of pairs is held in tensors and may differ per batch and head."""
        return False

    def validate(self, extent: Extent) -> None:
        """Raises PatternError when the pattern does not fit the grid."""
        if self.rank is not None and self.rank != len(extent.kv_grid):
            raise PatternError(
                "pattern", repr(self), f"a grid of {self.rank} axes is needed, not {extent.kv_grid}"
            )

    def validate_lists(self, batch: int, q_heads: int, kv_heads: int) -> None:
        """Raises SelectionError when lists per batch and head do not fit the tensors."""

    def simplify(self, extent: Extent) -> Pattern:
        """The plainest pattern with the same pairs on this extent."""
        return self

    def bounds(self, extent: Extent) -> Bounds | None:
        """Per-axis intervals when the pattern is separable, else None."""
        return None

    def parts(self, extent: Extent) -> tuple[Part, ...] | None:
        """Independent sub-problems that are cheaper than the whole, or None."""
        return None

    def tile_unit(self) -> tuple[int, int] | None:
        """Query and key tile that every tiling must divide, or None."""
        return None

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        """State of each pair of flat tiles: SKIPPED, PARTIAL or FULL.

        Returns uint8 [..., q_tiles, kv_tiles].  Never calls a visible pair skipped or a hidden
        pair full; combinations may call a tile partial that is in truth empty or full.
        """
        bounds = self.bounds(extent)
        if bounds is not None and len(bounds.extent.kv_grid) == 1:
            return bounds.tile_counts(0, q_tile, kv_tile)
        return self._evaluated_tile_map(extent, q_tile, kv_tile)

    def box_states(self, extent: Extent, q_boxes: TokenBoxes, k_boxes: TokenBoxes) -> Tensor | None:
        """State of each pair of boxes of the grid, uint8 [query boxes, key boxes], or None.

        Keeps the promise of `tile_map`; None where only pairs can be judged.
        """
        bounds = self.bounds(extent)
        if bounds is None:
            return None
        if bounds.extent != extent:
            q_boxes, k_boxes = q_boxes.raster(extent.q_grid), k_boxes.raster(extent.kv_grid)
        return bounds.box_states(q_boxes, k_boxes)

    def _evaluated_tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        k_pos = extent.k_positions()
        kv_tiles = -(-extent.Lk // kv_tile)
        owner = k_pos // kv_tile
        size = torch.bincount(owner, minlength=kv_tiles)
        rows = []
        for q_pos in extent.q_positions().split(q_tile):
            count = self.allows(q_pos[:, None], k_pos[None], extent).sum(-2)
            seen = torch.zeros(*count.shape[:-1], kv_tiles, dtype=count.dtype)
            seen.index_add_(-1, owner, count)
            rows.append((seen > 0).to(torch.uint8) + (seen == size * len(q_pos)).to(torch.uint8))
        return torch.stack(rows, dim=-2)

    def offsets(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> tuple[Tensor, ...]:
        """Per axis, how many steps of the pattern the key lies after the query.

        Steps are tokens, dilation steps for a dilated neighborhood; across a wrapped border
        the short way round.  This is the index into a relative bias table.
        """
        q_axes, k_axes = extent.coordinates(q_pos), extent.coordinates(k_pos)
        return tuple(k - q for q, k in zip(q_axes, k_axes, strict=True))

    def reach(self, extent: Extent) -> tuple[int, ...]:
        """Per axis, the largest absolute offset of a visible pair."""
        bounds = self.bounds(extent)
        if bounds is None or bounds.extent.kv_grid != extent.kv_grid:
            grids = zip(extent.q_grid, extent.kv_grid, strict=True)
            return tuple(max(lengths) - 1 for lengths in grids)
        reach = []
        for axis, (lo, hi) in enumerate(zip(bounds.lower, bounds.upper, strict=True)):
            reach.append(interval_reach(extent.axis_positions(axis), lo, hi))
        return tuple(reach)

    def dense_mask(self, q_grid: int | tuple[int, ...], kv_grid: int | tuple[int, ...]) -> Tensor:
        """The whole set as a matrix, for tests and pictures.  bool [..., Lq, Lk]"""
        extent = Extent(per_axis(q_grid, 1), per_axis(kv_grid, 1))
        self.validate(extent)
        return self.allows(extent.q_positions()[:, None], extent.k_positions()[None], extent)

    def __and__(self, other: Pattern) -> Intersection:
        if not isinstance(other, Pattern):
            return NotImplemented
        from foveal.patterns.combine import Intersection

        return Intersection((self, other))

    def __or__(self, other: Pattern) -> Union:
        if not isinstance(other, Pattern):
            return NotImplemented
        from foveal.patterns.combine import Union

        return Union((self, other))


def per_axis(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    """An integer means every axis."""
    return (value,) * rank if isinstance(value, int) else tuple(value)


def for_heads(x: Tensor, heads: int, axis: int) -> Tensor:
    """Lists as `heads` query heads read them: one for all, or one per key head, shared by its group."""
    own = x.shape[axis]
    return x if own in (1, heads) else x.repeat_interleave(heads // own, dim=axis)


def interval_reach(place: Tensor, lo: Tensor, hi: Tensor) -> int:
    """Largest distance from a place to a member of its interval [lo, hi)."""
    far = torch.maximum(place - lo, hi - 1 - place)[hi > lo]
    return int(far.max()) if len(far) else 0
