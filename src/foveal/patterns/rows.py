"""An interval of keys per query, as given."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveal._arguments import need_tensors
from foveal._errors import PatternError
from foveal.patterns.base import Bounds, Extent, Pattern


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Rows(Pattern):
    """Query i (the i-th given, whatever its position) sees keys j with lower[i] <= j < upper[i].

    Shapes: lower, upper int64 [Lq], ends on 0 ... Lk; kept as copies and compared by content.
    Equals: lower 0 and upper i + 1 is Causal().  Cost: sum(upper - lower) / (Lq Lk) of dense.
    Limits: a sequence (grids are read in raster order); intervals whose ends never decrease run as
    intervals, others by a tile map, which is made from the ends alone.
    """

    lower: Tensor
    upper: Tensor
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        need_tensors(lower=self.lower, upper=self.upper)
        for name in ("lower", "upper"):
            ends = getattr(self, name)
            if ends.dim() != 1 or ends.is_floating_point() or len(ends) != len(self.lower):
                raise PatternError(name, list(ends.shape), "integers [Lq] are needed for both ends")
            kept = ends.detach().to("cpu", torch.int64, copy=True).contiguous()
            object.__setattr__(self, name, kept)
        object.__setattr__(self, "upper", self.upper.maximum(self.lower))
        content = self.lower.numpy().tobytes() + self.upper.numpy().tobytes()
        object.__setattr__(self, "digest", hashlib.sha1(content).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def key(self) -> str:
        return f"Rows({len(self.lower)} #{self.digest[:8]})"

    def validate(self, extent: Extent) -> None:
        if len(self.lower) != extent.Lq:
            raise PatternError(
                "lower", len(self.lower), f"an end for {extent.Lq} queries is needed"
            )
        outside = (self.lower < 0) | (self.upper > extent.Lk)
        if bool(outside.any()):
            raise PatternError(
                "upper", int(self.upper.max()), f"ends on 0 ... {extent.Lk} are needed"
            )

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        query = q_pos - (extent.Lk - extent.Lq)
        return (k_pos >= self.lower[query]) & (k_pos < self.upper[query])

    def bounds(self, extent: Extent) -> Bounds | None:
        if any(bool((ends.diff() < 0).any()) for ends in (self.lower, self.upper)):
            return None
        return Bounds(extent.flat(), (self.lower,), (self.upper,))

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        if self.bounds(extent) is not None:
            return Pattern.tile_map(self, extent, q_tile, kv_tile)
        tiles = -(-extent.Lk // kv_tile)
        stop = torch.where(self.upper == extent.Lk, tiles, self.upper // kv_tile)
        begin = torch.div(self.lower + kv_tile - 1, kv_tile, rounding_mode="floor")
        touched = self._counted(self.lower // kv_tile, -(-self.upper // kv_tile), tiles, q_tile)
        covered = self._counted(begin, stop, tiles, q_tile)
        rows = torch.full((len(touched), 1), q_tile)
        rows[-1] = len(self.lower) - q_tile * (len(touched) - 1)
        return (touched > 0).to(torch.uint8) + (covered == rows).to(torch.uint8)

    def _counted(self, first: Tensor, stop: Tensor, tiles: int, q_tile: int) -> Tensor:
        """How many rows of each query tile have tile t with first <= t < stop.  [q tiles, tiles]"""
        some = (self.upper > self.lower) & (stop > first)
        owner = (torch.arange(len(first)) // q_tile)[some]
        change = torch.zeros(-(-len(first) // q_tile), tiles + 1, dtype=torch.int64)
        one = torch.ones(len(owner), dtype=torch.int64)
        change.index_put_((owner, first[some]), one, accumulate=True)
        change.index_put_((owner, stop[some]), -one, accumulate=True)
        return change.cumsum(1)[:, :-1]
