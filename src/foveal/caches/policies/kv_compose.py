"""KVCompose: every head chooses its own tokens, and layers compete for how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveal.caches.policies.base import Decision, Policy, Reading, Vote, largest
from foveal.caches.policies.statistics import per_kv_head, wide, window_weights


@dataclass(frozen=True, kw_only=True)
class KVCompose(Policy):
    """Token j of a layer is composed of each head's j-th best one; the best of all layers stay.

    Per token: the largest weight that one of the last `window` queries gives it, mean over the group,
    plus the mean of that over the heads.  Sorted per head, rank j scores the mean over the heads; the
    layers x budget best ranks of the whole network set how many tokens each layer keeps, and the first
    layer keeps as many as the largest.  The newest token always stays.
    Options: window, the queries that stand for the task; by_norm multiplies these sums by |v_j|.
    Paper: KVCompose: Efficient Structured KV Cache Compression with Composite Tokens (2509.05165).
    There the context is read once more for the scores; here the end of the prompt stands for it.
    """

    scope: ClassVar[str] = "network"
    window: int = 64
    by_norm: bool = False

    def vote(self, reading: Reading) -> Vote:
        scores = per_kv_head(window_weights(reading, self.window).amax(2), reading.groups)
        scores = scores + scores.mean(1, keepdim=True)
        if self.by_norm:
            scores = scores * wide(reading.v).norm(dim=-1).transpose(1, 2)
        scores = scores.masked_fill(reading.age == 0, torch.inf)
        return Vote(scores.masked_fill(~reading.real, -torch.inf), reading.real, reading.age)

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        # The newest token is +inf; a sum over the heads must not become NaN beside a head without it.
        most = torch.finfo(votes[0].scores.dtype).max / max(votes[0].scores.shape[1], 1)
        finite = [vote.scores.clamp(max=most) for vote in votes]
        ranks = torch.nn.utils.rnn.pad_sequence(
            [x.sort(-1, descending=True).values.mean(1).T for x in finite], padding_value=-torch.inf
        ).permute(2, 1, 0)  # [B, layers, L]
        chosen = largest(ranks.flatten(1), len(votes) * self.tokens(seen))
        counts = chosen.view(ranks.shape).sum(-1).clamp(min=1)  # [B, layers]
        counts[:, 0] = counts.amax(1)
        return [
            Decision(largest(vote.scores, counts[:, n, None].expand(vote.scores.shape[:2])))
            for n, vote in enumerate(votes)
        ]
