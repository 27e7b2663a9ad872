"""Linear attention by feature maps: the operators of papers and their layers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import RuleError, ShapeError
from foveal._judged import judged, need_shape
from foveal._scan import scan
from foveal.features import (
    FeedForwardFeatures,
    SpectralFeatures,
    contract,
    cosine_reweighted,
    dct_softmax,
    gaussian_quantiles,
    orthogonal_projection,
    positive_random,
    standardised,
    taylor,
    unit,
)
from foveal.layers.state import LayerState, StateLayer, positions, sequences
from foveal.rules import Additive

_NORMALISED = Additive(normalised=True)


def weighted(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, implementation: str | None = None
) -> Tensor:
    """sum_j w_ij v_j / sum_j w_ij with w_ij = q_i . k_j of features, j <= i where causal."""
    if causal:
        return scan(q, k, v, _NORMALISED, scale=1.0, implementation=implementation)
    return over_all(q, k, v, implementation=implementation)


def over_all(
    q: Tensor, k: Tensor, v: Tensor, *, normalised: bool = True, implementation: str | None = None
) -> Tensor:
    """`contract`, of which there is one implementation: RuleError for the name of another."""
    if implementation is not None:
        needed = "None is needed: over all keys two products of matrices are all there is"
        raise RuleError("implementation", repr(implementation), needed)
    return contract(q, k, v, normalised=normalised)


def default_projection(head_dim: int) -> Tensor:
    """D ln D orthogonal random directions, at least D, always the same."""
    features = max(int(head_dim * math.log(head_dim)), head_dim)
    return orthogonal_projection(features, head_dim, generator=torch.Generator().manual_seed(0))


@judged
def performer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    projection: Tensor | None = None,
    causal: bool = False,
    epsilon: float = 1e-4,
    implementation: str | None = None,
) -> Tensor:
    """o_i = sum_j w_ij v_j / sum_j w_ij, w_ij = phi(q_i) . phi(k_j) near exp(q_i . k_j / sqrt(D)).

    phi is `positive_random` on the rows of `projection` [m, D], by default D ln D orthogonal ones.  The
    features of q are scaled per token; those of k per head, but in causal attention, where that would
    look ahead, not at all.
    Shapes: q [B, L, H, D], k and v [B, L, H, .].
    """
    projection = default_projection(q.shape[-1]) if projection is None else projection
    phi_q = positive_random(q, projection, shift="token", epsilon=epsilon)
    shift: Literal["none", "sequence"] = "none" if causal else "sequence"
    phi_k = positive_random(k, projection, shift=shift, epsilon=epsilon)
    return weighted(phi_q, phi_k, v, causal, implementation)


@judged
def cosformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    limit: int | None = None,
    causal: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """o_i = sum_j w_ij v_j / sum_j w_ij, w_ij = relu(q_i) . relu(k_j) cos(pi (i - j) / (2 limit)).

    Shapes: q [B, L, H, D], k and v [B, L, H, .]; limit None is the longer of both lengths; the sum of
    weights is at least 1e-6.
    """
    limit = max(q.shape[1], k.shape[1], 1) if limit is None else limit
    phi_q, phi_k = (
        cosine_reweighted(x, torch.arange(x.shape[1], device=x.device), limit) for x in (q, k)
    )
    return weighted(phi_q, phi_k, v, causal, implementation)


@judged
def cottention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    power: Tensor | None = None,
    *,
    causal: bool = True,
    norm_at: Literal["key", "query"] = "query",
    implementation: str | None = None,
) -> Tensor:
    """o_i = sum_j (q_i . k_j) v_j / n^sigmoid(power_h) with unit q and k; weights may be negative.

    Shapes: q, k, v [B, L, H, .], power [H], 0.5 by default.
    Options: n is the number of keys that query i sees; norm_at "key" divides each v_j by its own
    position j + 1 instead, as the authors' causal code does.
    """
    if norm_at not in ("key", "query"):
        raise RuleError("norm_at", norm_at, '"key" or "query" is needed')
    power = v.new_full((q.shape[2],), 0.5) if power is None else power
    if power.shape != q.shape[2:3]:
        raise ShapeError("power", list(power.shape), f"{list(q.shape[2:3])} is needed")
    if norm_at == "key" and k.shape[2] != q.shape[2]:
        raise ShapeError("k", list(k.shape), f'the {q.shape[2]} heads of q, with norm_at "key"')
    places = torch.arange(1, k.shape[1] + 1, device=v.device)
    if norm_at == "key":
        v = v * shrunk(places, power).to(v.dtype)
    q, k = unit(q), unit(k)
    if causal:
        o = scan(q, k, v, Additive(), scale=1.0, implementation=implementation)
    else:
        o = over_all(q, k, v, normalised=False, implementation=implementation)
    if norm_at == "key":
        return o
    counts = places if causal else places[-1:]
    return o * shrunk(counts, power).to(o.dtype)


def shrunk(counts: Tensor, power: Tensor) -> Tensor:
    """n^-sigmoid(power) [..., H, 1] of counts n [...]."""
    return (-torch.sigmoid(power) * counts.to(power.dtype).log()[..., None]).exp()[..., None]


@judged
def dijiang(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """o_t = sum_j exp(log_decay (t - j)) (phi(q_t) . phi(k_j)) v_j, phi = `dct_softmax`.

    Shapes: q, k, v [B, L, H, .], log_decay [H], by default `dijiang_decays`; weights [D], by default
    normal quantiles, always the same.
    """
    if weights is None:
        weights = gaussian_quantiles(q.shape[-1], torch.Generator().manual_seed(0)).to(q)
    if log_decay is None:
        log_decay = dijiang_decays(v.shape[2]).to(v)
    q, k = dct_softmax(q, weights), dct_softmax(k, weights)
    return scan(q, k, v, Additive(), log_decay=log_decay, scale=1.0, implementation=implementation)


def dijiang_decays(heads: int) -> Tensor:
    """log(1 - exp(x_h)), x from log(1/32) to log(1/512) in equal steps."""
    steps = torch.linspace(math.log(1 / 32), math.log(1 / 512), heads, device="cpu")
    return torch.log1p(-steps.exp())


@judged
def fastmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int = 2,
    causal: bool = True,
    normalise: Literal["standard", "unit"] = "standard",
    implementation: str | None = None,
) -> Tensor:
    """o_i = sum_j w_ij v_j / sum_j w_ij, w_ij = sum_{l <= order} (q_i . k_j)^l / l!, q and k normalised.

    Shapes: q, k, v [B, L, H, .].
    Options: order 1 or 2 (order 1 may give weights of both signs, and a sum below 1e-6 counts as
    that); normalise "standard" gives every token mean 0 and variance 1, "unit" length 1.
    """
    if normalise not in ("standard", "unit"):
        raise RuleError("normalise", normalise, '"standard" or "unit" is needed')
    change: Callable[[Tensor], Tensor] = standardised if normalise == "standard" else unit
    phi_q, phi_k = (taylor(change(x), order, scale=1.0) for x in (q, k))
    return weighted(phi_q, phi_k, v, causal, implementation)


def kernelised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: Callable[[Tensor], Tensor],
    causal: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """o_i = sum_j w_ij v_j / sum_j w_ij, w_ij = phi(q_i) . phi(k_j) with any feature map phi."""
    return weighted(feature_map(q), feature_map(k), v, causal, implementation)


class _FeatureLayer(StateLayer):
    """The projections of a layer whose q and k may be narrower or wider than v."""

    def __init__(
        self, dim: int, heads: int, *, causal: bool = True, head_dim: int | None = None
    ) -> None:
        super().__init__(dim, heads)
        head_dim = dim // heads if head_dim is None else head_dim
        self.causal = causal
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, heads * head_dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)


class FeatureAttention(_FeatureLayer):
    """y = W_o o, o_i = sum_j w_ij v_j / sum_j w_ij with w_ij = phi(q_i) . phi'(k_j).

    Shapes: x and y [B, L, dim]; packed and, where causal, in pieces as for `StateLayer`.
    Options: causal sums over j <= i; head_dim of q and k, None is dim / heads.
    A layer overrides `map_q` and `map_k`.
    """

    rule: Additive = _NORMALISED

    @abstractmethod
    def map_q(self, q: Tensor, places: Tensor) -> Tensor:
        """Features of q [B, L, H, D] at their places [B, L]."""

    def map_k(self, k: Tensor, places: Tensor) -> Tensor:
        """Features of k."""
        return self.map_q(k, places)

    def log_decay(self) -> Tensor | None:
        """A fixed decay [H], none by default."""
        return None

    def finish(self, o: Tensor, x: Tensor, places: Tensor, lengths: Tensor) -> Tensor:
        """y of o [B, L, H, Dv]; lengths [B, L] of the sequences that the tokens lie in."""
        y: Tensor = self.out(o.flatten(-2))
        return y

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        if state is not None and not self.causal:
            raise RuleError("state", "one", "a layer with causal=True is needed")
        places, seen = positions(x, None if state is None else state.tails[0], cu_seqlens)
        q = self.map_q(self.split(self.q(x)), places)
        k, v = self.map_k(self.split(self.k(x)), places), self.split(self.v(x))
        if self.causal:
            o, memory = scan(
                q,
                k,
                v,
                self.rule,
                log_decay=self.log_decay(),
                scale=1.0,
                initial_state=None if state is None else state.memory,
                return_state=True,
                cu_seqlens=cu_seqlens,
            )
            return self.finish(o, x, places, places + 1), LayerState((seen,), memory)
        rows = [
            contract(*(y[None] for y in own), normalised=self.rule.normalised)
            for own in zip(*(sequences(y, cu_seqlens) for y in (q, k, v)), strict=True)
        ]
        rows = rows or [v]
        counts = torch.cat([torch.full_like(row[..., 0, 0], row.shape[1]) for row in rows], -1)
        o = torch.cat(rows, dim=1).view_as(v) if cu_seqlens is not None else torch.cat(rows)
        return self.finish(o, x, places, counts.view(places.shape)), LayerState((seen,))


class BasedAttention(FeatureAttention):
    """y = W_o o with weights proportional to 1 + z + z^2 / 2, z = q . k / sqrt(feature_dim), causal.

    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: feature_dim of q and k, 16 in the paper.
    Cost: a state of 1 + D + D (D + 1) / 2 rows per head, D the feature_dim.
    Equals: any cut of x in two calls that pass the state.
    Paper: Based (2402.18668), which alternates it with sliding windows (`CausalAttention(window=64)`).
    """

    def __init__(self, dim: int, heads: int, *, feature_dim: int = 16) -> None:
        super().__init__(dim, heads, head_dim=feature_dim)

    def map_q(self, q: Tensor, places: Tensor) -> Tensor:
        return taylor(q)


class PerformerAttention(FeatureAttention):
    """y = W_o performer(q, k, v) with random features that `redraw` draws anew.

    Shapes: x and y [B, L, dim]; packed and, where causal, in pieces as for `StateLayer`.
    Options: features None is D ln D; the paper redraws every thousand steps of training and keeps the
    last ones.
    Paper: Performers (2009.14794).
    """

    projection: Tensor

    def __init__(
        self, dim: int, heads: int, *, causal: bool = True, features: int | None = None
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        count = len(default_projection(dim // heads)) if features is None else features
        self.register_buffer("projection", torch.empty(count, dim // heads))
        self.redraw(torch.Generator().manual_seed(0))

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draws new orthogonal directions."""
        drawn = orthogonal_projection(*self.projection.shape, generator=generator)
        self.projection = drawn.to(self.projection)

    def map_q(self, q: Tensor, places: Tensor) -> Tensor:
        return positive_random(q, self.projection, shift="token", epsilon=1e-4)

    def map_k(self, k: Tensor, places: Tensor) -> Tensor:
        # A shift by sequence would differ between the sequences of a packed tensor.
        return positive_random(k, self.projection, epsilon=1e-4)


