"""FastGen: every head gets the cheapest rule that keeps enough of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.caches.policies.base import Counts, Decision, Policy, Reading, Vote, largest, protect
from foveal.caches.policies.statistics import attention_sums, per_kv_head


@dataclass(frozen=True, kw_only=True)
class FastGen(Policy):
    """Keeps, per key head, the first of nested sets that holds `recovery` of its attention mass.

    Sets, each within the next: special tokens, and punctuation, and the tokens of largest accumulated
    attention, and the newest tokens, and all.
    Frequent and newest tokens are half of the budget each.  Heads that need all of them share what the
    others leave of the budget of the layer, half for their newest tokens; where it suffices that is all.
    The same rule is run again whenever a `period` of generated tokens has come.
    Options: special and punctuation, token numbers, where the reading knows its tokens; the first
    token counts as special; recovery, the share T of the mass, 0 < T <= 1; period >= 1 tokens.
    Paper: Model Tells You What to Discard (2310.01801).  The ratios and T of the paper are not
    established; re-implementations use T of 0.85 to 0.95.
    """

    recovery: float = 0.9
    special: tuple[int, ...] = ()
    punctuation: tuple[int, ...] = ()
    period: int = 64

    def due(self, counts: Counts) -> bool:
        over = counts.stored - self.tokens(counts.seen)
        return over > 0 if counts.read > 1 else over > 0 and counts.seen % self.period == 0

    def vote(self, reading: Reading) -> Vote:
        mass = per_kv_head(attention_sums(reading), reading.groups)
        mass = mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)
        kinds = (
            self._among(reading, self.special) | (reading.age == reading.lengths[..., None] - 1)
        ) & reading.real
        punctuation = self._among(reading, self.punctuation) & reading.real
        return Vote(mass, reading.real, reading.age, torch.stack([kinds, punctuation]))

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        return [Decision(self._kept(vote, self.tokens(seen))) for vote in votes]

    def _kept(self, vote: Vote, budget: int) -> Tensor:
        assert vote.statistic is not None
        special, punctuation = vote.statistic.unbind()
        frequent = largest(vote.scores.masked_fill(~vote.real, -torch.inf), budget // 2)
        newest = (vote.age < budget - budget // 2) & vote.real
        sets = [special, special | punctuation]
        sets.append(sets[-1] | frequent)
        sets.append(sets[-1] | newest)
        kept = vote.real
        for candidate in reversed(sets):
            enough = (vote.scores * candidate).sum(-1, keepdim=True) >= self.recovery
            kept = torch.where(enough, candidate, kept)
        served = ((vote.scores * sets[-1]).sum(-1) >= self.recovery) | (kept != vote.real).any(-1)
        room = budget * kept.shape[1] - (kept.sum(-1) * served).sum(1)
        each = (room // (~served).sum(1).clamp(min=1))[:, None].expand(served.shape)
        near = special | (vote.age < (each // 2)[..., None])
        shared = largest(protect(vote.scores, near & vote.real, vote.real), each)
        return torch.where(served[..., None], kept, shared) | ((vote.age == 0) & vote.real)

    @staticmethod
    def _among(reading: Reading, numbers: tuple[int, ...]) -> Tensor:
        if reading.tokens is None or not numbers:
            return torch.zeros_like(reading.real)
        own = reading.tokens.to(reading.real.device)[:, None].expand(-1, reading.real.shape[1], -1)
        own = own.gather(-1, reading.positions.clamp(0, own.shape[-1] - 1))
        return torch.isin(own, torch.tensor(numbers, device=own.device))
