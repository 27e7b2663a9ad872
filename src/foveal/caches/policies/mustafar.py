"""Mustafar: every token stays, with the largest of its elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveal._errors import SelectionError
from foveal.caches.policies.base import Counts, Decision, Policy, Reading, Vote


@dataclass(frozen=True, kw_only=True)
class Mustafar(Policy):
    """Drops the elements of smallest magnitude of every key and value, token by token.

    Of D elements D - floor(sparsity D) stay, as packed values and a bitmap of D bits.  The last
    `recent` tokens stay dense; tokens are pruned in groups of `group`, behind the prompt and while
    tokens are generated.
    Options: sparsity, 0 <= s < 1; budget: unused tokens are never dropped, it is the length up to
    which nothing is pruned.
    Equals: sparsity 0 is no policy.
    Paper: Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference (2505.22913).
    """

    budget: int | float = 32
    sparsity: float = 0.7
    recent: int = 32
    group: int = 256

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        if not 0 <= self.sparsity < 1:
            raise SelectionError(
                "sparsity", self.sparsity, "a share of at least 0, under 1, is needed"
            )

    def due(self, counts: Counts) -> bool:
        if counts.stored <= self.tokens(counts.seen):
            return False
        return counts.read > 1 or (counts.seen - self.recent) % self.group == 0

    def vote(self, reading: Reading) -> Vote:
        return Vote(reading.age.float(), reading.real, reading.age)

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        if self.sparsity == 0:
            return [Decision(vote.real) for vote in votes]
        return [
            Decision(v.real, reduced=v.real & (v.age >= self.recent), sparsity=self.sparsity)
            for v in votes
        ]
