"""A window of fixed reach around each query, in raster order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveal._errors import PatternError
from foveal.patterns.base import Bounds, Extent, Pattern
from foveal.patterns.dense import Causal, Dense
from foveal.patterns.grid import FAR


@dataclass(frozen=True, slots=True, repr=False)
class Sliding(Pattern):
    """Query i sees keys j with i - left <= j <= i + right, and the first `sink_tokens` keys j <= i + right.

    Options: left, right >= 0 tokens beside the query's own; sink_tokens >= 0 first keys that stay
    visible however far away (never beyond the right end of the window).
    Equals: Sliding(left=Lk) is Causal(); Sliding(left=Lk, right=Lk) is Dense().
    Cost: (left + right + 1 + sink_tokens) / Lk of dense.
    Paper: Longformer (2004.05150); sink tokens: StreamingLLM (2309.17453).
    """

    left: int
    right: int = 0
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("left", "right", "sink_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise PatternError(name, value, "an integer of at least 0 is needed")

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        left, right = min(self.left, FAR), min(self.right, FAR)
        near = (k_pos >= q_pos - left) & (k_pos <= q_pos + right)
        if not self.sink_tokens:
            return near
        return near | ((k_pos < min(self.sink_tokens, FAR)) & (k_pos <= q_pos + right))

    def simplify(self, extent: Extent) -> Pattern:
        reaches_first = self.left + self.sink_tokens >= extent.Lk - 1
        if not reaches_first:
            return self
        if self.right >= extent.Lq - 1:
            return Dense()
        return Causal() if self.right == 0 else Sliding(extent.Lk, self.right)

    def bounds(self, extent: Extent) -> Bounds | None:
        if self.sink_tokens:
            return None
        q_pos = extent.q_positions()
        left, right = min(self.left, FAR), min(self.right, FAR)
        upper = (q_pos + right + 1).clamp(0, extent.Lk)
        lower = (q_pos - left).clamp(min=0)
        return Bounds(extent.flat(), (lower.minimum(upper),), (upper,))

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        window = Sliding(self.left, self.right)
        if not self.sink_tokens:
            return window._interval_map(extent, q_tile, kv_tile)
        first = _FirstKeys(self.sink_tokens) & Sliding(extent.Lk, self.right)
        return (window | first).tile_map(extent, q_tile, kv_tile)

    def _interval_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        bounds = self.bounds(extent)
        assert bounds is not None
        return bounds.tile_counts(0, q_tile, kv_tile)


@dataclass(frozen=True, slots=True, repr=False)
class _FirstKeys(Pattern):
    """Every query sees the first `count` keys."""

    count: int

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        return (k_pos < min(self.count, FAR)) & (q_pos == q_pos)

    def bounds(self, extent: Extent) -> Bounds:
        zero = extent.q_positions() * 0
        return Bounds(extent.flat(), (zero,), (zero + min(self.count, extent.Lk),))
