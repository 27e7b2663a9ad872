"""A range of queries against a range of keys: what prefixes and shared documents are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import PatternError
from foveal.patterns.base import Bounds, Extent, Pattern


@dataclass(frozen=True, slots=True, repr=False)
class Rectangle(Pattern):
    """The queries queries[0] <= i < queries[1] see the keys keys[0] <= j < keys[1], the others nothing.

    Options: both are (start, stop) in raster order, 0 <= start <= stop; what lies beyond the grid is
    not there.  Queries are counted by the position of their own key: with Lq != Lk the last query
    stands on the last key.
    Equals: Causal() | Rectangle((0, p), (0, p)) is a prefix of p tokens that see each other, causal
    behind it; Sliding(w, w) | Rectangle((0, L), (0, g)) | Rectangle((0, g), (0, L)) has g global tokens.
    Cost: the area of the rectangle, as a share of Lq Lk, of dense.
    Paper: prefix LM (1910.10683); global tokens: Longformer (2004.05150).
    """

    queries: tuple[int, int]
    keys: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("queries", "keys"):
            ends = getattr(self, name)
            whole = isinstance(ends, tuple) and len(ends) == 2
            if not whole or any(isinstance(n, bool) or not isinstance(n, int) for n in ends):
                raise PatternError(name, ends, "a pair of integers (start, stop) is needed")
            if not 0 <= ends[0] <= ends[1]:
                raise PatternError(name, ends, "0 <= start <= stop is needed")

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        rows = (q_pos >= self.queries[0]) & (q_pos < self.queries[1])
        return rows & (k_pos >= self.keys[0]) & (k_pos < self.keys[1])

    def bounds(self, extent: Extent) -> Bounds:
        first, stop = (min(end, extent.Lk) for end in self.keys)
        q_pos = extent.q_positions()
        lower = torch.where(q_pos < self.queries[1], first, stop)
        upper = torch.where(q_pos >= self.queries[0], stop, first)
        return Bounds(extent.flat(), (lower,), (upper.maximum(lower),))
