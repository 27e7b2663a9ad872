"""Attention in factors: two patterns, a pattern per head, rows and columns, one axis each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import PatternError
from foveal._judged import judged, judged_alone
from foveal.layers.cross_axis import CrossAxisAttention, attend_lines
from foveal.layers.diagonal import DiagonalAttention, around_diagonal
from foveal.layers.factorised_axes import FactorisedAxesAttention, Form, mix_axes
from foveal.layers.sequence import (
    Arrangement,
    Kind,
    SparseTransformerAttention,
    factorised,
    factors,
    united,
)
from foveal.layers.shards import ShardedAttention, shards
from foveal.patterns import Causal, Neighborhood, Pattern, Sliding
from foveal.scores import Score, Softmax
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.locality.neighborhoods import by_residue


@judged
def sparse_transformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: Kind = "strided",
    stride: int = 128,
    summary: int = 8,
    arrangement: Arrangement = "split",
    depth: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Causal attention in two sparse factors.

    strided: { i - j < stride } and { (i - j) mod stride = 0 }; fixed: { j // stride = i // stride }
    and the same with { j mod stride >= stride - summary }; all with j <= i.

    Shapes: q [B, L, H, D], k and v [B, L, Hkv, D].
    Options: arrangement "split" gives each factor half of the heads, "interleaved" the factor of
    this layer by the parity of `depth`, "merged" the union.
    """
    return factorised(
        q, k, v, kind=kind, stride=stride, summary=summary,
        arrangement=arrangement, depth=depth, implementation=implementation,
    )  # fmt: skip


def _sparse_transformer(
    grid: tuple[int, ...],
    *,
    kind: Kind = "strided",
    stride: int = 128,
    summary: int = 8,
    arrangement: Arrangement = "merged",
    depth: int = 0,
) -> tuple[Pattern, Score]:
    """The union of the two factors, or the one of a layer."""
    near, far = factors(kind, stride, summary)
    if arrangement == "interleaved":
        return far if depth % 2 else near, Softmax()
    return united(near, far), Softmax()


def _near_window(draw: Draw) -> Claim:
    stride, length = draw.integer(2, 5), draw.integer(6, 12)
    return Claim(
        draw.qkv((length,)),
        lambda q, k, v: sparse_transformer(q, k, v, stride=stride, arrangement="interleaved"),
        lambda q, k, v: attend(q, k, v, Neighborhood(stride, causal=True)),
    )


def _far_transposed(draw: Draw) -> Claim:
    stride, count = draw.integer(2, 4), draw.integer(1, 4)

    def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_residue(stride, Causal(), q, k, v)

    return Claim(
        draw.qkv((count * stride,)),
        lambda q, k, v: sparse_transformer(
            q, k, v, stride=stride, arrangement="interleaved", depth=1
        ),
        transposed,
    )


def _all_summary(draw: Draw) -> Claim:
    stride = draw.integer(2, 4)
    return Claim(
        draw.qkv((9,), heads=4, kv_heads=2),
        lambda q, k, v: sparse_transformer(
            q, k, v, kind="fixed", stride=stride, summary=stride, arrangement="merged"
        ),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


SPARSE_TRANSFORMER = System(
    name="sparse_transformer",
    title="Generating Long Sequences with Sparse Transformers",
    year=2019,
    paper="Child, Gray, Radford, Sutskever; arXiv 1904.10509",
    kind="operator",
    summary="Two causal patterns, strided or fixed, in two halves of the heads, in alternate "
    "layers, or united.",
    op=sparse_transformer,
    compose=_sparse_transformer,
    layer=SparseTransformerAttention,
    identities=(
        Identity(
            "near_window", "The near factor is a causal neighborhood of `stride`.", _near_window
        ),
        Identity(
            "far_transposed",
            "The far factor is causal attention after transposing [L / stride, stride].",
            _far_transposed,
        ),
        Identity("all_summary", "Fixed with summary = stride, united, is causal.", _all_summary),
    ),
    reference_shapes=(
        {"grid": (12288,), "heads": 2, "kv_heads": 2, "head_dim": 64},
        {"grid": (3072,), "heads": 2, "kv_heads": 2, "head_dim": 64},
    ),
)


def _shards(
    grid: tuple[int, ...],
    *,
    kv_heads: int = 1,
    block: int = 64,
    local_blocks: int = 32,
    vert_stride: int = 8,
    offset: int = 0,
    dense_heads: int = 0,
    causal: bool = True,
) -> tuple[Pattern, Score]:
    if len(grid) != 1:
        raise PatternError("s2_attention", grid, "one axis is needed")
    sizes = block, local_blocks, vert_stride, offset, dense_heads, causal
    return shards(grid[0], kv_heads, *sizes, torch.device("cpu")), Softmax()


@judged
def s2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 64,
    local_blocks: int = 32,
    vert_stride: int = 8,
    offset: int = 0,
    dense_heads: int = 0,
    causal: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """Attention in which every key head visits its own shard of the key blocks, as `head_shards`
    says.

    Shapes: q [B, L, H, D], k and v [B, L, Hkv, D]; the query heads of a group share its shard.
    """
    if k.dim() != 4:
        raise PatternError("s2_attention", list(k.shape), "one axis is needed")
    sizes = block, local_blocks, vert_stride, offset, dense_heads, causal
    pattern = shards(k.shape[1], k.shape[2], *sizes, k.device)
    return attend(q, k, v, pattern, implementation=implementation)


def _every_block(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(5, 14),), heads=4, kv_heads=2),
        lambda q, k, v: s2_attention(q, k, v, block=4, local_blocks=1, vert_stride=1),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _all_local(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(5, 14),)),
        lambda q, k, v: s2_attention(q, k, v, block=4, local_blocks=4, vert_stride=3),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


