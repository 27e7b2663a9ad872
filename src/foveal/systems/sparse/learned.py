"""Sparse attention that is learned: entmax, gated blocks, levels, cores, kept tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._judged import judged_alone
from foveal.layers.trainable_sparse_blocks import (
    PyramidSparseAttention,
    SparseLinearAttention,
    pyramid_sparse_attention,
    sparse_linear_attention,
)
from foveal.layers.trainable_sparse_gates import (
    NosaImportance,
    SeerGate,
    nosa,
    polar_heads,
    seer_attention,
)
from foveal.layers.trainable_sparse_spans import (
    CoreContextAttention,
    MonarchAttention,
    PolarAttention,
    SparseKAttention,
)
from foveal.layers.trainable_sparse_tokens import (
    EvictionRouter,
    core_context,
    learnable_token_eviction,
    monarch_attention,
    sparse_k,
    sparsek_attention,
)
from foveal.patterns import Causal, Dense, Sliding
from foveal.scores import Entmax, KeyBias, Softmax
from foveal.systems.base import Claim, Draw, Identity, System

FAMILY = "sparse"


@judged_alone
def adasplash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float = 1.5,
    causal: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """Attention with alpha-entmax weights; `fv.Entmax` goes with every other pattern too.

    Shapes: q [B, *grid, Hq, D], k and v [B, *grid, Hkv, .].
    """
    pattern = Causal() if causal else Dense()
    return attend(q, k, v, pattern, Entmax(alpha), implementation=implementation)


def _projection(s: Tensor) -> Tensor:
    """Rows on the simplex, by sorting."""
    order = torch.sort(s, dim=-1, descending=True).values
    place = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    total = order.cumsum(-1) - 1
    inside = (order * place > total).sum(-1, keepdim=True)
    tau = total.gather(-1, inside - 1) / inside
    return (s - tau).clamp_min(0.0)


def _sparsemax_projects(draw: Draw) -> Claim:
    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bjhd->bihd", _projection(s), v)

    return Claim(
        draw.qkv((draw.integer(3, 9),)),
        lambda q, k, v: adasplash(q, k, v, alpha=2.0, causal=False),
        right,
    )


def _adds_to_one(draw: Draw) -> Claim:
    q, k, v = draw.qkv((7,))
    alpha = 1.1 + 0.1 * draw.integer(0, 9)
    return Claim(
        (q, k),
        lambda q, k: adasplash(q, k, torch.ones_like(v), alpha=alpha),
        lambda q, k: torch.ones_like(v) + 0.0 * q.sum() + 0.0 * k.sum(),
    )


def _translation(draw: Draw) -> Claim:
    q, k, v = draw.qkv((8,))
    shift = draw.normal(2, 1, 2, 3)
    return Claim(
        (q, k, v),
        lambda q, k, v: adasplash(q, k + shift, v),
        lambda q, k, v: adasplash(q, k, v),
    )


ADASPLASH = System(
    name="adasplash",
    title="AdaSplash: Adaptive Sparse Flash Attention",
    year=2025,
    paper="Goncalves, Treviso, Martins; arXiv 2502.12082",
    kind="operator",
    summary="alpha-entmax attention: keys below a threshold per row weigh exactly 0, tiles without others "
    "are skipped.",
    op=adasplash,
    family=FAMILY,
    engine="entmax",
    identities=(
        Identity("sparsemax", "alpha = 2 projects every row on the simplex.", _sparsemax_projects),
        Identity("adds_to_one", "Weights add to 1: values of 1 give 1.", _adds_to_one),
        Identity("translation", "A constant added to all keys changes nothing.", _translation),
    ),
    reference_shapes=({"grid": (8192,), "heads": 16, "kv_heads": 16, "head_dim": 64},),
)


def _seer_operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    (length,), heads, kv_heads = shape["grid"], shape["heads"], shape["kv_heads"]
    dim = shape["head_dim"]
    return (
        (1, length, heads, dim), (1, length, kv_heads, dim), (1, length, kv_heads, dim),
        (1, length, kv_heads, 128), (1, -(-length // 64), kv_heads, 128),
    )  # fmt: skip


def _seer_everything(draw: Draw) -> Claim:
    length = draw.integer(5, 14)
    gates = draw.normal(2, length, 1, 4), draw.normal(2, -(-length // 4), 1, 4)
    return Claim(
        draw.qkv((length,), heads=2, kv_heads=1),
        lambda q, k, v: seer_attention(q, k, v, *gates, block=4, budget=16),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _seer_own_block(draw: Draw) -> Claim:
    count = draw.integer(2, 4)
    length = 4 * count
    gates = draw.normal(2, length, 1, 4), draw.normal(2, count, 1, 4)

    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split(4, dim=1), k.split(4, dim=1), v.split(4, dim=1), strict=True)
        return torch.cat([attend(a, b, c, Causal()) for a, b, c in parts], dim=1)

    return Claim(
        draw.qkv((length,), heads=2, kv_heads=1),
        lambda q, k, v: seer_attention(q, k, v, *gates, block=4, budget=4),
        right,
    )


SEER = System(
    name="seer_attention_r",
    title="SeerAttention-R: Sparse Attention Adaptation for Long Reasoning",
    year=2025,
    paper="Microsoft Research and HKU; arXiv 2506.08889",
    kind="operator",
    summary="A gate distilled from the model's own attention maps picks key blocks per query and key head.",
    op=seer_attention,
    layer=SeerGate,
    family=FAMILY,
    operands=_seer_operands,
    identities=(
        Identity("everything", "A budget of all keys is causal attention.", _seer_everything),
        Identity(
            "own_block", "A budget of one block leaves the query's own block.", _seer_own_block
        ),
    ),
    reference_shapes=({"grid": (8192,), "heads": 32, "kv_heads": 8, "head_dim": 128},),
)


def _pyramid_everything(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(9, 20),)),
        lambda q, k, v: pyramid_sparse_attention(
            q, k, v, levels=((1, 1.0),), q_block=8, kv_block=4, sample=1.0
        ),
        lambda q, k, v: attend(q, k, v, Dense()),
    )


def _pyramid_constant_keys(draw: Draw) -> Claim:
    q, k, v = draw.qkv((24,))
    repeated = k[:, ::2].repeat_interleave(2, dim=1)
    return Claim(
        (q, v),
        lambda q, v: pyramid_sparse_attention(
            q, repeated, v, levels=((1, 0.4), (2, 1.0)), q_block=8, kv_block=4, sample=0.5
        ),
        lambda q, v: attend(q, repeated, v, Dense()),
    )


def _pyramid_causal(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(17, 30),)),
        lambda q, k, v: pyramid_sparse_attention(
            q, k, v, levels=((1, 1.0), (2, 1.0)), q_block=8, kv_block=4, causal=True
        ),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


PYRAMID = System(
    name="pyramid_sparse",
    title="PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation",
    year=2025,
    paper="ZIP Lab, Zhejiang University; arXiv 2512.04025",
    kind="operator",
    summary="Key blocks by rank at full resolution, as means of 2, of 8 keys, or not at all, in one softmax.",
    op=pyramid_sparse_attention,
    layer=PyramidSparseAttention,
    family=FAMILY,
    identities=(
        Identity("everything", "All blocks at level 1 are dense attention.", _pyramid_everything),
        Identity(
            "constant_keys",
            "Equal keys in a group are pooled without error.",
            _pyramid_constant_keys,
        ),
        Identity(
            "causal", "All blocks at level 1 with causal are causal attention.", _pyramid_causal
        ),
    ),
    reference_shapes=({"grid": (16384,), "heads": 12, "kv_heads": 12, "head_dim": 128},),
)


def _sla_everything(draw: Draw) -> Claim:
    q, k, v = draw.qkv((draw.integer(5, 13),))
    weight, bias = draw.normal(4, 4), draw.normal(4)
    return Claim(
        (q, k, v),
        lambda q, k, v: sparse_linear_attention(q, k, v, weight, bias, block=4, critical=1.0),
        lambda q, k, v: attend(q, k, v, Dense()) + bias,
    )


def _sla_linear(draw: Draw) -> Claim:
    """W = I, all blocks: the difference to the sparse part is linear attention."""

    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bihd,bjhd->bhij", q.softmax(-1), k.softmax(-1))
        linear = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
        return sparse_linear_attention(q, k, v, block=4, critical=0.3) + linear

    return Claim(
        draw.qkv((draw.integer(5, 13),)),
        lambda q, k, v: sparse_linear_attention(
            q, k, v, torch.eye(4, dtype=q.dtype), block=4, critical=0.3, rest="all"
        ),
        right,
    )


SLA = System(
    name="sla",
    title="SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
    year=2025,
    paper="Zhang et al. (Tsinghua); arXiv 2509.24006",
    kind="operator",
    summary="Softmax attention on critical key blocks plus learned linear attention on marginal ones.",
    op=sparse_linear_attention,
    layer=SparseLinearAttention,
    family=FAMILY,
    identities=(
        Identity("everything", "All critical: dense attention, and the bias.", _sla_everything),
        Identity("linear", "rest = all adds plain linear attention.", _sla_linear),
    ),
    reference_shapes=({"grid": (32768,), "heads": 12, "kv_heads": 12, "head_dim": 128},),
)


def _monarch_thin(draw: Draw) -> Claim:
    size = draw.integer(2, 4)
    rows, columns = (1, size) if draw.integer(0, 1) else (size, 1)
    return Claim(
        draw.qkv((3 * size,)),
        lambda q, k, v: monarch_attention(q, k, v, rows=rows, columns=columns),
        lambda q, k, v: attend(q, k, v, Dense()),
    )


def _monarch_values(draw: Draw) -> Claim:
    q, k, v = draw.qkv((12,))
    constant = v[:, :1].expand_as(v)
    return Claim(
        (q, k),
        lambda q, k: monarch_attention(q, k, constant, rows=2, columns=3),
        lambda q, k: constant + 0.0 * q.sum() + 0.0 * k.sum(),
    )


MONARCH = System(
    name="monarch_rt",
    title="MonarchRT: Efficient Attention for Real-Time Video Generation",
    year=2026,
    paper="CMU, Buffalo, Morpheus; arXiv 2602.12271",
    kind="operator",
    summary="Attention between tiles of a frame factored over rows and columns, in one refinement step.",
    op=monarch_attention,
    layer=MonarchAttention,
    family=FAMILY,
    engine="torch",
    identities=(
        Identity("thin", "One row or one column: dense attention.", _monarch_thin),
        Identity("values", "Weights add to 1: a constant value comes back.", _monarch_values),
    ),
    reference_shapes=(
        {
            "grid": (4096,), "heads": 4, "kv_heads": 4, "head_dim": 64,
            "options": {"rows": 16, "columns": 16},
        },
    ),
)  # fmt: skip


def _core_single(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(4, 12),), heads=2, kv_heads=1),
        lambda q, k, v: core_context(q, k, v, group=1, window=2),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _core_wide(draw: Draw) -> Claim:
    length = draw.integer(4, 12)
    return Claim(
        draw.qkv((length,)),
        lambda q, k, v: core_context(q, k, v, group=3, window=length),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


CORE = System(
    name="core_context",
    title="Core Context Aware Transformers for Long Context Language Modeling",
    year=2025,
    paper="Chen et al. (SCUT, Pazhou Lab); arXiv 2412.12465",
    kind="operator",
    summary="Recent tokens, and one core token per group of older ones, in one softmax.",
    op=core_context,
    layer=CoreContextAttention,
    family=FAMILY,
    identities=(
        Identity("single", "Groups of one token: causal attention.", _core_single),
        Identity("wide", "A window of the length: causal attention.", _core_wide),
    ),
    reference_shapes=({"grid": (16384,), "heads": 8, "kv_heads": 8, "head_dim": 128},),
)


def _nosa_operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    (length,), heads, kv_heads = shape["grid"], shape["heads"], shape["kv_heads"]
    dim = shape["head_dim"]
    return (
        (1, length, heads, dim), (1, length, kv_heads, dim), (1, length, kv_heads, dim),
        (1, length, kv_heads),
    )  # fmt: skip


def _nosa_everything(draw: Draw) -> Claim:
    length = draw.integer(6, 15)
    q, k, v = draw.qkv((length,), heads=2, kv_heads=1)
    return Claim(
        (q, k, v, draw.normal(2, length, 1)),
        lambda q, k, v, c: nosa(
            q, k, v, c, block=4, budget=4, by_query=3, window=4, stride=2, local_blocks=1
        ),
        lambda q, k, v, c: attend(q, k, v, Causal(), Softmax() + KeyBias(c.transpose(1, 2))),
    )


def _nosa_weights(draw: Draw) -> Claim:
    """The authors' form: attention on v e^c over attention on e^c."""
    length = draw.integer(9, 15)
    q, k, v = draw.qkv((length,), heads=2, kv_heads=1)
    options: dict[str, Any] = {
        "block": 4, "budget": 2, "by_query": 2, "window": 4, "stride": 2, "local_blocks": 1,
    }  # fmt: skip

    def right(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        weight = c.exp()[..., None]
        zero = torch.zeros_like(c)
        above = nosa(q, k, v * weight, zero, **options)
        return above / nosa(q, k, weight, zero, **options)

    return Claim(
        (q, k, v, draw.normal(2, length, 1)),
        lambda q, k, v, c: nosa(q, k, v, c, **options),
        right,
    )


NOSA = System(
    name="nosa",
    title="NOSA: Native and Offloadable Sparse Attention",
    year=2025,
    paper="Tsinghua and OpenBMB; arXiv 2510.13602",
    kind="operator",
    summary="A learned log-weight per key biases the scores and picks the blocks that steps share.",
    op=nosa,
    layer=NosaImportance,
    family=FAMILY,
    operands=_nosa_operands,
    identities=(
        Identity("everything", "All blocks: causal attention with a key bias.", _nosa_everything),
        Identity("weights", "The bias is attention on v e^c over attention on e^c.", _nosa_weights),
    ),
    reference_shapes=({"grid": (4096,), "heads": 32, "kv_heads": 2, "head_dim": 128},),
)


def _eviction_all(draw: Draw) -> Claim:
    q, k, v = draw.qkv((draw.integer(5, 12),), heads=2, kv_heads=1)
    scores = torch.ones(2, q.shape[1], 1, dtype=q.dtype)
    return Claim(
        (q, k, v),
        lambda q, k, v: learnable_token_eviction(q, k, v, scores, window=3),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _eviction_none(draw: Draw) -> Claim:
    q, k, v = draw.qkv((draw.integer(8, 14),), heads=2, kv_heads=1)
    scores = -torch.ones(2, q.shape[1], 1, dtype=q.dtype)
    return Claim(
        (q, k, v),
        lambda q, k, v: learnable_token_eviction(q, k, v, scores, window=3, sink_tokens=2),
        lambda q, k, v: attend(q, k, v, Sliding(2, 0, sink_tokens=2)),
    )


EVICTION = System(
    name="learnable_token_eviction",
    title="Linear Attention with Learnable Token Eviction",
    year=2025,
    paper="He, Garner (Idiap); arXiv 2510.20787",
    kind="operator",
    summary="A window, the first tokens, and every token that a small convolution scores above 0.",
    op=learnable_token_eviction,
    layer=EvictionRouter,
    family=FAMILY,
    operands=_nosa_operands,
    identities=(
        Identity("all", "All kept: causal attention.", _eviction_all),
        Identity("none", "None kept: a window with sinks.", _eviction_none),
    ),
    reference_shapes=({"grid": (8192,), "heads": 8, "kv_heads": 2, "head_dim": 128},),
)


def _sparsek_all(draw: Draw) -> Claim:
    length = draw.integer(4, 10)
    q, k, v = draw.qkv((length,), heads=2, kv_heads=1)
    return Claim(
        (q, k, v, draw.normal(2, length, 1)),
        lambda q, k, v, u: sparsek_attention(q, k, v, u, keys=length),
        lambda q, k, v, u: attend(q, k, v, Causal()) + 0.0 * u.sum(),
    )


def _sparsek_hard(draw: Draw) -> Claim:
    """Scores at least 1 apart: p is hard top-k."""
    length = draw.integer(5, 10)
    q, k, v = draw.qkv((length,))
    u = 1.5 * draw.permutation(length).double()[None, :, None].expand(2, -1, 2)
    at = torch.arange(length)

    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for t in range(length):
            best = torch.topk(u[0, : t + 1, 0], min(3, t + 1)).indices
            rows.append(attend(q[:, t : t + 1], k[:, best], v[:, best]))
        return torch.cat(rows, dim=1) + 0.0 * at[None, :, None, None]

    return Claim((q, k, v), lambda q, k, v: sparsek_attention(q, k, v, u, keys=3), right)


def _sparsek_total(draw: Draw) -> Claim:
    u = draw.normal(2, draw.integer(5, 12))
    return Claim(
        (u,),
        lambda u: sparse_k(u, 3).sum(-1),
        lambda u: torch.full_like(u[:, 0], 3.0) + 0.0 * u.sum(),
    )


SPARSEK = System(
    name="sparsek",
    title="Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range Transformers",
    year=2024,
    paper="Lou, Jia, Zheng, Tu; arXiv 2406.16747",
    kind="operator",
    summary="A differentiable top-k over learned key scores: their projection on sums of k.",
    op=sparsek_attention,
    layer=SparseKAttention,
    family=FAMILY,
    engine="torch",
    operands=_nosa_operands,
    identities=(
        Identity("all", "k of all keys: causal attention.", _sparsek_all),
        Identity("hard", "Scores 1 apart: hard top-k.", _sparsek_hard),
        Identity("total", "The projection adds to k.", _sparsek_total),
    ),
    reference_shapes=({"grid": (1024,), "heads": 4, "kv_heads": 4, "head_dim": 64},),
)


def _polar_all(draw: Draw) -> Claim:
    q, k, v = draw.qkv((draw.integer(4, 9),), heads=4, kv_heads=2)
    scores = draw.normal(2, 2)
    return Claim(
        (q, k, v),
        lambda q, k, v: polar_heads(q, k, v, scores, heads=2),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _polar_zero(draw: Draw) -> Claim:
    """What is left out of all heads is 0: kept and left-out heads add to dense."""
    q, k, v = draw.qkv((draw.integer(4, 9),), heads=4, kv_heads=2)
    scores = draw.normal(2, 2)
    return Claim(
        (q, k, v),
        lambda q, k, v: (
            polar_heads(q, k, v, scores, heads=1) + polar_heads(q, k, v, -scores, heads=1)
        ),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _polar_operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    return (*_nosa_operands(shape)[:3], (1, shape["kv_heads"]))


POLAR = System(
    name="polar_sparsity",
    title="Polar Sparsity: High Throughput Batched LLM Inferencing with Scalable Contextual Sparsity",
    year=2025,
    paper="Shrestha et al.; arXiv 2505.14884",
    kind="operator",
    summary="A router keeps the best heads of every sequence; the others are not computed.",
    op=polar_heads,
    layer=PolarAttention,
    family=FAMILY,
    operands=_polar_operands,
    identities=(
        Identity("all", "All heads: dense attention.", _polar_all),
        Identity("halves", "Kept heads and the others add to dense.", _polar_zero),
    ),
    reference_shapes=(
        {
            "grid": (4096,), "heads": 32, "kv_heads": 8, "head_dim": 128,
            "options": {"heads": 4},
        },
    ),
)  # fmt: skip

LEARNED: tuple[System, ...] = (
    ADASPLASH, SEER, PYRAMID, SLA, MONARCH, CORE, NOSA, EVICTION, SPARSEK, POLAR,
)  # fmt: skip
