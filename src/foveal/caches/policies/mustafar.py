"""Mustafar: every token stays, with the largest of its elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveal._errors import SelectionError
from foveal.caches.policies.base import Counts, Decision, Policy, Reading, Vote


@dataclass(frozen=True, kw_only=True)
class Mustafar(Policy):
    """Drops the elements of smallest magnitude of every key and value, token by token.

    Of D elements D - floor(sparsity D) stay, as packed values and a bitmap of D bits.  The last
    `recent` tokens stay dense; tokens are pruned in groups of `group`, behind the prompt and while
    tokens are generated.
    Options: budget, the tokens that would take as much memory: no token is dropped, and sparsity follows
    from what dense tokens, at most half of the budget, and bitmaps leave; or sparsity itself, 0 <= s < 1.
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
        bitmap = torch.tensor(1 / (8 * reading.k.element_size()))  # of the bytes of a whole row
        return Vote(reading.age.float(), reading.real, reading.age, bitmap)

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        return [self._pruned(vote, self.tokens(seen), seen) for vote in votes]

    def _pruned(self, vote: Vote, budget: int, seen: int) -> Decision:
        sparsity, recent = self.sparsity, self.recent
        if sparsity is None:
            assert vote.statistic is not None
            recent = min(recent, budget // 2)
            share = (budget - recent) / max(seen - recent, 1)
            sparsity = 0.0 if share >= 1 else min(1 - share + float(vote.statistic), 1 - 2**-20)
        if sparsity == 0:
            return Decision(vote.real)
        return Decision(vote.real, reduced=vote.real & (vote.age >= recent), sparsity=sparsity)
