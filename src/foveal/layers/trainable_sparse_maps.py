"""Attention on the cells of a small predicted map, kept over all heads together, beside a running mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._arguments import need_tensors
from foveal._attend import attend
from foveal._errors import SelectionError, ShapeError
from foveal._judged import judged, need_dtype, need_shape
from foveal._scan import scan
from foveal.features import orthogonal_projection, positive_random
from foveal.layers.heads import MultiHead
from foveal.layers.trainable_sparse_blocks import ranks, spread_heads
from foveal.patterns import Causal, Chosen, Pattern, SpanSelection

_QUERIES_AT_ONCE = 256
"""Queries whose full attention maps are in memory at once."""


def visible_keys(Lq: int, Lk: int, causal: bool, device: torch.device) -> Tensor:
    """How many keys each query sees.  int64 [Lq]"""
    place = torch.arange(Lq, device=device) + Lk - Lq + 1
    return place if causal else torch.full_like(place, Lk)


def kept_cells(shares: Tensor, keys: int, causal: bool, Lk: int) -> Tensor:
    """Of every query's cells, all heads together, the max(1, round(H keys m / t)) largest.  bool like shares

    Shapes: shares [B, H, Lq, m], a map on m cells of the t visible keys; ties go to the lower head, then to
    the earlier cell.
    """
    heads, Lq, cells = shares.shape[1:]
    visible = visible_keys(Lq, Lk, causal, shares.device)
    count = torch.floor(heads * keys * cells / visible.double() + 0.5).long().clamp(min=1)
    together = shares.transpose(1, 2).flatten(2)  # [B, Lq, H m]
    kept = ranks(together) < count[:, None]
    found: Tensor = kept.unflatten(2, (heads, cells)).transpose(1, 2)
    return found


def cell_spans(kept: Tensor, causal: bool, Lk: int) -> SpanSelection:
    """The keys of kept cells: cell c of m holds the keys j of t visible ones with floor(j m / t) = c."""
    Lq, cells = kept.shape[2:]
    visible = visible_keys(Lq, Lk, causal, kept.device)[:, None]
    edge = (torch.arange(cells + 1, device=kept.device) * visible + cells - 1) // cells
    most = max(int(kept.sum(-1).max()), 1) if kept.numel() else 1
    index = torch.where(kept, torch.arange(cells, device=kept.device), cells).sort(-1).values
    index = index[..., :most]
    edges = edge.expand(*kept.shape[:2], -1, -1)
    there = index < cells
    starts = torch.where(there, edges.gather(-1, index.clamp(max=cells - 1)), 0)
    stops = torch.where(there, edges.gather(-1, index.clamp(max=cells - 1) + 1), 0)
    return SpanSelection(starts.to(torch.int32), stops.to(torch.int32))


@judged
def sea_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shares: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    keys: int = 64,
    causal: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """o_t = beta_t alpha_t softmax over kept keys of (q k) v + (1 - beta_t) mean of v.

    A map on m cells is predicted for every query; the cells that are largest over all heads together are
    kept, about `keys` keys per head, and stand for the keys they cover.  The mean is that of the visible
    values; without causality it is weighted by the map.
    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv], shares [B, Hq, Lq, m], alpha and beta
    [B, Lq, Hq] (None: 1).
    Limits: the choice has no gradient; `map_loss` trains what predicts the map.
    Equals: keys >= Lk without alpha and beta is dense or causal attention; beta = 0 is the running mean.
    Paper: SEA (2310.01777).
    """
    if shares.dim() != 4 or shares.shape[:3] != (q.shape[0], q.shape[2], q.shape[1]):
        needed = f"[{q.shape[0]}, {q.shape[2]}, {q.shape[1]}, cells] is needed"
        raise ShapeError("shares", list(shares.shape), needed)
    if not shares.shape[3]:
        raise ShapeError("shares", list(shares.shape), "at least one cell is needed")
    if keys < 1:
        raise SelectionError("keys", keys, "at least 1 is needed")
    for name, gate in (("alpha", alpha), ("beta", beta)):
        if gate is not None:
            need_shape(name, gate, (q.shape[0], q.shape[1], q.shape[2]), like=q)
    Lk = k.shape[1]
    kept = kept_cells(shares.detach(), keys, causal, Lk)
    pattern: Pattern = Chosen(cell_spans(kept, causal, Lk))
    o = attend(q, k, v, pattern & Causal() if causal else pattern, implementation=implementation)
    o = o if alpha is None else o * alpha[..., None]
    if beta is None:
        return o
    mean = _visible_mean(v, q) if causal else _mapped_mean(v, shares)
    return beta[..., None] * o + (1 - beta[..., None]) * mean.to(o.dtype)


def _visible_mean(v: Tensor, q: Tensor) -> Tensor:
    wide = torch.promote_types(v.dtype, torch.float32)
    total = spread_heads(v, q.shape[2]).cumsum(1, dtype=wide)
    count = torch.arange(1, v.shape[1] + 1, device=v.device)[:, None, None]
    return (total / count)[:, v.shape[1] - q.shape[1] :]


def _mapped_mean(v: Tensor, shares: Tensor) -> Tensor:
    """Every cell's share, spread evenly over its keys."""
    cells, length = shares.shape[-1], v.shape[1]
    owner = torch.arange(length, device=v.device) * cells // length
    sizes = torch.bincount(owner, minlength=cells)
    values = spread_heads(v, shares.shape[1])
    totals = values.new_zeros(v.shape[0], cells, *values.shape[2:]).index_add(1, owner, values)
    means = totals / sizes.clamp(min=1)[:, None, None].to(v.dtype)
    some = shares * (sizes > 0)
    weights = some / some.sum(-1, keepdim=True)
    return torch.einsum("bhic,bchd->bihd", weights.to(v.dtype), means)


