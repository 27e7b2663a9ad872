"""ARKV: a token is kept, kept in 8 bits, or dropped; how many of which is up to the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveal._arguments import finite
from foveal._errors import SelectionError
from foveal.caches.policies.base import Counts, Decision, Policy, Reading, Vote, largest, protect
from foveal.caches.policies.statistics import per_kv_head, smooth, window_weights


@dataclass(frozen=True, kw_only=True)
class ARKV(Policy):
    """Keeps the best tokens in full, the next in 8 bits (e4m3, one scale per token), drops the rest.

    Score: mean over the last `window` rows of P, plus variance_weight times their variance, mean over
    `pool` neighbours, mean over the group; the window stays in full.  A layer keeps the share
    r_l = OQ_l / max OQ of its budget in full, OQ = H^(1/t1) Var^(1/t2) Kurt^(1/t3) with the entropy,
    the variance and the kurtosis of the window's attention.  It acts behind the prompt and whenever
    more than the budget is stored; then `retain` of the budget stays.
    Options: window, pool (odd), variance_weight, temperatures (t1, t2, t3), retain, 0 < retain <= 1.
    Paper: ARKV: Adaptive and Resource-Efficient KV Cache Management under Limited Memory Budget
    (2026; number not established); there 75 % of the past is kept at each compaction.
    """

    scope: ClassVar[str] = "network"
    window: int = 32
    pool: int = 5
    variance_weight: float = 0.0
    temperatures: tuple[float, float, float] = (1.0, 1.0, 1.0)
    retain: float = 0.75

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        t = self.temperatures
        if (
            not isinstance(t, tuple | list)
            or len(t) != 3
            or not all(finite(x) and x > 0 for x in t)
        ):
            raise SelectionError("temperatures", t, "three numbers above 0 are needed")

    def due(self, counts: Counts) -> bool:
        return counts.stored > self.tokens(counts.seen)

    def vote(self, reading: Reading) -> Vote:
        rows = window_weights(reading, self.window)
        scores = rows.mean(2)
        if rows.shape[2] > 1:
            scores = scores + self.variance_weight * rows.var(2)
        scores = smooth(per_kv_head(scores, reading.groups), self.pool)
        recent = reading.age < self.window
        quality = self._quality(rows.mean(2), reading)
        return Vote(protect(scores, recent, reading.real), reading.real, reading.age, quality)

    def _quality(self, mean: Tensor, reading: Reading) -> Tensor:
        """OQ of a layer, one number per sequence [B]."""
        t1, t2, t3 = self.temperatures
        entropy = -(mean * mean.clamp(min=1e-30).log()).sum(-1)
        count = reading.lengths.sum(1).clamp(min=1) / reading.lengths.shape[1]
        spread = (mean - (1 / count)[:, None, None]).masked_fill(~reading.real[:, :1], 0.0)
        variance = spread.square().sum(-1) / count[:, None]
        kurtosis = spread.pow(4).sum(-1) / count[:, None] / variance.square().clamp(min=1e-30)
        each = entropy ** (1 / t1) * variance ** (1 / t2) * kurtosis ** (1 / t3)
        return each.mean(1)

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        budget = self.tokens(seen)
        qualities = torch.stack([v.statistic for v in votes if v.statistic is not None], dim=1)
        shares = qualities / qualities.amax(1, keepdim=True).clamp(min=1e-30)
        decisions = []
        for vote, share in zip(votes, shares.unbind(1), strict=True):
            full_prompt = vote.real.sum(-1).amax() > 2 * budget
            total = budget if bool(full_prompt) else max(1, int(self.retain * budget))
            kept = largest(vote.scores, total)
            past = max(total - self.window, 0)
            own = self.window + (share * past).long()
            full = largest(vote.scores, own[:, None].expand(vote.scores.shape[:2]))
            decisions.append(Decision(kept, reduced=kept & ~full))
        return decisions
