"""Single keys and runs of keys per query: clusters, principal directions, spans, cascades."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import OptionError, SelectionError, ShapeError
from foveal._judged import judged, need_shape
from foveal._shares import share_of
from foveal.engines.tile.low_bit import rounded
from foveal.layers.trainable_sparse_spans import SuperlinearAttention, superlinear
from foveal.patterns import Causal, Chosen, Dense, Pattern, Sliding, TokenSelection
from foveal.selectors import Clusters, LowRank, cluster, key_basis
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.sparse.shapes import qkv_shapes


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, Causal())


@judged
def squeezed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Clusters | None = None,
    *,
    threshold: float = 0.0,
    count: int = 64,
    coarse: Clusters | None = None,
    coarse_threshold: float = 0.0,
) -> Tensor:
    """Causal attention to the keys of a fixed prefix whose cluster takes a share above `threshold`.

    The share of cluster c is S_c = e^{s_c} / sum_c' N_c' e^{s_c'}, s_c = q . C_c / sqrt(D); all keys after
    the prefix are kept.  With `coarse` clusters of the same prefix, keys are first tested by those.
    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]; clusters of the first P <= Lk keys,
    as `selectors.cluster` finds them (None: `count` clusters of all keys but the last Lq).
    Equals: threshold = 0 is causal attention.
    """
    for name, value in (("threshold", threshold), ("coarse_threshold", coarse_threshold)):
        if value < 0:
            raise OptionError(name, value, "at least 0 is needed")
    if count < 1:
        raise OptionError("count", count, "at least 1 is needed")
    prefix = k.shape[1] - q.shape[1]
    if clusters is None and prefix > 0:
        clusters = cluster(k[:, :prefix], min(count, prefix))
    if clusters is None:
        return _causal(q, k, v)
    pattern = squeezed_pattern(
        q, k, clusters, threshold=threshold, coarse=coarse, coarse_threshold=coarse_threshold
    )
    return attend(q, k, v, pattern)


def squeezed_pattern(
    q: Tensor,
    k: Tensor,
    clusters: Clusters,
    *,
    threshold: float,
    coarse: Clusters | None = None,
    coarse_threshold: float = 0.0,
) -> Pattern:
    """The pairs of `squeezed_attention`."""
    _fit_clusters("clusters", clusters, k)
    kept = _kept(q, clusters, threshold)
    if coarse is not None:
        _fit_clusters("coarse", coarse, k, clusters.labels.shape[-1])
        kept = kept & _kept(q, coarse, coarse_threshold)
    after = kept.new_ones(*kept.shape[:3], k.shape[1] - clusters.labels.shape[-1])
    mask = torch.cat([kept, after], dim=-1)
    return Chosen(TokenSelection.from_mask(mask)) & Causal()


def _fit_clusters(name: str, clusters: Clusters, k: Tensor, prefix: int | None = None) -> None:
    if not isinstance(clusters, Clusters):
        raise OptionError(
            name, type(clusters).__name__, "what `selectors.cluster` returns is needed"
        )
    batch, kv_heads, width = k.shape[0], k.shape[2], k.shape[3]
    need_shape(name, clusters.centroids, (batch, kv_heads, -1, width), like=k)
    keys = clusters.labels.shape[-1]
    if keys > k.shape[1] or keys != (keys if prefix is None else prefix):
        wanted = (
            f"a prefix of the {k.shape[1]} keys"
            if prefix is None
            else f"the {prefix} keys of clusters"
        )
        raise ShapeError(name, list(clusters.labels.shape), f"labels of {wanted} are needed")


def _kept(q: Tensor, clusters: Clusters, threshold: float) -> Tensor:
    """Whether the cluster of each key of the prefix is kept.  bool [B, Hq, Lq, P]"""
    shares = clusters.shares(q.detach())
    labels = clusters.labels.repeat_interleave(q.shape[2] // clusters.labels.shape[1], dim=1)
    found = shares.gather(-1, labels[:, :, None].expand(-1, -1, q.shape[1], -1))
    return found > threshold if threshold > 0 else torch.ones_like(found, dtype=torch.bool)


def _no_threshold(draw: Draw) -> Claim:
    length = draw.integer(6, 12)

    def squeezed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return squeezed_attention(q, k, v, cluster(k[:, : length - 2], 3))

    return Claim(draw.qkv((length,), heads=4, kv_heads=2), squeezed, _causal)


def _high_threshold(draw: Draw) -> Claim:
    length, after = draw.integer(6, 12), 3

    def squeezed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = cluster(k[:, : length - after], 3)
        return squeezed_attention(q[:, -after:], k, v, found, threshold=2.0)

    return Claim(
        draw.qkv((length,)),
        squeezed,
        lambda q, k, v: _causal(q[:, -after:], k[:, -after:], v[:, -after:]),
    )


SQUEEZED_ATTENTION = System(
    name="squeezed_attention",
    title="Squeezed Attention: Accelerating Long Context Length LLM Inference",
    year=2024,
    paper="UC Berkeley; arXiv 2411.09688",
    kind="operator",
    family="sparse",
    summary="Clusters the keys of a fixed prefix offline and keeps, for each query, the keys of the "
    "clusters with a large share, all of them exactly; one or two levels.",
    op=squeezed_attention,
    identities=(
        Identity("no_threshold", "Threshold 0 is causal attention.", _no_threshold),
        Identity(
            "high_threshold", "A threshold above all shares leaves what follows.", _high_threshold
        ),
    ),
    operands=qkv_shapes,
    reference_shapes=({"grid": (4096,), "heads": 8, "kv_heads": 8, "head_dim": 128},),
)


@judged
def loki(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    basis: Tensor | None = None,
    *,
    share: float = 0.25,
    rank_share: float = 0.25,
) -> Tensor:
    """Causal attention to the best `share` of the visible keys, ranked in the first principal directions.

    A query keeps ceil(share n) of its n visible keys by (q U_r) . (k U_r), r = ceil(rank_share D); the
    attention to them is exact.  Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]; basis U
    [Hkv, D, D] from calibration keys (None: those of the call), see `selectors.key_basis`.
    Equals: share = 1 is causal attention; rank_share = 1 keeps the keys of largest exact score.
    """
    return attend(q, k, v, loki_pattern(q, k, basis, share=share, rank_share=rank_share))


def loki_pattern(
    q: Tensor,
    k: Tensor,
    basis: Tensor | None = None,
    *,
    share: float = 0.25,
    rank_share: float = 0.25,
) -> Pattern:
    """The pairs of `loki`."""
    if not 0 < share <= 1 or not 0 < rank_share <= 1:
        raise SelectionError("share", (share, rank_share), "both above 0 and at most 1 are needed")
    if basis is not None:
        need_shape("basis", basis, (k.shape[2], k.shape[3], k.shape[3]), like=k)
    rank = share_of(q.shape[-1], rank_share)
    with torch.no_grad():
        selector = LowRank(key_basis(k) if basis is None else basis, rank)
        s = selector.estimate(q, k)
        position = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
        key = torch.arange(k.shape[1], device=q.device)
        s = s.masked_fill(key > position[:, None], -torch.inf)
        order = s.sort(dim=-1, descending=True, stable=True).indices
        count = share_of(position + 1, share)[:, None]
        kept = torch.zeros_like(s, dtype=torch.bool)
        kept.scatter_(-1, order, (key < count).expand_as(order))
    return Chosen(TokenSelection.from_mask(kept)) & Causal()


def _all_keys(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(4, 12),), heads=4, kv_heads=2),
        lambda q, k, v: loki(q, k, v, share=1.0),
        _causal,
    )


def _rotated(draw: Draw) -> Claim:
    basis = torch.linalg.qr(draw.normal(2, 3, 3))[0]
    turned = torch.linalg.qr(draw.normal(2, 3, 3))[0]
    return Claim(
        draw.qkv((draw.integer(4, 12),), heads=4, kv_heads=2),
        lambda q, k, v: loki(q, k, v, basis, share=0.5, rank_share=1.0),
        lambda q, k, v: loki(q, k, v, turned, share=0.5, rank_share=1.0),
    )


LOKI = System(
    name="loki",
    title="Loki: Low-Rank Keys for Efficient Sparse Attention",
    year=2024,
    paper="University of Maryland; arXiv 2406.02542",
    kind="operator",
    family="sparse",
    summary="Ranks keys by a quarter of their principal directions and attends to the best quarter "
    "exactly.",
    op=loki,
    identities=(
        Identity("all_keys", "With all keys kept it is causal attention.", _all_keys),
        Identity("rotated", "With all directions the basis does not matter.", _rotated),
    ),
    operands=qkv_shapes,
    reference_shapes=({"grid": (2048,), "heads": 8, "kv_heads": 8, "head_dim": 128},),
)


def _window_alone(draw: Draw) -> Claim:
    length = draw.integer(4, 8)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: superlinear(q, k, v, first=2),
        lambda q, k, v: attend(q, k, v, Sliding(7)),
    )


def _whole_spans(draw: Draw) -> Claim:
    # The only anchor of every query reaches back to the first key and forward to the window.
    length = draw.integer(5, 9)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: superlinear(q, k, v, first=1, exponent=1.0, anchors=1, backward=20.0),
        _from_best,
    )


def _from_best(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query on its own: itself, and all keys up to its best earlier one but the one before it."""
    rows = []
    for t in range(q.shape[1]):
        heads = []
        for h in range(q.shape[2]):
            own_k, own_v = k[:, : t + 1, h // 2], v[:, : t + 1, h // 2]
            s = torch.einsum("bd,bjd->bj", q[:, t, h], own_k)
            place = torch.arange(t + 1)
            best = s[:, :t].argmax(-1)[:, None] if t else place.new_full((len(s), 1), -1)
            seen = (place == t) | (place <= best)
            weights = torch.softmax((s * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf), -1)
            heads.append(torch.einsum("bj,bjd->bd", weights, own_v))
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows, 1)


