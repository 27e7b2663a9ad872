"""Neighborhoods on the sphere: what lies within a great-circle distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveal._arguments import finite
from foveal._errors import PatternError
from foveal._kept import kept
from foveal.patterns.base import Extent, Part, Pattern, TokenBoxes
from foveal.patterns.blocked import blocked_parts, joined, pieces
from foveal.patterns.dense import Dense

Latitudes = Literal["equiangular", "gauss-legendre"]

# Distances that equal the radius count as within it, whatever the rounding.
_SLACK = 1 + 1e-3
_AT_A_POLE = 1e-12


@kept(32)
def colatitudes(count: int, latitudes: Latitudes = "equiangular") -> Tensor:
    """Angles from the north pole of the rows of a grid, ascending, in radians.  float64 [count]

    Options: "equiangular": pi t / (count - 1), poles included; "gauss-legendre": arccos of the roots
    of the Legendre polynomial of degree `count`.
    """
    if latitudes == "equiangular":
        return torch.arange(count, dtype=torch.float64) * (math.pi / max(count - 1, 1))
    if latitudes != "gauss-legendre":
        raise PatternError("latitudes", latitudes, "'equiangular' or 'gauss-legendre' is needed")
    n = torch.arange(1, count, dtype=torch.float64)
    beside = n / torch.sqrt(4 * n**2 - 1)
    roots = torch.linalg.eigvalsh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return torch.arccos(roots.clamp(-1, 1)).flip(0)


@dataclass(frozen=True, slots=True, repr=False)
class Sphere(Pattern):
    """A query sees the keys within the great-circle distance `radius` of it.

    Queries and keys stand on grids [rows, columns]: rows are colatitudes from pole to pole, columns
    longitudes 2 pi p / columns.  With colatitudes a and b, keys in row b are seen over a circular
    half-width of floor(arccos(c) columns / 2 pi) columns,
    c = (cos(radius) - cos a cos b) / (sin a sin b); rows near the poles are seen whole.

    Options: radius in radians, default pi / (rows of the queries - 1); distances up to 1.001 radius
    count; latitudes of both grids.
    Limits: two axes; the columns of the queries divide those of the keys, and query column p stands at
    key column p columns' / columns.
    Equals: radius pi is Dense().  Cost: the share of the sphere within the radius, (1 - cos radius) / 2.
    Paper: Attention on the Sphere (2505.11157).
    """

    radius: float | None = None
    latitudes: Latitudes = "equiangular"

    def __post_init__(self) -> None:
        if self.radius is not None and not (finite(self.radius) and self.radius > 0):
            raise PatternError("radius", self.radius, "an angle above 0 is needed")
        if self.latitudes not in ("equiangular", "gauss-legendre"):
            raise PatternError(
                "latitudes", self.latitudes, "'equiangular' or 'gauss-legendre' is needed"
            )

    @property
    def rank(self) -> int:
        return 2

    def validate(self, extent: Extent) -> None:
        Pattern.validate(self, extent)
        if not extent.Lq or extent.kv_grid[1] % extent.q_grid[1]:
            raise PatternError(
                "pattern",
                f"{extent.q_grid} queries and {extent.kv_grid} keys",
                "columns of the queries that divide those of the keys are needed",
            )

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        (_, q_columns), (_, columns) = extent.q_grid, extent.kv_grid
        q_index = q_pos - (extent.Lk - extent.Lq)
        half = half_widths(self, extent)[q_index // q_columns, k_pos // columns]
        apart = (k_pos % columns - q_index % q_columns * (columns // q_columns)).abs()
        return apart.minimum(columns - apart) <= half

    def simplify(self, extent: Extent) -> Pattern:
        widest = extent.kv_grid[1] // 2
        return Dense() if bool((half_widths(self, extent) >= widest).all()) else self

    def parts(self, extent: Extent) -> tuple[Part, ...] | None:
        return blocked_parts(self, extent)

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        q_owner, q_boxes = pieces(extent.q_grid, (1, extent.q_grid[1]), q_tile)
        k_owner, k_boxes = pieces(extent.kv_grid, (1, extent.kv_grid[1]), kv_tile)
        return joined(self.box_states(extent, q_boxes, k_boxes), q_owner, k_owner)

    def box_states(self, extent: Extent, q_boxes: TokenBoxes, k_boxes: TokenBoxes) -> Tensor:
        columns = extent.kv_grid[1]
        table = half_widths(self, extent)
        q_rows, q_row = _ranges(q_boxes, 0)
        k_rows, k_row = _ranges(k_boxes, 0)
        most = _largest(table, q_rows, k_rows)
        least = -_largest(-table, q_rows, k_rows)
        q_columns, q_column = _ranges(q_boxes, 1)
        k_columns, k_column = _ranges(k_boxes, 1)
        near, far = _apart(q_columns, k_columns, columns, columns // extent.q_grid[1])

        def of_pairs(values: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            return values.to(torch.int32)[q_index][:, k_index]

        most, least = of_pairs(most, q_row, k_row), of_pairs(least, q_row, k_row)
        seen = (of_pairs(near, q_column, k_column) <= most) & (most >= 0)
        whole = seen & (of_pairs(far, q_column, k_column) <= least)
        return seen.to(torch.uint8) + whole.to(torch.uint8)


@kept(32)
def half_widths(pattern: Sphere, extent: Extent) -> Tensor:
    """Columns seen on either side of the own one, per row of queries and of keys; -1: none.

    int64 [query rows, key rows].
    """
    rows, columns = extent.q_grid[0], extent.kv_grid[1]
    radius = math.pi / max(rows - 1, 1) if pattern.radius is None else pattern.radius
    # The far side of the sphere is reached whatever the rounding of the quotient below.
    edge = math.cos(radius * _SLACK) if radius * _SLACK < math.pi else -math.inf
    a = colatitudes(rows, pattern.latitudes)[:, None]
    b = colatitudes(extent.kv_grid[0], pattern.latitudes)[None]
    sines, cosines = a.sin() * b.sin(), a.cos() * b.cos()
    polar = sines < _AT_A_POLE
    c = (edge - cosines) / torch.where(polar, 1.0, sines)
    half = (torch.arccos(c.clamp(-1, 1)) * (columns / (2 * math.pi))).floor().to(torch.int64)
    half = torch.where(c > 1, -1, torch.where(c <= -1, columns, half))
    return torch.where(polar, torch.where(cosines >= edge, columns, -1), half)


def _ranges(boxes: TokenBoxes, axis: int) -> tuple[Tensor, Tensor]:
    """The different ranges [low, high) of one axis, and which one each box has."""
    ranges = torch.stack([boxes.low[:, axis], boxes.high[:, axis]], dim=1)
    found, index = torch.unique(ranges, dim=0, return_inverse=True)
    return found, index


def _largest(table: Tensor, q_ranges: Tensor, k_ranges: Tensor) -> Tensor:
    """The largest entry of the table over each pair of ranges of rows."""
    by_query = torch.stack([table[start:stop].amax(0) for start, stop in q_ranges.tolist()])
    by_both = [by_query[:, start:stop].amax(1) for start, stop in k_ranges.tolist()]
    return torch.stack(by_both, dim=1)


def _apart(q_ranges: Tensor, k_ranges: Tensor, columns: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest circular distance between the columns of two ranges, or what bounds them."""
    low = k_ranges[None, :, 0] - (q_ranges[:, None, 1] - 1) * ratio
    high = k_ranges[None, :, 1] - 1 - q_ranges[:, None, 0] * ratio
    at_low, at_high = (x.remainder(columns) for x in (low, high))
    at_low, at_high = (x.minimum(columns - x) for x in (at_low, at_high))
    whole_turn = _holds(low, high, columns, 0)
    half_turn = _holds(2 * low, 2 * high, 2 * columns, columns)
    near = torch.where(whole_turn, 0, at_low.minimum(at_high))
    return near, torch.where(half_turn, columns // 2, at_low.maximum(at_high))


def _holds(low: Tensor, high: Tensor, period: int, phase: int) -> Tensor:
    """Whether some low <= x <= high is phase + a multiple of period."""
    last = (high - phase).div(period, rounding_mode="floor")
    first = -(phase - low).div(period, rounding_mode="floor")
    return last >= first