S2_ATTENTION = System(
    name="s2_attention",
    title="Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention "
    "Heads",
    year=2024,
    paper="Lin, Zhang, Ge, Ren et al.; arXiv 2407.17678",
    kind="operator",
    summary="Local blocks for every head and, per key head, its own column of blocks out of "
    "vert_stride; heads together should cover the context.",
    op=s2_attention,
    compose=_shards,
    layer=ShardedAttention,
    identities=(
        Identity("every_block", "vert_stride = 1 is causal attention.", _every_block),
        Identity("all_local", "Local blocks for the whole sequence: causal attention.", _all_local),
    ),
    reference_shapes=({"grid": (8192,), "heads": 32, "kv_heads": 8, "head_dim": 128},),
)


@judged_alone
def cross_axis_attention(q: Tensor, k: Tensor, v: Tensor, *, axis: Literal[0, 1] = 0) -> Tensor:
    """Rows (axis 0) or columns (axis 1) of an image as tokens, q and k of length 1, q added to the
    output.

    Shapes: q, k, v and o [B, H, W, heads, D].  In the paper q comes from the image smoothed along
    the other axis than k and v.
    """
    return attend_lines(q, k, v, axis)


def _lengths_are_free(draw: Draw) -> Claim:
    length = draw.normal(2, 3, 1, 2, 1).exp()
    return Claim(
        draw.qkv((3, 4)),
        lambda q, k, v: cross_axis_attention(q * length, k, v[..., :3]),
        lambda q, k, v: cross_axis_attention(q, k, v[..., :3]),
    )


def _columns_are_rows(draw: Draw) -> Claim:
    def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.transpose(1, 2) for x in (q, k, v[..., :3]))
        return cross_axis_attention(*rows).transpose(1, 2)

    return Claim(
        draw.qkv((3, draw.integer(2, 5))),
        lambda q, k, v: cross_axis_attention(q, k, v[..., :3], axis=1),
        turned,
    )


CROSS_AXIS_ATTENTION = System(
    name="cross_axis_attention",
    title="MCANet: Medical Image Segmentation with Multi-Scale Cross-Axis Attention",
    year=2023,
    paper="Shao, Zeng, Hou, Yang; arXiv 2312.08866",
    kind="model",
    summary="Whole rows, then whole columns, as tokens; each direction asks with the features "
    "smoothed along the other. Dense, few tokens, very wide heads, no scale.",
    op=cross_axis_attention,
    layer=CrossAxisAttention,
    identities=(
        Identity("lengths_are_free", "The length of a query does not matter.", _lengths_are_free),
        Identity("columns_are_rows", "Columns are rows of the turned image.", _columns_are_rows),
    ),
    reference_shapes=({"grid": (64, 64), "heads": 8, "kv_heads": 8, "head_dim": 8},),
    engine="torch",
)


