"""Patterns as the numbers that a GPU kernel reads: intervals per axis, or lists of key tiles."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveal.engines.tile.rows import walk_words
from foveal.patterns.base import PARTIAL, Bounds, Extent, Pattern
from foveal.patterns.combine import Intersection, Union


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
class WalkLists:
    """Tiles of columns that each tile of rows visits; rows are queries, or keys (`by_key`) for dK and dV.

    words: int32 [B or 1, lists, row_tiles, HEADER + width], lists = 1, key heads or query heads.  The
    rows of one list come longest first.  Each holds the tile of rows that it is about, how many visits
    need a test of their pairs, how many visits there are, then the tiles of columns: those that need
    the test in ascending order, then the others in ascending order.
    `heads_per_list` query heads share a list; batch_stride and list_stride count rows of `words`, 0
    where one serves all.
    """

    HEADER: ClassVar[int] = 3

    q_tile: int
    kv_tile: int
    words: Tensor
    heads_per_list: int

    @property
    def pitch(self) -> int:
        return self.words.shape[3]

    @property
    def batch_stride(self) -> int:
        return self.words.shape[1] * self.words.shape[2] if len(self.words) > 1 else 0

    @property
    def list_stride(self) -> int:
        return self.words.shape[2] if self.words.shape[1] > 1 else 0


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


def tile_states(
    pattern: Pattern, extent: Extent, q_tile: int, kv_tile: int, device: torch.device
) -> Tensor:
    """`pattern.tile_map` on the device; what does not depend on data is kept there."""
    if not pattern.depends_on_data:
        return _static_states(pattern, extent, q_tile, kv_tile, device)
    if isinstance(pattern, Intersection | Union):
        join = torch.minimum if isinstance(pattern, Intersection) else torch.maximum
        members = (tile_states(p, extent, q_tile, kv_tile, device) for p in pattern.members)
        return functools.reduce(join, members)
    return pattern.tile_map(extent, q_tile, kv_tile).to(device)


@functools.lru_cache(maxsize=64)
def _static_states(
    pattern: Pattern, extent: Extent, q_tile: int, kv_tile: int, device: torch.device
) -> Tensor:
    return pattern.tile_map(extent, q_tile, kv_tile).to(device)


def walk_lists(
    pattern: Pattern,
    extent: Extent,
    q_tile: int,
    kv_tile: int,
    heads: int,
    device: torch.device,
    by_key: bool = False,
) -> WalkLists:
    """The lists of a pattern; for one that depends on data no host synchronisation.

    q_tile and kv_tile divide `pattern.tile_unit()`, if it has one.  A last tile of columns that the
    sequence does not fill is tested.
    """
    states = tile_states(pattern, extent, q_tile, kv_tile, device)
    states = states.reshape(*(1,) * (4 - states.dim()), *states.shape)
    length, tile = (extent.Lq, q_tile) if by_key else (extent.Lk, kv_tile)
    if by_key:
        states = states.transpose(-1, -2)
    if length % tile:
        states = torch.cat([states[..., :-1], states[..., -1:].clamp(max=PARTIAL)], dim=-1)
    words = walk_words(states, WalkLists.HEADER)
    return WalkLists(q_tile, kv_tile, words, heads // states.shape[1])


def in_tile_order(lists: WalkLists) -> WalkLists:
    """The same lists, the rows of each in the order of the tiles of rows."""
    order = torch.argsort(lists.words[..., :1], dim=2)
    words = lists.words.gather(2, order.expand_as(lists.words))
    return dataclasses.replace(lists, words=words)
