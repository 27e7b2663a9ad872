"""ScaleKV: layers that draft keep many tokens of earlier image scales, layers that refine few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.caches.policies.base import Decision, Policy, Reading, Vote, largest, protect
from foveal.caches.policies.statistics import per_kv_head, row_weights, widen


@dataclass(frozen=True, kw_only=True)
class ScaleKV(Policy):
    """Behind every image scale, keeps what 16 queries of its map attend to, and those 16 tokens.

    The queries of the call are the map of one scale, side x side in raster order; the observers are the
    centres of its 4 x 4 cells (all queries of a smaller map, 16 evenly spaced ones of a call that is no
    square).  Score: sum over the observers of P, mean over the group, the largest of `pool` neighbours;
    attention has no direction.
    Options: drafters, numbers of the layers that keep `ratio` times as many tokens as the others; the
    mean over the layers is the budget.  pool is odd, ratio >= 1.
    Paper: Memory-Efficient Visual Autoregressive Modeling with Scale-Aware KV Cache Compression
    (2505.19602).
    """

    drafters: tuple[int, ...] = ()
    ratio: float = 4.0
    pool: int = 5

    def capacity(self, layer: int, layers: int, seen: int) -> int:
        """Tokens that a layer keeps per head."""
        drafters = len({n for n in self.drafters if n < layers})
        unit = self.tokens(seen) * layers / (layers + drafters * (self.ratio - 1))
        return max(1, round(unit * (self.ratio if layer in self.drafters else 1.0)))

    def vote(self, reading: Reading) -> Vote:
        rows = self.observers(reading.q.shape[1]).to(reading.q.device)
        weights = row_weights(reading, reading.q[:, rows])
        scores = widen(per_kv_head(weights.sum(2), reading.groups), self.pool)
        ages = reading.q.shape[1] - 1 - rows
        observed = torch.isin(reading.age, ages)
        layer = torch.tensor([reading.layer, reading.layers])
        return Vote(protect(scores, observed, reading.real), reading.real, reading.age, layer)

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        decisions = []
        for vote in votes:
            assert vote.statistic is not None
            layer, layers = vote.statistic.tolist()
            decisions.append(Decision(largest(vote.scores, self.capacity(layer, layers, seen))))
        return decisions

    @staticmethod
    def observers(length: int) -> Tensor:
        """Places of the observers in a map of `length` tokens."""
        side = int(length**0.5)
        if side < 4 or side * side != length:
            spread: Tensor = torch.linspace(0, length - 1, min(16, length)).round().long().unique()
            return spread
        centres = ((torch.arange(4) * 2 + 1) * side) // 8
        places: Tensor = (centres[:, None] * side + centres).flatten()
        return places
