"""Mustafar: every token stays, with the largest of its elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveal._errors import SelectionError
from foveal.caches.policies.base import Counts, Decision, Policy, Reading, Vote


@dataclass(frozen=True, kw_only=True)
class Mustafar(Policy):
    """Drops the elements of smallest magnitude of every key and value, token by token.

    Of D elements D - floor(sparsity D) stay, as packed values and a bitmap of D bits.  The last
    `recent` tokens stay dense: behind the prompt all others are pruned, while tokens are generated a
    `group` of them at a time.
    Options: budget, the tokens that would take as much memory: no token is dropped, and sparsity follows
    from what `recent` dense tokens, at most half of the budget, and bitmaps leave, in steps of 8
    elements; what a step is too large for goes to more dense tokens.  Or sparsity itself, 0 <= s < 1.
    Limits: a row takes 8 elements and its bitmap at least, so that smaller budgets are not reached.
    Equals: sparsity 0 is no policy.
    Paper: Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference (2505.22913).
    """

    budget: int | float = 0.3
    sparsity: float | None = None
    recent: int = 32
    group: int = 256

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise SelectionError(
                "sparsity", self.sparsity, "a share of at least 0, under 1, is needed"
            )

    def due(self, counts: Counts) -> bool:
        if counts.stored <= self.tokens(counts.seen):
            return False
        return counts.read > 1 or (counts.seen - self.recent) % self.group == 0

    def vote(self, reading: Reading) -> Vote:
        parts = torch.tensor([1 / (8 * reading.k.element_size()), 8 / reading.k.shape[-1]])
        return Vote(reading.age.float(), reading.real, reading.age, parts)

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        return [self._pruned(vote, self.tokens(seen), seen) for vote in votes]

    def _pruned(self, vote: Vote, budget: int, seen: int) -> Decision:
        sparsity, recent = self.sparsity, self.recent
        if sparsity is None:
            assert vote.statistic is not None
            sparsity, recent = self._within(budget, seen, *vote.statistic.tolist())
        if sparsity == 0:
            return Decision(vote.real)
        return Decision(vote.real, reduced=vote.real & (vote.age >= recent), sparsity=sparsity)

    def _within(self, budget: int, seen: int, bitmap: float, eight: float) -> tuple[float, int]:
        """Sparsity and dense tokens; a bitmap and 8 elements are these shares of a row."""
        dense = min(self.recent, budget // 2)
        share = (budget - dense) / max(seen - dense, 1)
        if share >= 1:
            return 0.0, dense
        kept = max(math.floor((share - bitmap) / eight + 2**-20), 1) * eight
        cost = kept + bitmap
        if cost >= 1:
            return 0.0, dense
        recent = math.floor((budget - cost * seen) / (1 - cost) + 2**-20)
        return 1 - kept + 2**-20, max(recent, 1)