def map_targets(q: Tensor, k: Tensor, cells: int, causal: bool = True) -> Tensor:
    """What the map should say: the mass of softmax attention in each cell.  [B, Hq, Lq, cells], no gradient

    The full map is computed some queries at a time.
    """
    need_tensors(q=q, k=k)
    need_shape("q", q, (-1, -1, -1, -1), like=q)
    need_shape("k", k, (len(q), -1, -1, q.shape[3]), like=q)
    need_dtype(q, k=k)
    if cells < 1:
        raise ShapeError("cells", cells, "at least 1 is needed")
    Lq, Lk = q.shape[1], k.shape[1]
    visible, place = visible_keys(Lq, Lk, causal, q.device), torch.arange(Lk, device=q.device)
    keys, found = spread_heads(k, q.shape[2]), []
    with torch.no_grad():
        for first in range(0, Lq, _QUERIES_AT_ONCE):
            own = q[:, first : first + _QUERIES_AT_ONCE]
            t = visible[first : first + own.shape[1], None]
            s = torch.einsum("bihd,bjhd->bhij", own, keys) * q.shape[-1] ** -0.5
            p = torch.softmax(s.masked_fill(place >= t, -torch.inf), dim=-1)
            owner = (place * cells // t).clamp(max=cells - 1).expand_as(p)
            found.append(p.new_zeros(*p.shape[:-1], cells).scatter_add_(-1, owner, p))
    return torch.cat(found, dim=2)


def map_loss(shares: Tensor, targets: Tensor) -> Tensor:
    """Mean over queries and heads of KL(targets || shares)."""
    need_tensors(shares=shares, targets=targets)
    need_shape("targets", targets, tuple(shares.shape), like=shares)
    some = targets > 0
    ratio = torch.where(some, targets, 1.0).log() - torch.where(some, shares, 1.0).log()
    return (targets * ratio).sum(-1).mean()


class SeaMap(nn.Module):
    """The map of `sea_attention`: linear attention of q and k onto values and places, a net, a convolution.

    c = phi(q) cumsum(phi(k) [v; e])^T / (phi(q) cumsum(phi(k))), e a fixed code of the place; the map is
    softmax(conv(W_2 gelu(W_1 [c; v]))) with a causal convolution over queries and cells, dilated over the
    queries.  alpha and beta are sigmoids of a linear map of c.
    Shapes: forward(q, k, v [B, L, H, D]) gives shares [B, H, L, cells], alpha and beta [B, L, H].
    Options: features of the positive random kind, drawn by `generator`.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        cells: int = 128,
        features: int = 64,
        hidden: int = 128,
        places: int = 16,
        dilation: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("cells", cells), ("dilation", dilation)):
            if size < 1:
                raise ShapeError(name, size, "at least 1 is needed")
        if places % 2:
            raise ShapeError("places", places, "an even number is needed")
        self.heads, self.places, self.dilation = heads, places, dilation
        self.head_dim = head_dim
        drawn = orthogonal_projection(features, head_dim, generator=generator)
        self.register_buffer("projection", drawn)
        width = 2 * head_dim + places
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, cells))
        self.mix = nn.Conv2d(heads, heads, 3, dilation=(dilation, 1), groups=heads)
        self.gates = nn.Linear(width, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        need_tensors(q=q, k=k, v=v)
        weight = self.gates.weight
        need_shape("q", q, (-1, -1, self.heads, self.head_dim), like=weight)
        for name, x in (("k", k), ("v", v)):
            need_shape(name, x, tuple(q.shape), like=weight)
        need_dtype(weight, q=q, k=k, v=v)
        context = torch.cat([self._context(q, k, v), v], dim=-1)  # [B, L, H, width]
        logits = self.net(context).transpose(1, 2)
        if q.shape[1]:  # a convolution refuses an axis shorter than its filter
            logits = logits + self.mix(F.pad(logits, (1, 1, 2 * self.dilation, 0)))
        shares = torch.softmax(logits, dim=-1)
        alpha, beta = torch.sigmoid(self.gates(context)).unbind(-1)
        return shares, alpha, beta

    def _context(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert isinstance(self.projection, Tensor)
        drawn = self.projection.to(q.dtype)
        phi_q = positive_random(q, drawn, shift="token", epsilon=1e-4)
        phi_k = positive_random(k, drawn, epsilon=1e-4)
        code = self._code(v.shape[1], v).expand(*v.shape[:3], -1)
        values = torch.cat([v, code, torch.ones_like(v[..., :1])], dim=-1)
        total = scan(phi_q, phi_k, values, scale=1.0)
        return total[..., :-1] / total[..., -1:]

    def _code(self, length: int, like: Tensor) -> Tensor:
        """Sines and cosines of the place.  [length, 1, places]"""
        half = self.places // 2
        rate = 10000.0 ** (-torch.arange(half, device=like.device, dtype=torch.float64) / half)
        angle = torch.arange(length, device=like.device)[:, None] * rate
        return torch.cat([angle.sin(), angle.cos()], -1).to(like.dtype)[:, None]


class SparseLinearMapAttention(MultiHead):
    """`sea_attention` between projections, with a `SeaMap` of its own.

    Shapes: x and y [B, L, dim].
    """

    def __init__(
        self, dim: int, heads: int, *, keys: int = 64, cells: int = 128, features: int = 64
    ) -> None:
        super().__init__(dim, heads)
        self.keys = keys
        self.map = SeaMap(heads, dim // heads, cells=cells, features=features)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sea_attention(q, k, v, *self.map(q, k, v), keys=self.keys)