SUPERLINEAR = System(
    name="superlinear",
    title="Superlinear Multi-Step Attention",
    year=2026,
    paper="Concavity AI, 2026",
    kind="operator",
    family="sparse",
    summary="Searches keys at square distances, attends to a window and to the span of each of the "
    "best anchors, and mixes the results by the anchors' softmax; L^1.5 in all.",
    op=superlinear,
    layer=SuperlinearAttention,
    identities=(
        Identity("window_alone", "Without an anchor it is the window.", _window_alone),
        Identity(
            "whole_spans", "With exponent 1 the best earlier key opens all before it.", _whole_spans
        ),
    ),
    operands=qkv_shapes,
    reference_shapes=({"grid": (4096,), "heads": 8, "kv_heads": 8, "head_dim": 128},),
)


@judged
def spatten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    importance: Tensor | None = None,
    *,
    keep: float = 0.5,
    value_keep: float = 1.0,
    bits: int | None = None,
    sure: float = 0.1,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of a cascade: o, the importance after it, and the keys [B, n] that the next layer keeps.

    Attention is that over the keys whose importance is not -inf (pruned ones stay pruned); their
    importance grows by the probabilities that all heads and queries give them; the ceil(keep L) most
    important keys survive.  With value_keep < 1 a query takes only the ceil(value_keep n) largest of its
    n probabilities to the values, not normalised again.  With bits, keys are first read in so many bits, one
    scale per key; a query whose largest probability is then below `sure` reads them whole and starts again.
    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]; importance [B, Lk] (None: 0).
    Cost: the probabilities are laid out, [B, Hq, Lq, Lk].
    """
    for name, value in (("keep", keep), ("value_keep", value_keep)):
        if not 0 < value <= 1:
            raise SelectionError(name, value, "above 0 and at most 1 is needed")
    if bits is not None and not 2 <= bits <= 8:
        raise SelectionError("bits", bits, "2 to 8 are needed")
    if importance is not None:
        need_shape("importance", importance, (q.shape[0], k.shape[1]), like=q)
    length = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    before = q.new_zeros(len(q), length, dtype=wide) if importance is None else importance
    groups = q.shape[2] // k.shape[2]
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(groups, 2)).to(wide)
    hidden = (before == -torch.inf)[:, None, None]
    if causal:
        position = torch.arange(q.shape[1], device=q.device) + length - q.shape[1]
        hidden = hidden | (torch.arange(length, device=q.device) > position[:, None])
    s = (s * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    p = torch.softmax(s, dim=-1).masked_fill(hidden, 0.0)
    if bits is not None:
        p = _from_few_bits(q, k, p, hidden, bits, sure)
    after = before + p.detach().sum((1, 2))
    if value_keep < 1:
        count = share_of((~hidden).sum(-1, keepdim=True), value_keep)
        order = p.detach().sort(dim=-1, descending=True, stable=True).indices
        rank = torch.arange(length, device=q.device).expand_as(order)
        p = p * torch.zeros_like(p).scatter(-1, order, (rank < count).to(p.dtype))
    o = torch.einsum("bhij,bjhd->bihd", p.to(v.dtype), v.repeat_interleave(groups, 2))
    kept = after.topk(share_of(length, keep), dim=-1).indices.sort(-1).values
    return o, after.masked_fill(~_among(kept, length), -torch.inf), kept


def _from_few_bits(
    q: Tensor, k: Tensor, p: Tensor, hidden: Tensor, bits: int, sure: float
) -> Tensor:
    """Probabilities from keys in few bits, exact ones p for queries that are not sure of them."""
    with torch.no_grad():
        numbers, unit = rounded(k, bits)
        error = numbers * unit - k
    few = (k + error).repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = torch.einsum("bihd,bjhd->bhij", q, few).to(p.dtype) * q.shape[-1] ** -0.5
    quick = torch.softmax(s.masked_fill(hidden, -torch.inf), dim=-1).masked_fill(hidden, 0.0)
    return torch.where(quick.detach().amax(-1, keepdim=True) < sure, p, quick)


def head_importance(o: Tensor, before: Tensor | None = None) -> Tensor:
    """Sum of |o| of every head over tokens and channels, beside that of earlier layers.  [B, Hq]

    `HeadSelection` of the largest ones leaves the others out: a cascade over heads like that over tokens.
    Shapes: o [B, L, Hq, Dv], before [B, Hq].
    """
    wide = torch.promote_types(o.dtype, torch.float32)
    total: Tensor = o.detach().to(wide).abs().sum((1, 3))
    return total if before is None else before + total


def _among(kept: Tensor, length: int) -> Tensor:
    mask = torch.zeros(len(kept), length, dtype=torch.bool, device=kept.device)
    return mask.scatter(-1, kept, True)


def spatten_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    importance: Tensor | None = None,
    *,
    keep: float = 0.5,
    value_keep: float = 1.0,
    bits: int | None = None,
    sure: float = 0.1,
    causal: bool = True,
) -> Tensor:
    """The output of `spatten` alone."""
    return spatten(
        q, k, v, importance, keep=keep, value_keep=value_keep, bits=bits, sure=sure, causal=causal
    )[0]


def _nothing_pruned(draw: Draw) -> Claim:
    causal = bool(draw.integer(0, 1))
    pattern: Pattern = Causal() if causal else Dense()
    return Claim(
        draw.qkv((draw.integer(4, 9),), heads=4, kv_heads=2),
        lambda q, k, v: spatten_layer(q, k, v, causal=causal),
        lambda q, k, v: attend(q, k, v, pattern),
    )


def _never_sure(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(4, 9),), heads=4, kv_heads=2),
        lambda q, k, v: spatten_layer(q, k, v, bits=4, sure=2.0),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _pruned_stay_pruned(draw: Draw) -> Claim:
    def second(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, importance, _ = spatten(q, k, v, keep=0.5, causal=False)
        return spatten_layer(q, k, v, importance, keep=0.5, causal=False)

    def gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, _, kept = spatten(q, k, v, keep=0.5, causal=False)
        own = [attend(q[n : n + 1], k[n : n + 1, i], v[n : n + 1, i]) for n, i in enumerate(kept)]
        return torch.cat(own)

    return Claim(draw.qkv((draw.integer(4, 9),), heads=4, kv_heads=2), second, gathered)


SPATTEN = System(
    name="spatten",
    title="SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
    year=2021,
    paper="Wang, Zhang, Han (MIT), HPCA 2021; arXiv 2012.09852",
    kind="operator",
    family="sparse",
    summary="Adds up the probabilities that every key receives, layer after layer, and prunes the "
    "least important keys for good; values of small probabilities are not fetched.",
    op=spatten_layer,
    engine="torch",
    identities=(
        Identity("nothing_pruned", "The first layer is plain attention.", _nothing_pruned),
        Identity("never_sure", "Queries that are never sure read whole keys.", _never_sure),
        Identity(
            "pruned_stay_pruned", "The next layer attends to the survivors.", _pruned_stay_pruned
        ),
    ),
    operands=qkv_shapes,
    reference_shapes=({"grid": (1024,), "heads": 12, "kv_heads": 12, "head_dim": 64},),
)
