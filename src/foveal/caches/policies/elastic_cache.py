"""Elastic-Cache: a diffusion language model recomputes keys and values where attention drifts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import SelectionError
from foveal.patterns import Dense


@dataclass(frozen=True)
class DiffusionLayer:
    """One layer of a network without direction: project(x) gives q, k, v; finish(x, o) what comes out.

    Shapes: x [B, L, dim]; q [B, L, Hq, D], k and v [B, L, Hkv, .]; o [B, L, Hq, Dv].
    """

    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    finish: Callable[[Tensor, Tensor], Tensor]


@dataclass
class ElasticState:
    """Inputs, keys and values of every layer, and how its most attended token was seen."""

    inputs: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    tracked: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    recomputed: int = 0

    def bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.numel() * x.element_size() for x in (*self.k, *self.v))


@dataclass(frozen=True)
class ElasticCache:
    """Runs a network on a few active tokens, the keys and values of all others from a cache.

    Every layer tracks T, the token with the largest sum of attention.  When, at layer l, the cosine of
    the attention that the active tokens pay to T now and in the step before falls below `drift`, all
    later layers are recomputed for all tokens, from their stored inputs with the active ones new.
    Options: drift, -1 <= drift <= 1; drift 1 recomputes every step, -1 never.
    Equals: all tokens active is the network itself.
    Paper: Attention Is All You Need for KV Cache in Diffusion LLMs (2510.14973); there 16 tokens are
    active and drift is 0.9.
    """

    drift: float = 0.9

    def __post_init__(self) -> None:
        if not -1 <= self.drift <= 1:
            raise SelectionError("drift", self.drift, "a cosine, -1 to 1, is needed")

    def start(self, layers: Sequence[DiffusionLayer], x: Tensor) -> tuple[Tensor, ElasticState]:
        """The network on all tokens x [B, L, dim], and the state behind it."""
        state = ElasticState()
        everyone = torch.arange(x.shape[1])
        for layer in layers:
            q, k, v = layer.project(x)
            state.inputs.append(x)
            state.k.append(k)
            state.v.append(v)
            tracked, seen = _track(q, k)
            state.tracked.append(tracked)
            state.seen.append(seen)
            x = layer.finish(x, attend(q, k, v, Dense()))
        state.recomputed = len(layers) * len(everyone)
        return x, state

    def step(
        self, layers: Sequence[DiffusionLayer], x: Tensor, active: Tensor, state: ElasticState
    ) -> Tensor:
        """The outputs of the active tokens: x [B, A, dim], their inputs; active int64 [A], their places.

        Returns [B, A, dim]; where a drift made all tokens new, the state holds them all.
        """
        whole = False
        for n, layer in enumerate(layers):
            if not whole:
                state.inputs[n] = state.inputs[n].index_copy(1, active, x)
                q, k, v = layer.project(x)
                state.k[n] = state.k[n].index_copy(1, active, k)
                state.v[n] = state.v[n].index_copy(1, active, v)
                state.recomputed += len(active)
            else:
                state.inputs[n] = x
                q, state.k[n], state.v[n] = layer.project(x)
                state.recomputed += x.shape[1]
            own = q[:, active] if whole else q
            now = _attention_to(own, state.k[n], state.tracked[n])
            before = state.seen[n][:, active]
            alike = torch.nn.functional.cosine_similarity(now, before, dim=1).mean()
            state.seen[n] = state.seen[n].index_copy(1, active, now)
            o = attend(q, state.k[n], state.v[n], Dense())
            out = layer.finish(x, o)
            if not whole and float(alike) < self.drift and n + 1 < len(layers):
                stored = layer.project(state.inputs[n])[0]
                everyone = attend(stored, state.k[n], state.v[n], Dense())
                out = layer.finish(state.inputs[n], everyone)
                whole = True
            x = out
        return x[:, active] if whole else x


def _track(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The most attended token [B], and how much every query attends to it [B, L]."""
    mass = _mass(q, k)
    tracked = mass.sum(1).argmax(-1)
    return tracked, mass.gather(2, tracked[:, None, None].expand(-1, mass.shape[1], 1))[..., 0]


def _attention_to(q: Tensor, k: Tensor, tracked: Tensor) -> Tensor:
    """[B, A]: weight that the queries give to one token per sequence, mean over the heads."""
    mass = _mass(q, k)
    return mass.gather(2, tracked[:, None, None].expand(-1, mass.shape[1], 1))[..., 0]


def _mass(q: Tensor, k: Tensor) -> Tensor:
    """Weights [B, queries, keys], mean over the heads."""
    grouped = q.float().unflatten(2, (k.shape[2], -1))
    products = torch.einsum("bihgd,bjhd->bhgij", grouped, k.float()) * q.shape[-1] ** -0.5
    mass: Tensor = products.softmax(-1).mean((1, 2))
    return mass
