"""Decoding from stores: shares of programs, segments, mapped rows, subspaces, pages on the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._attend import attend
from foveal._decode import decode
from foveal._errors import OptionError, SelectionError
from foveal._judged import judged, need_dtype, need_shape
from foveal.caches import KVShape, LowRank, VirtualContiguous
from foveal.compose import LouisCache, RetrievalCache, merge
from foveal.patterns import Causal, Chosen, Dense, TokenSelection
from foveal.systems.base import Claim, Draw, Identity, System

FAMILY = "cache"


def _shape(k: Tensor, v: Tensor) -> KVShape:
    return KVShape(len(k), k.shape[2], k.shape[3], v.shape[3], dtype=k.dtype, device=k.device)


def _newest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q[:, -1:], k, v, Dense())


def _parts(q: Tensor, k: Tensor, v: Tensor, borders: list[int]) -> tuple[Tensor, Tensor]:
    """o and lse of the newest query on the runs of keys between borders, joined by their lse."""
    runs = [(a, b) for a, b in itertools.pairwise(borders) if b > a]
    found = [attend(q[:, -1:], k[:, a:b], v[:, a:b], Dense(), return_lse=True) for a, b in runs]
    return merge([o for o, _ in found], [lse for _, lse in found])


@judged
def lean_attention(
    q: Tensor, k: Tensor, v: Tensor, *, tile: int = 128, programs: int = 264
) -> Tensor:
    """The newest query of every sequence and head, with equal shares of all tiles of keys per program.

    W = batch x key heads x ceil(L / tile) tiles lie one behind the other; W mod programs of them take one
    tile more than the others.  Where a share ends inside a head, two parts of the head join by their lse.
    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv]; returns [B, 1, Hq, Dv].  On a GPU
    `decode(..., implementation="lean")` is this order in one launch.
    Equals: attention of the newest query, for every tile and number of programs.
    """
    for name, value in (("tile", tile), ("programs", programs)):
        if value < 1:
            raise SelectionError(name, value, "at least 1 is needed")
    B, L, heads, _ = k.shape
    tiles = -(-L // tile)
    small, larger = divmod(B * heads * tiles, programs)
    starts = {n * small + min(n, larger) for n in range(programs)}
    rows = []
    for b in range(B):
        own = []
        for h, part in enumerate(q[b : b + 1].unflatten(2, (heads, -1)).unbind(2)):
            first = (b * heads + h) * tiles
            cuts = [tile * (n - first) for n in sorted(starts) if first < n < first + tiles]
            keys, values = (x[b : b + 1, :, h : h + 1] for x in (k, v))
            own.append(_parts(part, keys, values, [0, *cuts, L])[0])
        rows.append(torch.cat(own, dim=2))
    return torch.cat(rows)


@judged
def dist_attention(q: Tensor, k: Tensor, v: Tensor, *, segments: int = 4) -> Tensor:
    """The newest query on keys in `segments` equal runs, each held elsewhere, joined by their lse.

    A holder returns o and lse: Hq (Dv + 1) numbers, whatever its length.  `caches.Joined` holds such
    segments for `decode`.
    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv]; returns [B, 1, Hq, Dv].
    Equals: attention of the newest query, for any number of segments, empty ones too.
    """
    if segments < 1:
        raise SelectionError("segments", segments, "at least 1 is needed")
    L = k.shape[1]
    return _parts(q, k, v, [L * n // segments for n in range(segments + 1)])[0]


@judged
def vattention(q: Tensor, k: Tensor, v: Tensor, *, ahead: int = 0) -> Tensor:
    """The newest query on keys in `caches.VirtualContiguous`: one run of addresses per sequence.

    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv]; returns [B, 1, Hq, Dv].
    """
    cache = VirtualContiguous(_shape(k, v), max_tokens=k.shape[1], ahead=ahead)
    cache.append(k, v)
    return decode(q[:, -1:], cache)


@judged
def eigen_attention(q: Tensor, k: Tensor, v: Tensor, *, energy: float = 0.98) -> Tensor:
    """The newest query in the subspaces of keys and values that hold `energy` of their singular values.

    U_k, U_v [Hkv, D, r] from the singular vectors of k and v themselves (papers take calibration text);
    r is the least rank whose singular values sum to the share, largest over the heads.  The cache holds
    U^T x, the query becomes U_k^T q, the output U_v o.
    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv]; returns [B, 1, Hq, Dv].
    Equals: energy 1 is attention of the newest query.
    """
    if not 0 < energy <= 1:
        raise SelectionError("energy", energy, "above 0 and at most 1 is needed")
    with torch.no_grad():
        bases = [_basis(x, energy) for x in (k, v)]
    return matryoshka_kv(q, k, v, *bases)


def _basis(x: Tensor, energy: float) -> Tensor:
    # Vectors of a float32 decomposition are orthonormal up to several roundings, which would all show.
    rows = x.double().transpose(1, 2).transpose(0, 1).flatten(1, 2)  # [Hkv, B L, D]
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=rows.shape[1] < rows.shape[2])
    if energy == 1:
        rank = rows.shape[2]
    else:
        shares = sizes.cumsum(-1) / sizes.sum(-1, keepdim=True)
        rank = int((shares < energy).sum(-1).max()) + 1
    basis: Tensor = directions[:, : min(rank, directions.shape[1])].transpose(1, 2).to(x.dtype)
    return basis


@judged
def matryoshka_kv(
    q: Tensor, k: Tensor, v: Tensor, key_basis: Tensor, value_basis: Tensor, *, ranks: int = 0
) -> Tensor:
    """The newest query in nested subspaces: the first `ranks` columns of each basis (0: all).

    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv]; key_basis [Hkv, D, r], value_basis
    [Hkv, Dv, r], orthonormal columns; returns [B, 1, Hq, Dv].
    Equals: attention on U U^T k and U U^T v; with square bases, on k and v.
    """
    if ranks:
        key_basis, value_basis = key_basis[..., :ranks], value_basis[..., :ranks]
    pages = len(k) * -(-k.shape[1] // 16)
    cache = LowRank(_shape(k, v), key_basis, value_basis, pages=pages)
    cache.append(k, v)
    return decode(q[:, -1:], cache)


@judged
def retrieval_attention(
    q: Tensor, k: Tensor, v: Tensor, *, keys: int = 100, sinks: int = 128, window: int = 512
) -> Tensor:
    """Causal attention to the first and the newest keys, and to the `keys` of largest product beside them.

    The first `sinks` and the newest `window` keys stay on the device; of the others, on the host, each
    query head reads those of largest q . k, here found by all products: the paper's graph finds nearly
    the same ones from a few percent of them.  `compose.RetrievalCache` holds and fetches them token by
    token.
    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv].
    Equals: with as many keys as there are, causal attention.
    """
    with torch.no_grad():
        age = _ages(q, k)
        place = torch.arange(k.shape[1], device=k.device)
        near = (age >= 0) & ((age < window) | (place < sinks))
        s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
        s = s.masked_fill(near | (age < 0), -torch.inf)
        kept = near.expand_as(s) | _best(s, keys)
    return attend(q, k, v, Chosen(TokenSelection.from_mask(kept)) & Causal())


def _ages(q: Tensor, k: Tensor) -> Tensor:
    """How many keys behind a query a key lies: int64 [Lq, Lk], negative for later keys."""
    position = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
    return position[:, None] - torch.arange(k.shape[1], device=q.device)


def _best(s: Tensor, count: int) -> Tensor:
    """Marks the `count` largest of the last axis, never -inf."""
    if not count:
        return torch.zeros_like(s, dtype=torch.bool)
    best = s.topk(min(count, s.shape[-1]), dim=-1)
    marks = torch.zeros_like(s, dtype=torch.bool)
    return marks.scatter_(-1, best.indices, best.values > -torch.inf)


@judged
def louis_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alike: float = 0.7,
    pages: int = 16,
    page: int = 32,
    window: int = 64,
) -> Tensor:
    """Causal attention to the newest keys and to pages of earlier ones, chosen anew at semantic borders.

    A border of a head is a query whose cosine with the query of the last border is below `alike`, mean
    over the query heads of a key head.  There, of the pages that lie before the newest `window` keys, the
    `pages` of largest q . (mean key) are fetched, and they stay until the next border, as do all later keys.
    Pages are runs of `page` keys; `compose.LouisCache` holds and fetches them token by token.
    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv].
    Limits: the paper's pages are clusters of the prompt and segments of what was generated; here both are
    runs.
    Equals: with as many pages as there are, causal attention.
    """
    if not -1 <= alike <= 1:
        raise OptionError("alike", alike, "a cosine, -1 to 1, is needed")
    with torch.no_grad():
        place = torch.arange(k.shape[1], device=k.device)
        position = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
        rows = q.unflatten(2, (k.shape[2], -1))
        means = F.pad(k, (0, 0, 0, 0, 0, -k.shape[1] % page)).unflatten(1, (-1, page)).mean(2)
        s = torch.einsum("bihgd,bphd->bhip", rows, means)
        old = ((position - window + 1) // page).clamp(min=0)  # whole pages before the window
        number = torch.arange(means.shape[1], device=k.device)
        best = _best(s.masked_fill(number >= old[:, None], -torch.inf), pages)
        border = _borders(rows, alike)
        best = best.gather(2, border[..., None].expand_as(best))
        far = best.repeat_interleave(page, dim=-1)[..., : k.shape[1]]
        near = place >= page * old[border][..., None]
        mask = (far | near) & (place <= position[:, None])
    return attend(q, k, v, Chosen(TokenSelection.from_mask(mask)) & Causal())


def _borders(rows: Tensor, alike: float) -> Tensor:
    """The last border at or before every query: int64 [B, Hkv, Lq] of rows [B, Lq, Hkv, G, D]."""
    unit = F.normalize(rows, dim=-1).transpose(1, 2)  # [B, Hkv, Lq, G, D]
    last = torch.zeros(unit.shape[:2], dtype=torch.int64, device=rows.device)
    found = []
    for i in range(unit.shape[2]):
        index = last[..., None, None, None].expand(-1, -1, 1, *unit.shape[3:])
        cosine = (unit[:, :, i] * unit.gather(2, index)[:, :, 0]).sum(-1).mean(-1)
        last = torch.where(cosine < alike, i, last)
        found.append(last)
    return torch.stack(found, dim=-1)


@judged
def elastic_cache(
    q: Tensor, k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, *, start: int = 0
) -> Tensor:
    """Attention both ways of the active tokens, on cached keys and values with theirs new in place.

    One layer of a step of `caches.policies.ElasticCache`, which decides by drift when all are new.
    Shapes: q [B, A, Hq, D], new_k [B, A, Hkv, D], new_v [B, A, Hkv, Dv] of the tokens start ...
    start + A - 1; k [B, L, Hkv, D], v [B, L, Hkv, Dv] as cached.
    Equals: with all tokens active, dense attention on the new keys and values.
    """
    stop = start + q.shape[1]
    for name, x, of in (("new_k", new_k, k), ("new_v", new_v, v)):
        need_shape(name, x, (of.shape[0], q.shape[1], *of.shape[2:]), like=of)
        need_dtype(of, **{name: x})
    if not 0 <= start <= k.shape[1] - q.shape[1]:
        raise SelectionError("start", start, f"0 to {k.shape[1] - q.shape[1]} is needed")
    keys = torch.cat([k[:, :start], new_k, k[:, stop:]], dim=1)
    values = torch.cat([v[:, :start], new_v, v[:, stop:]], dim=1)
    return attend(q, keys, values, Dense())


def _same(name: str, statement: str, op: Callable[..., Tensor], **options: Any) -> Identity:
    """Whatever the cut, the newest query on all keys."""

    def claim(draw: Draw) -> Claim:
        inputs = draw.qkv((draw.integer(5, 30),), heads=4, kv_heads=2)
        own = {key: value(draw) for key, value in options.items()}
        return Claim(inputs, lambda q, k, v: op(q, k, v, **own), _newest)

    return Identity(name, statement, claim)


def _causal(op: Callable[..., Tensor], **options: int) -> Identity:
    def claim(draw: Draw) -> Claim:
        return Claim(
            draw.qkv((draw.integer(5, 30),), heads=4, kv_heads=2),
            lambda q, k, v: op(q, k, v, **options),
            lambda q, k, v: attend(q, k, v, Causal()),
        )

    return Identity("everything", "Whatever can be fetched is: causal attention.", claim)


def _fetched(op: Callable[..., Tensor], cache: Callable[..., Any], **options: Any) -> Identity:
    """The cache whose old keys lie on the host, token by token."""

    def claim(draw: Draw) -> Claim:
        start, length = draw.integer(1, 9), draw.integer(10, 16)
        q, k, v = draw.qkv((length,), heads=4, kv_heads=2)

        def steps(q: Tensor) -> Tensor:
            held = cache(_shape(k, v))
            held.append(k[:, :start], v[:, :start])
            found = []
            for i in range(start, length):
                held.append(k[:, i : i + 1], v[:, i : i + 1])
                found.append(held.decode(q[:, i : i + 1]))
            return torch.cat(found, dim=1)

        return Claim((q,), steps, lambda q: op(q[:, start:], k, v, **options))

    return Identity("fetched", "Token by token, from pages on the host.", claim)


def _square(draw: Draw, heads: int, dim: int) -> Tensor:
    q: Tensor = torch.linalg.qr(draw.normal(heads, dim, dim))[0]
    return q


def _square_bases(draw: Draw) -> Claim:
    bases = _square(draw, 2, 3), _square(draw, 2, 4)
    inputs = draw.qkv((draw.integer(5, 30),), heads=4, kv_heads=2)
    return Claim(inputs, lambda q, k, v: matryoshka_kv(q, k, v, *bases), _newest)


def _nested(draw: Draw) -> Claim:
    bases = _square(draw, 2, 3), _square(draw, 2, 4)
    inputs = draw.qkv((draw.integer(5, 30),), heads=4, kv_heads=2)

    def projected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps = (x[..., :2] @ x[..., :2].transpose(1, 2) for x in bases)
        k, v = (torch.einsum("blhd,hde->blhe", x, m) for x, m in zip((k, v), maps, strict=True))
        return _newest(q, k, v)

    return Claim(inputs, lambda q, k, v: matryoshka_kv(q, k, v, *bases, ranks=2), projected)


def _all_active(draw: Draw) -> Claim:
    q, k, v = draw.qkv((draw.integer(3, 9),), heads=4, kv_heads=2)
    old_k, old_v = (draw.normal(*x.shape) for x in (k, v))
    return Claim((q, k, v), lambda q, k, v: elastic_cache(q, old_k, old_v, k, v), attend)


def _nothing_new(draw: Draw) -> Claim:
    q, k, v = draw.qkv((draw.integer(6, 9),), heads=4, kv_heads=2)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return elastic_cache(q[:, 2:5], k, v, k[:, 2:5], v[:, 2:5], start=2)

    return Claim((q, k, v), step, lambda q, k, v: attend(q, k, v)[:, 2:5])


def _basis_operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    L, H, K, D = shape["grid"][0], shape["heads"], shape["kv_heads"], shape["head_dim"]
    return (1, L, H, D), (1, L, K, D), (1, L, K, D), (K, D, D // 2), (K, D, D // 2)


def _elastic_operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    L, H, K, D = shape["grid"][0], shape["heads"], shape["kv_heads"], shape["head_dim"]
    return (1, 16, H, D), *((1, n, K, D) for n in (L, L, 16, 16))


_SHAPES = ({"grid": (4096,), "heads": 8, "kv_heads": 2, "head_dim": 64},)


def _entry(
    name: str,
    op: Callable[..., Tensor],
    title: str,
    year: int,
    paper: str,
    summary: str,
    *identities: Identity,
    operands: Callable[[Mapping[str, Any]], tuple[tuple[int, ...], ...]] | None = None,
) -> System:
    return System(
        name=name,
        title=title,
        year=year,
        paper=paper,
        kind="operator",
        summary=summary,
        op=op,
        identities=identities,
        reference_shapes=_SHAPES,
        family=FAMILY,
        engine="torch",
        operands=operands,
    )


STORE_SYSTEMS = (
    _entry(
        "lean_attention",
        lean_attention,
        "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of "
        "Transformers",
        2024,
        "Sanovar et al. (Microsoft); arXiv 2405.10480",
        "Every program takes an equal share of all tiles of keys, across the borders of heads.",
        _same(
            "any_share",
            "Shares of any size.",
            lean_attention,
            tile=lambda draw: draw.integer(1, 9),
            programs=lambda draw: draw.integer(1, 40),
        ),
    ),
    _entry(
        "dist_attention",
        dist_attention,
        "Infinite-LLM: Efficient LLM Service for Long Context with DistAttention and Distributed KVCache",
        2024,
        "Lin et al. (Alibaba, SJTU); arXiv 2401.02669",
        "Keys in segments on several devices; queries travel, outputs join by their lse.",
        _same(
            "any_cut",
            "Segments of any number.",
            dist_attention,
            segments=lambda draw: draw.integer(1, 40),
        ),
    ),
    _entry(
        "vattention",
        vattention,
        "vAttention: Dynamic Memory Management for Serving LLMs without PagedAttention",
        2024,
        "Prabhu et al. (Microsoft); arXiv 2405.04437",
        "Rows that are contiguous in addresses, with memory mapped behind them as they grow.",
        _same("in_place", "The store changes nothing.", vattention),
    ),
    _entry(
        "eigen_attention",
        eigen_attention,
        "Eigen Attention: Attention in Low-Rank Space for KV Cache Compression",
        2024,
        "Saxena et al. (Purdue); arXiv 2408.05646",
        "Keys and values in the subspaces that hold most of their singular values.",
        _same("all_energy", "All of it.", eigen_attention, energy=lambda draw: 1.0),
    ),
    _entry(
        "matryoshka_kv",
        matryoshka_kv,
        "MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection",
        2024,
        "Lin et al.; arXiv 2410.14731",
        "Trained orthogonal bases whose first columns are bases too: a rank per need.",
        Identity("square_bases", "Bases of full rank: attention.", _square_bases),
        Identity("nested", "The first columns: attention on projected keys and values.", _nested),
        operands=_basis_operands,
    ),
    _entry(
        "retrieval_attention",
        retrieval_attention,
        "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval",
        2024,
        "Liu et al. (Microsoft); arXiv 2409.10516",
        "First and newest keys on the device; of the rest, on the host, those nearest to the query.",
        _causal(retrieval_attention, keys=40, sinks=2, window=3),
        _fetched(
            retrieval_attention,
            lambda shape: RetrievalCache(
                shape, q_heads=4, max_tokens=16, keys=2, sinks=1, window=2
            ),
            keys=2,
            sinks=1,
            window=2,
        ),
    ),
    _entry(
        "louis_kv",
        louis_kv,
        "LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences",
        2025,
        "arXiv 2510.11292",
        "Pages on the host are fetched where the direction of the queries changes, not at every step.",
        _causal(louis_kv, pages=40, page=2, window=3),
        _fetched(
            louis_kv,
            lambda shape: LouisCache(
                shape, max_tokens=16, alike=0.2, pages=1, page=2, window=3, slots=8
            ),
            alike=0.2,
            pages=1,
            page=2,
            window=3,
        ),
    ),
    _entry(
        "elastic_cache",
        elastic_cache,
        "Attention Is All You Need for KV Cache in Diffusion LLMs",
        2025,
        "arXiv 2510.14973",
        "Active tokens are new at every step, all others cached until attention drifts.",
        Identity("all_active", "All tokens active: dense attention.", _all_active),
        Identity(
            "nothing_new", "Keys and values as cached: rows of dense attention.", _nothing_new
        ),
        operands=_elastic_operands,
    ),
)