class CosFormerAttention(FeatureAttention):
    """y = W_o cosformer(q, k, v) for sequences of at most `limit` tokens.

    Shapes: x and y [B, L, dim]; packed and, where causal, in pieces as for `StateLayer`.
    Paper: cosFormer (2202.08791).
    """

    def __init__(self, dim: int, heads: int, *, limit: int = 4096, causal: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self.limit = limit

    def map_q(self, q: Tensor, places: Tensor) -> Tensor:
        return cosine_reweighted(q, places, self.limit)


class CottentionLayer(FeatureAttention):
    """y = W_o cottention(q, k, v) with a learned power per head, counts at the query.

    Shapes: x and y [B, L, dim]; packed and, where causal, in pieces as for `StateLayer`.
    Paper: Cottention (2409.18747).
    """

    rule = Additive()

    def __init__(self, dim: int, heads: int, *, causal: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self.power = nn.Parameter(torch.full((heads,), 0.5))

    def map_q(self, q: Tensor, places: Tensor) -> Tensor:
        return unit(q)

    def finish(self, o: Tensor, x: Tensor, places: Tensor, lengths: Tensor) -> Tensor:
        factor = shrunk(lengths, self.power)
        return super().finish(o * factor.to(o.dtype), x, places, lengths)


class DiJiangAttention(FeatureAttention):
    """y = W_o [silu(W_g x) * norm_head(o)], o = dijiang(q, k, v).

    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Paper: DiJiang (2403.19928).
    """

    rule = Additive()
    weights: Tensor
    slopes: Tensor

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        drawn = gaussian_quantiles(dim // heads, torch.Generator().manual_seed(0))
        self.register_buffer("weights", drawn)
        self.register_buffer("slopes", dijiang_decays(heads))
        self.read = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim // heads, elementwise_affine=False)

    def log_decay(self) -> Tensor:
        return self.slopes

    def map_q(self, q: Tensor, places: Tensor) -> Tensor:
        return dct_softmax(q, self.weights)

    def finish(self, o: Tensor, x: Tensor, places: Tensor, lengths: Tensor) -> Tensor:
        gated = F.silu(self.split(self.read(x))) * self.norm(o)
        return super().finish(gated, x, places, lengths)


class FastAttention(FeatureAttention):
    """y = W_o fastmax(q, k, v).

    Shapes: x and y [B, L, dim]; packed and, where causal, in pieces as for `StateLayer`.
    Options: order 1 or 2.
    Paper: FAST (2402.07901).
    """

    def __init__(self, dim: int, heads: int, *, order: int = 2, causal: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self.order = order

    def map_q(self, q: Tensor, places: Tensor) -> Tensor:
        return taylor(standardised(q), self.order, scale=1.0)


class SpectralAttention(FeatureAttention):
    """y = W_o o with weights phi(q) . phi(k) of learned frequencies, `SpectralFeatures`.

    Shapes: x and y [B, L, dim]; packed and, where causal, in pieces as for `StateLayer`.
    Options: density and form as for `SpectralFeatures`.
    Paper: On Learning the Transformer Kernel (2110.08323).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        density: Literal["mixture", "generator"] = "mixture",
        form: Literal["positive", "fourier"] = "positive",
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        components = 2 if (dim // heads) % 2 == 0 else 1
        self.features = SpectralFeatures(
            dim // heads, density=density, form=form, components=components
        )

    def map_q(self, q: Tensor, places: Tensor) -> Tensor:
        y: Tensor = self.features(q)
        return y


class FeedForwardKernelAttention(FeatureAttention):
    """y = W_o o with weights phi(q) . phi(k), phi a small net with positive outputs.

    Shapes: x and y [B, L, dim]; packed and, where causal, in pieces as for `StateLayer`.
    Options: widths of the hidden layers of the net.
    Paper: Linear Self-Attention Approximation via Trainable Feedforward Kernel (2211.04076).
    """

    def __init__(
        self, dim: int, heads: int, *, causal: bool = False, widths: tuple[int, ...] = ()
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        self.features = FeedForwardFeatures(dim // heads, widths=widths)

    def map_q(self, q: Tensor, places: Tensor) -> Tensor:
        y: Tensor = self.features(q)
        return y


class AdvisorAttention(_FeatureLayer):
    """y = W_o performer(q, [k, a], [v, a']): attention over the tokens and learned advisor tokens.

    Shapes: x and y [B, L, dim]; not causal; packed as for `StateLayer`.
    Options: advisors is the number of learned pairs of key and value per head.
    Paper: C3D-AD (2025), kernel attention with learnable advisor; the paper leaves its feature map
    open, random positive features are used.
    """

    projection: Tensor

    def __init__(self, dim: int, heads: int, *, advisors: int = 16) -> None:
        super().__init__(dim, heads, causal=False)
        self.register_buffer("projection", default_projection(dim // heads))
        self.keys = nn.Parameter(torch.randn(advisors, heads, dim // heads))
        self.values = nn.Parameter(0.02 * torch.randn(advisors, heads, dim // heads))

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        if state is not None:
            raise RuleError("state", "one", "a causal layer is needed")
        q, k, v = (self.split(each(x)) for each in (self.q, self.k, self.v))
        rows = []
        for own in zip(*(sequences(y, cu_seqlens) for y in (q, k, v)), strict=True):
            one_q, one_k, one_v = (y[None] for y in own)
            rows.append(
                advised(one_q, one_k, one_v, self.keys, self.values, projection=self.projection)
            )
        o = torch.cat(rows or [v], dim=0 if cu_seqlens is None else 1)
        return self.out(o.flatten(-2)), LayerState(())


@judged
def advised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    advisor_k: Tensor | None = None,
    advisor_v: Tensor | None = None,
    *,
    projection: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`performer` on the keys and values of the tokens and of advisors, which all tokens share.

    Shapes: q, k, v [B, L, H, .], advisor_k [A, H, D], advisor_v [A, H, Dv], none by default; not causal.
    """
    if (advisor_k is None) != (advisor_v is None):
        raise ShapeError("advisor_k", "one of two", "both keys and values, or none of them")
    if advisor_k is not None and advisor_v is not None:
        need_shape("advisor_k", advisor_k, (-1, *k.shape[2:]), like=k)
        need_shape("advisor_v", advisor_v, (len(advisor_k), *v.shape[2:]), like=v)
        k, v = (
            torch.cat([x, extra.to(x.dtype).expand(len(x), *extra.shape)], dim=1)
            for x, extra in ((k, advisor_k), (v, advisor_v))
        )
    return performer(q, k, v, projection=projection, implementation=implementation)
