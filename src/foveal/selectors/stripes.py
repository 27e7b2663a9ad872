"""S12: keys at distances that are perfect squares."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import SelectionError
from foveal.selectors.base import Tiling, group_queries


@dataclass(frozen=True, slots=True)
class Stripes:
    """The largest score of the anchors t + 1 - i^n in a block, i > first, for queries t of a tile.

    Shapes: every query has about L^(1/n) anchors; logits are not scaled.
    Options: exponent n, 2 for squares; first i_w: anchors at smaller distances belong to the window
    of (i_w + 1)^n - 1 tokens.
    Paper: Superlinear Multi-Step Attention (2026).
    """

    exponent: float = 2.0
    first: int = 8

    def __post_init__(self) -> None:
        if not (self.exponent >= 1 and math.isfinite(self.exponent)):
            raise SelectionError(
                "exponent", self.exponent, "a finite number of at least 1 is needed"
            )
        if self.first < 0:
            raise SelectionError("first", self.first, "at least 0 is needed")

    def distances(self, length: int, device: torch.device) -> Tensor:
        """i^n - 1 for i > first, rounded down, smaller than the length.  int64 [anchors]"""
        # A sequence shorter than the window has no anchor.
        most = max(int(length ** (1 / self.exponent)) + 2, self.first)
        steps = torch.arange(self.first + 1, most + 1, device=device, dtype=torch.float64)
        found = torch.floor(steps**self.exponent).to(torch.int64) - 1
        result: Tensor = found[found < length].unique()
        return result

    def anchors(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Positions int64 [Lq, anchors], -1 before the first key, and logits [B, Hq, Lq, anchors]."""
        position = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
        place = position[:, None] - self.distances(k.shape[1], q.device)
        place = place.clamp(min=-1)
        rows = k[:, place.clamp(min=0).flatten()].unflatten(1, place.shape)
        logits = torch.einsum("bihgd,biahd->bhgia", group_queries(q, k), rows).flatten(1, 2)
        return place, logits.masked_fill(place < 0, -torch.inf)

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        if not tiling.causal:
            raise SelectionError("causal", False, "anchors stand before their query")
        place, logits = self.anchors(q, k)
        wide = torch.promote_types(q.dtype, torch.float32)
        tile = torch.arange(tiling.Lq, device=q.device) // tiling.q_block
        cell = tile[:, None] * tiling.kv_blocks + place.clamp(min=0) // tiling.kv_block
        shape = *logits.shape[:2], tiling.q_blocks * tiling.kv_blocks
        found = torch.full(shape, -torch.inf, dtype=wide, device=q.device)
        index = cell.flatten().expand(*logits.shape[:2], -1)
        found.scatter_reduce_(-1, index, logits.flatten(2).to(wide), "amax")
        result: Tensor = found.unflatten(-1, (tiling.q_blocks, tiling.kv_blocks))
        return result
