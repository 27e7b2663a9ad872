"""S3-Attention: sparse features of keys, an index from features to places, spans by the query's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import SelectionError
from foveal.caches.policies.base import Policy, Reading, Vote, protect
from foveal.caches.policies.statistics import smooth, wide, widen


@dataclass(frozen=True, kw_only=True)
class S3Attention(Policy):
    """Keeps the spans that share sparse features with the end of the prompt.

    z = the `active` largest of ReLU(W k) per key and head; a feature lists the places where it is
    active.  S[t] = sum over the features f of the last `window` queries, coded alike, of
    1[f active at t] w_f log(1 + L / n_f), n_f the places of f; S is the mean of `span` neighbours, its
    local maxima bring their span, and first and newest tokens stay.
    Options: features per element of a head; active features per key; span, odd; sink_tokens, recent.
    The directions W are drawn once from `seed`, unit vectors: the paper trains them.
    Paper: S^3-Attention: Attention-Aligned Endogenous Retrieval (2601.17702).  There the spans are read
    once more by the model; here their keys and values stay as they are.
    """

    features: int = 16
    active: int = 8
    window: int = 16
    span: int = 9
    sink_tokens: int = 4
    recent: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        if self.span % 2 == 0:
            raise SelectionError("span", self.span, "an odd integer is needed")

    def directions(self, head_dim: int) -> Tensor:
        """W [features x head_dim, head_dim]"""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        size = (self.features * head_dim, head_dim)
        drawn = torch.randn(size, generator=generator, device="cpu")
        return torch.nn.functional.normalize(drawn, dim=-1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Strengths and numbers of the active features of x [..., D], both [..., active]."""
        w = self.directions(x.shape[-1]).to(wide(x))
        found = (wide(x) @ w.T).relu().topk(min(self.active, len(w)), dim=-1)
        return found.values, found.indices

    def vote(self, reading: Reading) -> Vote:
        keys = reading.k.transpose(1, 2)  # [B, Hkv, L, D]
        queries = reading.q[:, -self.window :].transpose(1, 2)
        queries = queries.unflatten(1, (-1, reading.groups)).flatten(2, 3)
        strengths, numbers = self.encode(keys)
        count = self.features * keys.shape[-1]
        lit = (strengths > 0) & reading.real[..., None]
        places = strengths.new_zeros(*keys.shape[:2], count)
        places.scatter_add_(-1, numbers.flatten(2), lit.to(places.dtype).flatten(2))
        asked = torch.zeros_like(places)
        values, wanted = self.encode(queries)
        asked.scatter_add_(-1, wanted.flatten(2), values.flatten(2))
        rare = torch.log1p(reading.lengths[..., None] / places.clamp(min=1))
        weight = (asked * rare).gather(-1, numbers.flatten(2)).view(numbers.shape)
        scores = smooth((weight * lit).sum(-1), self.span)
        peaks = torch.where(scores >= widen(scores, self.span), scores, 0.0)
        first = reading.lengths[..., None] - 1 - reading.age
        always = (first < self.sink_tokens) | (reading.age < self.recent)
        ranked = widen(peaks, self.span) + 1e-6 * scores
        return Vote(protect(ranked, always, reading.real), reading.real, reading.age)
