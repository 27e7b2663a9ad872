"""SnapKV: the end of the prompt votes on the rest of it."""

from __future__ import annotations

from dataclasses import dataclass

from foveal.caches.policies.base import Policy, Reading, Vote, protect
from foveal.caches.policies.statistics import per_kv_head, smooth, window_weights


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keeps the tokens that the last `window` queries of the prompt attend to, and the window.

    a_j = mean over the group of sum_{i in window} P_ij, then the mean over `pool` neighbours before the
    window; every key head keeps its own budget - window tokens of largest a, once behind the prompt.
    Tokens that are generated are never dropped.
    Options: window >= 1 queries; pool, an odd number of tokens.
    Equals: budget of at least the prompt keeps everything.
    Paper: SnapKV: LLM Knows What You are Looking for Before Generation (2404.14469).
    """

    budget: int | float = 2048
    window: int = 32
    pool: int = 5

    def vote(self, reading: Reading) -> Vote:
        weights = per_kv_head(window_weights(reading, self.window).sum(2), reading.groups)
        recent = reading.age < self.window
        # The window stays anyway: what it gives itself lends nothing to the tokens before it.
        scores = smooth(weights.masked_fill(recent, 0.0), self.pool)
        return Vote(protect(scores, recent, reading.real), reading.real, reading.age)