@judged_alone
def ifactformer(
    q: tuple[Tensor, ...],
    k: tuple[Tensor, ...],
    v: Tensor,
    *,
    scale: float = 1.0,
    form: Form = "parallel",
) -> Tensor:
    """Linear attention along every axis: v times q_a k_a^T on axis a, no softmax, no 1 / n.

    Shapes: q[a], k[a] [B, grid[a], H, Dk]; v [B, *grid, H, D]; returns [B, *grid, H, axes * D], the
    axes side by side ("parallel"), or [B, *grid, H, D], one axis after the other ("chained").
    """
    return mix_axes(q, k, v, scale, form)


def _identity_weights(draw: Draw) -> Claim:
    grid = (draw.integer(1, 3), 3, 2)
    units = tuple(
        torch.eye(n, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1) for n in grid
    )
    return Claim(
        (draw.normal(2, *grid, 2, 3),),
        lambda v: ifactformer(units, units, v),
        lambda v: torch.cat([v, v, v], dim=-1),
    )


def _one_axis(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(2, 6),)),
        lambda q, k, v: ifactformer((q,), (k,), v),
        lambda q, k, v: ifactformer((q,), (k,), v, form="chained"),
    )


IFACTFORMER = System(
    name="ifactformer",
    title="Implicit factorized transformer approach to fast prediction of turbulent channel flows",
    year=2024,
    paper="Yang, Wang, Wang; arXiv 2412.18840",
    kind="model",
    summary="Softmax-free attention along each axis of a volume, axes side by side (m) or chained "
    "(o).",
    op=ifactformer,
    layer=FactorisedAxesAttention,
    identities=(
        Identity("identity_weights", "q k^T = 1 on every axis copies v.", _identity_weights),
        Identity("one_axis", "On one axis both forms are the same.", _one_axis),
    ),
    reference_shapes=({"grid": (32, 33, 16), "heads": 5, "kv_heads": 5, "head_dim": 32},),
    engine="torch",
)


@judged
def ht_demucs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 400,
    global_tokens: int = 100,
    triangular: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """The static sparse attention of time on time, spectrum on spectrum, and of one on the other.

    Query i stands at c = Lk / Lq * i among the keys and sees the columns trunc(c + o), |o| <= window,
    clamped to the keys; with `triangular` also those at offsets of t (t + 1) / 2 to both sides; and
    the first global_tokens keys.  The first int(global_tokens Lq / Lk) queries see everything.

    Shapes: q [B, Lq, H, D], k and v [B, Lk, Hkv, D].
    """
    pattern = around_diagonal(q.shape[1], k.shape[1], window, global_tokens, triangular)
    return attend(q, k, v, pattern, implementation=implementation)


def _demucs(
    grid: tuple[int, ...],
    *,
    window: int = 400,
    global_tokens: int = 100,
    triangular: bool = False,
) -> tuple[Pattern, Score]:
    return around_diagonal(grid[0], grid[0], window, global_tokens, triangular), Softmax()


def _wide_demucs(draw: Draw) -> Claim:
    length, first = draw.integer(3, 9), draw.integer(0, 2)
    return Claim(
        draw.qkv((length,)),
        lambda q, k, v: ht_demucs(q, k, v, window=length, global_tokens=first),
        attend,
    )


def _no_global(draw: Draw) -> Claim:
    window = draw.integer(0, 3)
    return Claim(
        draw.qkv((9,)),
        lambda q, k, v: ht_demucs(q, k, v, window=window, global_tokens=0),
        lambda q, k, v: attend(
            q, k, v, Neighborhood(2 * window + 1, border="clip") if window else Sliding(0)
        ),
    )


HT_DEMUCS = System(
    name="ht_demucs",
    title="Hybrid Transformers for Music Source Separation",
    year=2022,
    paper="Rouard, Massa, Defossez; arXiv 2211.08553",
    kind="model",
    summary="The static sparse patterns of its self- and cross-attention between time and spectrum: "
    "the diagonal, growing steps away from it, global tokens. The released random and hashed ones "
    "are not offered: the rule of the closed kernel is not established.",
    op=ht_demucs,
    compose=_demucs,
    layer=DiagonalAttention,
    identities=(
        Identity("wide", "A window as long as the sequence is dense attention.", _wide_demucs),
        Identity("no_global", "Without global tokens it is a clipped neighborhood.", _no_global),
    ),
    reference_shapes=({"grid": (4096,), "heads": 8, "kv_heads": 8, "head_dim": 48},),
)
