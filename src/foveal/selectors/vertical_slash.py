"""Columns and diagonals of the last queries' attention, as unaligned blocks with columns beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import SelectionError
from foveal.patterns.selections import ColumnSelection
from foveal.selectors.last_queries import LastQueries


@dataclass(frozen=True, slots=True)
class VerticalSlash:
    """The `vertical` heaviest key columns and the `slash` heaviest distances, per query head.

    Masses are those of the softmax of the last `queries` queries; the first `sinks` columns and the
    `local` smallest distances are always among them.  For the tile of `tile` queries from m on, distance
    o covers the keys m - o ... m - o + tile - 1; runs that touch are joined and rounded up to whole blocks
    of `tile` keys; columns inside a block are dropped.
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

    def select(self, q: Tensor, k: Tensor) -> ColumnSelection:
        """The lists of q [B, L, Hq, D] on k [B, L, Hkv, D], one per tile and query head."""
        if q.shape[1] != k.shape[1]:
            raise SelectionError("q", list(q.shape), f"as many queries as keys, {k.shape[1]}")
        with torch.no_grad():
            columns, offsets = LastQueries(self.queries).columns_and_offsets(q.detach(), k.detach())
            columns[..., : self.sinks] = torch.inf
            offsets[..., : self.local] = torch.inf
            chosen = columns.topk(min(self.vertical, k.shape[1])).indices.sort(-1).values
            distances = offsets.topk(min(self.slash, k.shape[1])).indices.sort(-1, descending=True)
            lists = [
                self._of_head(chosen[:, h], distances.values[:, h], k.shape[1])
                for h in range(q.shape[2])
            ]
        starts = torch.stack([each[0] for each in lists], dim=1)
        rest = torch.stack([each[1] for each in lists], dim=1)
        return ColumnSelection(starts, rest, self.tile, self.tile)

    def _of_head(self, columns: Tensor, distances: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Starts [B, tiles, slash] and columns [B, tiles, vertical], int32, -1 at the end."""
        tile = self.tile
        first = torch.arange(0, length, tile, device=columns.device)[:, None]
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
        starts = torch.where(opens & (place <= last), place, length).sort(-1).values
        inside = torch.searchsorted(
            starts, columns[:, None].expand(-1, len(first), -1).contiguous(), right=True
        )
        under = starts.gather(-1, (inside - 1).clamp(min=0))
        column = columns[:, None]
        covered = (inside > 0) & (column < under + tile)
        rest = torch.where(covered | (column > last), length, column).sort(-1).values
        found = (torch.where(x == length, -1, x).to(torch.int32) for x in (starts, rest))
        return next(found), next(found)
