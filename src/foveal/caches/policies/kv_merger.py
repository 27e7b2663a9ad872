"""KVMerger: runs of like keys become one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.caches.policies.base import Decision, Merge, Policy, Reading, Vote, largest
from foveal.caches.policies.statistics import attention_sums, per_kv_head, wide


@dataclass(frozen=True, kw_only=True)
class KVMerger(Policy):
    """Merges neighbouring tokens whose keys point the same way, with Gaussian weights.

    Of the pairs of neighbours, those of largest cosine of k_j, k_j+1 are joined until the budget is
    met; a run of joined tokens is a set.  Its pivot p has the largest accumulated attention, and
    g_i = exp(-|k_i - k_p|^2 / 2 sigma^2), w = g / sum g, k_p <- sum w_i k_i, v_p <- sum w_i v_i.
    Tokens of largest accumulated attention (`heavy` of the budget) and the newest (`recent` of it) are
    never merged.
    Options: heavy, recent, shares of the budget; sigma, default the mean distance to the pivot in a set.
    Equals: sets of equal keys and values leave attention to them unchanged but for their count.
    Paper: Model Tells You Where to Merge (2407.08454); sigma there is circular as read, and the scaling
    of values by the size of a set is not established.
    """

    heavy: float = 0.25
    recent: float = 0.25
    sigma: float | None = None

    def vote(self, reading: Reading) -> Vote:
        mass = per_kv_head(attention_sums(reading), reading.groups)
        k = wide(reading.k).transpose(1, 2)  # [B, Hkv, L, D]
        return Vote(mass.masked_fill(~reading.real, -torch.inf), reading.real, reading.age, k)

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        return [self._merged(vote, self.tokens(seen)) for vote in votes]

    def _merged(self, vote: Vote, budget: int) -> Decision:
        k, real = vote.statistic, vote.real
        assert k is not None
        single = largest(vote.scores, int(self.heavy * budget))
        single = single | (vote.age < max(1, int(self.recent * budget)))
        cosine = torch.nn.functional.cosine_similarity(k[..., 1:, :], k[..., :-1, :], dim=-1)
        apart = single[..., 1:] | single[..., :-1] | ~real[..., 1:] | ~real[..., :-1]
        excess = (real.sum(-1) - budget).clamp(min=0)
        joined = largest(cosine.masked_fill(apart, -torch.inf), excess)
        starts = torch.nn.functional.pad(~joined, (1, 0), value=True)
        run = starts.cumsum(-1) - 1  # the set of every token
        pivot = _pivots(vote.scores, run)
        owner = pivot.gather(-1, run)
        distance = (k - k.gather(-2, owner[..., None].expand_as(k))).norm(dim=-1)
        spread = self._spread(distance, run)
        g = torch.exp(-(distance / spread).square() / 2).masked_fill(~real, 0.0)
        weights = g / torch.zeros_like(g).scatter_add_(-1, run, g).gather(-1, run).clamp(min=1e-30)
        places = torch.arange(run.shape[-1], device=run.device)
        keep = (owner == places) & real
        left = keep.sum(-1) - budget
        if bool((left > 0).any()):  # fewer like neighbours than the budget asks for
            keep = largest(
                vote.scores.masked_fill(~keep, -torch.inf).masked_fill(
                    keep & (vote.age == 0), torch.inf
                ),
                budget,
            )
        return Decision(keep, merge=Merge(owner, weights))

    def _spread(self, distance: Tensor, run: Tensor) -> Tensor:
        if self.sigma is not None:
            return torch.full_like(distance, self.sigma)
        zero = torch.zeros_like(distance)
        sums = zero.scatter_add(-1, run, distance)
        sizes = zero.scatter_add(-1, run, torch.ones_like(distance))
        mean = sums / (sizes - 1).clamp(min=1)  # the pivot itself is at distance 0
        return mean.gather(-1, run).clamp(min=1e-6)


def _pivots(scores: Tensor, run: Tensor) -> Tensor:
    """The token of largest score in every set: [B, Hkv, L], by number of the set."""
    best = torch.full_like(scores, -torch.inf).scatter_reduce_(-1, run, scores, "amax")
    is_best = scores == best.gather(-1, run)
    places = torch.arange(run.shape[-1], device=run.device).expand_as(run)
    last = torch.full_like(run, -1)
    return last.scatter_reduce_(-1, run, torch.where(is_best, places, -1), "amax").clamp(min=0)
