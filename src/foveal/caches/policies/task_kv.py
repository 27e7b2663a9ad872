"""Task-KV: heads far from the mean of their layer keep everything, the others a skeleton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.caches.policies.base import Decision, Policy, Reading, Vote, largest, protect
from foveal.caches.policies.statistics import per_kv_head, smooth, wide, window_weights


@dataclass(frozen=True, kw_only=True)
class TaskKV(Policy):
    """Splits the key heads of a layer by how far their output vector is from the mean of all heads.

    C = mean over the window of P, I the `top` largest of C, v'_h = C[I] V[I]; the distance is |v'_h -
    mean over h|.  Of n heads the f farthest and the nearest one keep all; the rest share what is left
    of n budget: `sink_tokens` first, `recent` newest, and the middle tokens of largest pooled C.
    f falls linearly from n b in the first layer to m in the last, and is no larger than the budget of
    the layer allows.
    Options: share b of the heads, least m heads, top, window, pool (odd), sink_tokens, recent.
    Paper: Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads
    (2501.15113); there b = 0.25 and m = 4 for Llama-2, b = 0.3 and m = 1 for Mistral.
    """

    share: float = 0.25
    least: int = 1
    top: int = 256
    window: int = 32
    pool: int = 7
    sink_tokens: int = 16
    recent: int = 256

    def vote(self, reading: Reading) -> Vote:
        mean = per_kv_head(window_weights(reading, self.window).mean(2), reading.groups)
        chosen = mean * largest(mean.masked_fill(~reading.real, -torch.inf), self.top)
        vectors = torch.einsum("bhl,blhd->bhd", chosen, wide(reading.v))
        distance = (vectors - vectors.mean(1, keepdim=True)).norm(dim=-1)  # [B, Hkv]
        place = reading.layer / max(reading.layers - 1, 1)
        heads = distance.shape[1]
        wanted = heads * self.share - (heads * self.share - self.least) * place
        statistic = torch.cat([distance, torch.full_like(distance[:, :1], round(wanted))], dim=1)
        scores = smooth(mean, self.pool).masked_fill(~reading.real, -torch.inf)
        return Vote(scores, reading.real, reading.age, statistic)

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        return [Decision(self._kept(vote, self.tokens(seen))) for vote in votes]

    def _kept(self, vote: Vote, budget: int) -> Tensor:
        assert vote.statistic is not None
        distance, wanted = vote.statistic[:, :-1], int(vote.statistic[0, -1])
        heads = distance.shape[1]
        longest = int(vote.real.sum(-1).max())
        least = min(budget, self.sink_tokens + 1)
        affordable = (heads * budget - heads * least) // max(longest - least, 1)
        whole = max(0, min(wanted + 1, affordable, heads))
        full = largest(distance, max(whole - 1, 0))
        if whole > 0:
            full = full | largest((-distance).masked_fill(full, -torch.inf), 1)
        rest = (heads * budget - whole * longest) // max(heads - whole, 1)
        sinks = min(self.sink_tokens, rest // 2)
        recent = min(self.recent, (rest - sinks + 1) // 2)
        places = torch.arange(vote.scores.shape[-1], device=vote.scores.device)
        always = (places < sinks) | (vote.age < recent)
        kept = largest(protect(vote.scores, always, vote.real), rest)
        return torch.where(full[..., None], vote.real, kept)
