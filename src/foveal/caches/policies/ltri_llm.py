"""Ltri-LLM: the past in spans of self-contained attention, found again by the query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.caches.policies.base import Counts, Decision, Policy, Reading, Vote
from foveal.caches.policies.statistics import triangle_mass, wide, widen


@dataclass(frozen=True, kw_only=True)
class LtriLLM(Policy):
    """Moves the past to the host in spans, and keeps those at hand that the query votes for.

    A span begins where the triangle of the next `span` queries on their own keys, T_j = sum over i of
    sum_{l=j..i} P_il, is largest among its neighbours (mean over the heads); a span is no longer than
    `longest`.  Its index is its mean key.  Votes: softmax over the spans of scale q.index, mean over
    all heads and the last `window` queries; the best spans are at hand as far as the budget goes,
    beside `sink_tokens` first and `recent` newest tokens.  Chosen anew every `period` generated tokens.
    Nothing is dropped: the device holds the budget, the host the rest.
    Paper: Ltri-LLM: Streaming Long Context Inference for LLMs with Training-Free Dynamic Triangular
    Attention Pattern (2412.04757).  Its formulas are not established; these are ours.
    """

    span: int = 16
    longest: int = 64
    window: int = 16
    sink_tokens: int = 4
    recent: int = 64
    period: int = 8

    def due(self, counts: Counts) -> bool:
        if counts.stored <= self.tokens(counts.seen):
            return False
        return counts.read > 1 or counts.seen % self.period == 0

    def vote(self, reading: Reading) -> Vote:
        spans = self._spans(reading)
        index, sizes = _means(reading, spans)
        q = wide(reading.q[:, -self.window :]).mean(1).unflatten(1, (-1, reading.groups))
        products = torch.einsum("bhgd,bhsd->bhgs", q, index) * reading.scale
        empty = (sizes == 0)[:, :, None]
        votes = products.masked_fill(empty, -torch.inf).softmax(-1).nan_to_num(0.0).mean((1, 2))
        scores = votes[:, None].expand(-1, spans.shape[1], -1).gather(-1, spans)
        return Vote(scores.masked_fill(~reading.real, -torch.inf), reading.real, reading.age, spans)

    def settle(self, votes: Sequence[Vote], seen: int) -> list[Decision]:
        decisions = []
        for vote in votes:
            assert vote.statistic is not None
            at_hand = self._at_hand(vote, vote.statistic, self.tokens(seen))
            idle = vote.real & ~at_hand
            decisions.append(Decision(vote.real, idle=idle, host=True, memo=vote.statistic))
        return decisions

    def _at_hand(self, vote: Vote, spans: Tensor, budget: int) -> Tensor:
        first = vote.real.sum(-1, keepdim=True) - 1 - vote.age
        recent = min(self.recent, max(budget // 2, 1))
        always = ((first < self.sink_tokens) | (vote.age < recent)) & vote.real
        room = budget - always.sum(-1)
        spare = vote.scores.masked_fill(always, -torch.inf)
        order = (spare + 1e-9 * spans).argsort(dim=-1, descending=True, stable=True)
        count = torch.cumsum(spare.gather(-1, order) > -torch.inf, -1)
        taken = (count <= room[..., None]) & (spare.gather(-1, order) > -torch.inf)
        return always | torch.zeros_like(always).scatter_(-1, order, taken)

    def _spans(self, reading: Reading) -> Tensor:
        """The span of every token, int64 [B, Hkv, L], the same for all heads."""
        length = reading.k.shape[1]
        places = torch.arange(length, device=reading.q.device)
        if reading.memo is not None:
            fresh = reading.memo < 0
            after = reading.memo.amax(-1, keepdim=True) + 1
            number = fresh.cumsum(-1) - 1
            return torch.where(fresh, after + number.clamp(min=0) // self.span, reading.memo)
        if reading.q.shape[1] < length:
            return (places // self.span).expand(reading.real.shape).contiguous()
        mass = triangle_mass(reading, self.span).mean(1, keepdim=True)
        begins = (mass >= widen(mass, 2 * (self.span // 2) + 1)) & (mass > 0)
        begins[..., 0] = True
        last = torch.where(begins, places, 0).cummax(-1).values
        begins |= (places - last) % self.longest == 0
        return (begins.cumsum(-1) - 1).expand(reading.real.shape).contiguous()


def _means(reading: Reading, spans: Tensor) -> tuple[Tensor, Tensor]:
    """Mean key of every span [B, Hkv, S, D], and how many tokens it has [B, Hkv, S]."""
    k = wide(reading.k).transpose(1, 2) * reading.real[..., None]
    count = int(spans.max()) + 1
    index = k.new_zeros(*spans.shape[:2], count, k.shape[-1])
    index.scatter_add_(2, spans[..., None].expand_as(k), k)
    sizes = torch.zeros_like(index[..., 0]).scatter_add_(2, spans, reading.real.to(k.dtype))
    return index / sizes.clamp(min=1)[..., None], sizes
