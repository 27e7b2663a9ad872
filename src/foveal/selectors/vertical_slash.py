"""Columns and diagonals of the last queries' attention, as unaligned blocks with columns beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import SelectionError
from foveal.patterns.selections import ColumnSelection
from foveal.selectors.last_queries import LastQueries

# Pairs of a tile and a distance, or a column, that are worked on at once.
_AT_ONCE = 1 << 25


@dataclass(frozen=True, slots=True)
class VerticalSlash:
    """The `vertical` heaviest key columns and the `slash` heaviest distances, per query head.

    Masses are those of the softmax of the last `queries` queries; the first `sinks` columns and the
    `local` smallest distances are always among them, as many as there is room for.  For the tile of
    `tile` queries from m on, distance o covers the keys m - o ... m - o + tile - 1; runs that touch are
    joined and rounded up to whole blocks of `tile` keys; columns inside a block are dropped.
    Limits: 30 <= vertical and 50 <= slash are what the paper searches; both are cut to the length.
    Paper: MInference (2407.02490).
    """

    vertical: int = 1000
    slash: int = 6096
    queries: int = 64
    sinks: int = 30
    local: int = 100
    tile: int = 64

    def __post_init__(self) -> None:
        for name in ("vertical", "slash", "queries", "tile"):
            if getattr(self, name) < 1:
                raise SelectionError(name, getattr(self, name), "at least 1 is needed")
        for name in ("sinks", "local"):
            if getattr(self, name) < 0:
                raise SelectionError(name, getattr(self, name), "at least 0 is needed")

    def select(self, q: Tensor, k: Tensor) -> ColumnSelection:
        """The lists of q [B, L, Hq, D] on k [B, L, Hkv, D], one per tile and query head."""
        if q.shape[1] != k.shape[1]:
            raise SelectionError("q", list(q.shape), f"as many queries as keys, {k.shape[1]}")
        with torch.no_grad():
            columns, offsets = LastQueries(self.queries).columns_and_offsets(q.detach(), k.detach())
            columns[..., : min(self.sinks, self.vertical)] = torch.inf
            offsets[..., : min(self.local, self.slash)] = torch.inf
            chosen = columns.topk(min(self.vertical, k.shape[1])).indices.sort(-1).values
            distances = offsets.topk(min(self.slash, k.shape[1])).indices.sort(-1, descending=True)
            heads = self._lists(chosen.flatten(0, 1), distances.values.flatten(0, 1), k.shape[1])
        starts, rest = (x.unflatten(0, q.shape[:3:2]) for x in heads)
        return ColumnSelection(starts, rest, self.tile, self.tile)

    def _lists(self, columns: Tensor, distances: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Starts [N, tiles, slash] and columns [N, tiles, vertical], int32, -1 at the end, of N heads."""
        tiles = -(-length // self.tile)
        at_once = max(1, _AT_ONCE // (tiles * max(columns.shape[1], distances.shape[1])))
        pairs = zip(columns.split(at_once), distances.split(at_once), strict=True)
        starts, rest = zip(*(self._of_heads(*pair, length) for pair in pairs), strict=True)
        return torch.cat(starts), torch.cat(rest)

    def _of_heads(self, columns: Tensor, distances: Tensor, length: int) -> tuple[Tensor, Tensor]:
        tile = self.tile
        columns, distances = columns.to(torch.int32), distances.to(torch.int32)
        first = torch.arange(0, length, tile, device=columns.device, dtype=torch.int32)[:, None]
        last = (first + tile).clamp(max=length) - 1
        start = first - distances[:, None]  # ascending
        stop = start + tile
        there = stop > 0
        before = torch.nn.functional.pad(stop[..., :-1], (1, 0), value=-1)
        joined = start.clamp(min=0) <= torch.where(before > 0, before, -1)
        begin = torch.where(joined | ~there, 0, start.clamp(min=0)).cummax(-1).values
        blocks = (stop - begin + tile - 1) // tile
        opened = (before - begin + tile - 1) // tile
        opens = there & (~joined | (blocks > opened))
        place = begin + (blocks - 1) * tile
        starts = _kept(place, opens & (place <= last))
        column = columns[:, None].expand(-1, len(first), -1)
        ordered = torch.where(starts < 0, length, starts)
        inside = torch.searchsorted(ordered, column.contiguous(), right=True)
        under = ordered.gather(-1, (inside - 1).clamp(min=0))
        covered = (inside > 0) & (column < under + tile)
        return starts, _kept(column, ~covered & (column <= last))


def _kept(ascending: Tensor, mask: Tensor) -> Tensor:
    """The marked numbers of every row moved to its front, -1 behind them."""
    place = torch.where(mask, mask.cumsum(-1) - 1, ascending.shape[-1])
    found = ascending.new_full((*ascending.shape[:-1], ascending.shape[-1] + 1), -1)
    return found.scatter_(-1, place, ascending)[..., :-1]
