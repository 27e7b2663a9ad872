"""PagedEviction: whole pages leave, by the norms of their keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveal.caches.policies.base import Counts, Decision, Policy, Reading, Vote, largest, protect
from foveal.caches.policies.statistics import wide


@dataclass(frozen=True, kw_only=True)
class PagedEviction(Policy):
    """Drops the tokens, and later the pages, of smallest |v_j| / |k_j|, mean over the heads.

    Behind the prompt the tokens of smallest score go before pages are filled; while tokens are
    generated, each time a page is full the page of smallest mean score goes.  All heads keep the same
    tokens, so one page table serves them.
    Options: page_size >= 1 tokens; the newest page always stays.
    Paper: PagedEviction: Structured Block-wise KV Cache Pruning (2509.04377).
    """

    page_size: int = 16

    def due(self, counts: Counts) -> bool:
        over = counts.stored - self.tokens(counts.seen)
        return over > 0 if counts.read > 1 else over >= self.page_size

    def vote(self, reading: Reading) -> Vote:
        k, v = (wide(x).norm(dim=-1).transpose(1, 2) for x in (reading.k, reading.v))
        scores = (v / k.clamp(min=1e-12)).mean(1, keepdim=True).expand_as(reading.real)
        recent = reading.age < self.page_size
        generated = torch.tensor(float(reading.q.shape[1] == 1))
        return Vote(protect(scores, recent, reading.real), reading.real, reading.age, generated)

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        return [Decision(self._kept(vote, self.tokens(seen))) for vote in votes]

    def _kept(self, vote: Vote, budget: int) -> torch.Tensor:
        if vote.statistic is None or not bool(vote.statistic):
            return largest(vote.scores, budget)
        size = self.page_size
        length = vote.scores.shape[-1]
        padding = (0, -length % size)
        known = torch.nn.functional.pad(vote.real, padding).unflatten(-1, (-1, size))
        scores = vote.scores.masked_fill(~vote.real, 0.0)
        pages = torch.nn.functional.pad(scores, padding).unflatten(-1, (-1, size))
        mean = pages.sum(-1) / known.sum(-1).clamp(min=1)
        mean = mean.masked_fill(~known.any(-1), -torch.inf)
        count = -(-vote.real.sum(-1) // size)
        excess = (vote.real.sum(-1) - budget).clamp(min=0) // size
        stay = largest(mean, count - excess)
        return stay.repeat_interleave(size, dim=-1)[..., :length] & vote.real
