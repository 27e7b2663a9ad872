"""Prefill of existing models without training: blocks, columns and diagonals found from q and k."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import OptionError
from foveal._judged import judged
from foveal.compose.segments import attend_segments
from foveal.compose.selected import attend_selected
from foveal.patterns import Causal, Chosen, Pattern, Sliding, TokenSelection
from foveal.selectors import (
    Antidiagonal,
    Forced,
    LastQueries,
    LowBit,
    Mass,
    Threshold,
    Tiling,
    VerticalSlash,
    by_importance,
    permuted,
)
from foveal.selectors.base import against_keys, tile_means
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.sparse.heads import Head, Mode, attend_planned
from foveal.systems.sparse.shapes import qkv_shapes


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, Causal())


@judged
def minference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    vertical: int = 1000,
    slash: int = 6096,
    queries: int = 64,
    sinks: int = 30,
    local: int = 100,
    tile: int = 64,
    heads: Sequence[Head] | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Vertical-slash attention: heavy columns and heavy diagonals of the last queries, one softmax.

    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv].  Options as of `VerticalSlash`; heads, what
    each query head computes instead (window, columns and diagonals, blocks), as `search_heads` finds it
    offline and a plan in JSON keeps it.
    Limits: a prompt in chunks gives other lists; the columns are those of its last queries.  On a GPU a
    kernel walks the lists; their gradient meets every key.
    """
    if heads is not None:
        return attend_planned(q, k, v, heads)[0]
    found = VerticalSlash(vertical, slash, queries, sinks, local, tile).select(q, k)
    return attend(q, k, v, Chosen(found) & Causal(), implementation=implementation)


def _every_diagonal(draw: Draw) -> Claim:
    length = draw.integer(5, 12)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: minference(q, k, v, slash=length, vertical=1, tile=4, local=1),
        _causal,
    )


def _short_diagonals(draw: Draw) -> Claim:
    # Distances 0 ... 3 of a tile of one query are a window; one column is among them.
    length = draw.integer(6, 12)
    return Claim(
        draw.qkv((length,)),
        lambda q, k, v: minference(q, k, v, slash=4, local=4, vertical=1, sinks=1, tile=1),
        lambda q, k, v: attend(q, k, v, Sliding(3, sink_tokens=1)),
    )


def _planned_heads(draw: Draw) -> Claim:
    """Heads with entries of their own are those operators, head by head."""
    length = draw.integer(9, 14)
    modes = Mode("a_shape", 2, 3), Mode("vertical_slash", 1, length), Mode("dense")
    heads = tuple(Head("none", (modes[draw.integer(0, 2)],)) for _ in range(4))
    patterns = {"a_shape": Sliding(2, sink_tokens=2)}

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = []
        for h, head in enumerate(heads):
            pattern = patterns.get(head.modes[0].kind, Causal())
            g = slice(h // 2, h // 2 + 1)
            own.append(attend(q[:, :, h : h + 1], k[:, :, g], v[:, :, g], pattern))
        return torch.cat(own, dim=2)

    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: minference(q, k, v, heads=heads),
        alone,
    )


MINFERENCE = System(
    name="minference",
    title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
    year=2024,
    paper="Jiang et al. (Microsoft); arXiv 2407.02490",
    kind="operator",
    family="sparse",
    summary="Columns and diagonals that are heavy in the attention of the last 64 queries, for every "
    "query; blocks at any start with single columns beside them.",
    op=minference,
    identities=(
        Identity("every_diagonal", "All distances are causal attention.", _every_diagonal),
        Identity(
            "short_diagonals",
            "The smallest distances and the first column are a window with a sink.",
            _short_diagonals,
        ),
        Identity("planned_heads", "A plan is its modes, head by head.", _planned_heads),
    ),
    operands=qkv_shapes,
    reference_shapes=({"grid": (131072,), "heads": 32, "kv_heads": 8, "head_dim": 128},),
)


@judged
def xattention(
    q: Tensor, k: Tensor, v: Tensor, *, mass: float = 0.9, stride: int = 16, block: int = 128
) -> Tensor:
    """Causal attention to the blocks whose antidiagonal sums hold `mass` of their softmax.

    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv].  The first column of blocks and
    the diagonal are always kept, on top of the mass.
    """
    budget = Forced(Mass(mass), sinks=1, locals=1, counted=False)
    return attend_selected(q, k, v, Antidiagonal(stride), budget, q_block=block, kv_block=block)


def _whole_mass(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(9, 20),), heads=4, kv_heads=2),
        lambda q, k, v: xattention(q, k, v, mass=1.0, stride=2, block=4),
        _causal,
    )


XATTENTION = System(
    name="xattention",
    title="XAttention: Block Sparse Attention with Antidiagonal Scoring",
    year=2025,
    paper="Xu et al. (MIT, Tsinghua, SJTU, NVIDIA); arXiv 2503.16428",
    kind="operator",
    family="sparse",
    summary="Scores blocks by sums along antidiagonals, one product on folded tokens, and keeps the "
    "shortest list that holds 0.9 of their softmax.",
    op=xattention,
    identities=(Identity("whole_mass", "The whole mass is causal attention.", _whole_mass),),
    operands=qkv_shapes,
    reference_shapes=({"grid": (65536,), "heads": 32, "kv_heads": 8, "head_dim": 128},),
)


def _all_mass(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(9, 24),), heads=4, kv_heads=2),
        lambda q, k, v: attend_segments(q, k, v, segment=8, block=4, mass=1.0, queries=4),
        _causal,
    )


def _one_segment(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(3, 8),), heads=4, kv_heads=2),
        lambda q, k, v: attend_segments(q, k, v, segment=8, block=4, mass=0.1, queries=4),
        _causal,
    )


def pbs_pattern(
    q: Tensor,
    k: Tensor,
    *,
    segment: int = 256,
    block: int = 128,
    mass: float = 0.9,
    queries: int = 128,
) -> Pattern:
    """The pairs of `pbs_attention` on keys as they stand: its sorted blocks as lists of single keys."""
    length, tiles = k.shape[1], -(-q.shape[1] // block)
    groups = q.shape[2] // k.shape[2]
    with torch.no_grad():
        paid = LastQueries(queries).map(q, k).sum(2).unflatten(1, (k.shape[2], -1)).sum(2)
        order = by_importance(paid, segment)
        s = against_keys(tile_means(q, block), tile_means(permuted(k, order), block))
        number = torch.arange(tiles, device=q.device) * block // segment
        earlier = number < number[:, None]
        shares = torch.softmax(
            (s * q.shape[-1] ** -0.5).masked_fill(~earlier, -torch.inf), dim=-1
        ).nan_to_num(0.0).masked_fill(~earlier, -torch.inf)  # fmt: skip
        kept = Mass(mass).keep(shares, Tiling(length, length, block, block, True))
        first = (order == 0).to(torch.int8).argmax(-1).repeat_interleave(groups, dim=1) // block
        kept = kept | (torch.arange(tiles, device=q.device) == first[..., None])[:, :, None]
        kept = (kept | (mass == 1.0)) & earlier
        place = order.argsort(-1).repeat_interleave(groups, dim=1) // block
        keys = kept.gather(-1, place[:, :, None].expand(-1, -1, tiles, -1))
        own = torch.arange(length, device=q.device) // segment == number[:, None]
    return Chosen(TokenSelection.from_mask(keys | own, block)) & Causal()


PBS_ATTENTION = System(
    name="pbs_attention",
    title="Sparser Block-Sparse Attention via Token Permutation",
    year=2025,
    paper="Fudan University; arXiv 2510.21270",
    kind="operator",
    family="sparse",
    summary="Sorts keys inside segments by the attention of the last queries, then keeps the blocks "
    "of earlier segments that hold 0.9 of the pooled softmax; the own segment is whole.",
    op=attend_segments,
    identities=(
        Identity("all_mass", "The whole mass is causal attention, in any order.", _all_mass),
        Identity("one_segment", "Inside the first segment it is causal attention.", _one_segment),
    ),
    operands=qkv_shapes,
    reference_shapes=({"grid": (131072,), "heads": 32, "kv_heads": 8, "head_dim": 128},),
)


@judged
def sale(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    threshold: float = 0.004,
    bits: int = 4,
    sink: int = 32,
    local: int = 128,
    q_block: int = 64,
    kv_block: int = 32,
) -> Tensor:
    """Causal attention to the tiles in which an estimated weight, relative to a local mass, is large.

    A tile is kept if exp(s^_ij - m_i) / l_i > threshold for some pair, s^ from `bits`-bit queries and
    keys, m and l those of the first `sink` and the last `local` keys of i; tiles of those are kept.
    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv].  threshold = 0 is causal attention.
    """
    if threshold < 0:
        raise OptionError("threshold", threshold, "at least 0 is needed")
    value = math.log(threshold) if threshold > 0 else -math.inf
    budget = Threshold(value)
    selector = LowBit(bits, sink, local)
    return attend_selected(q, k, v, selector, budget, q_block=q_block, kv_block=kv_block)


def _no_threshold(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((draw.integer(9, 20),), heads=4, kv_heads=2),
        lambda q, k, v: sale(q, k, v, threshold=0.0, sink=2, local=3, q_block=4, kv_block=2),
        _causal,
    )


def _high_threshold(draw: Draw) -> Claim:
    # Nothing but the sink and the local keys is kept by tiles of one pair.
    return Claim(
        draw.qkv((draw.integer(9, 20),)),
        lambda q, k, v: sale(q, k, v, threshold=1e30, sink=2, local=3, q_block=1, kv_block=1),
        lambda q, k, v: attend(q, k, v, Sliding(2, sink_tokens=2)),
    )


SALE = System(
    name="sale",
    title="SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling",
    year=2025,
    paper="Peking University; arXiv 2505.24179",
    kind="operator",
    family="sparse",
    summary="Estimates every score from 4-bit queries and keys and keeps the tiles whose largest "
    "weight, relative to an exact local mass, passes a threshold.",
    op=sale,
    identities=(
        Identity("no_threshold", "Threshold 0 is causal attention.", _no_threshold),
        Identity("high_threshold", "A high threshold leaves sink and window.", _high_threshold),
    ),
    operands=qkv_shapes,
    reference_shapes=({"grid": (65536,), "heads": 32, "kv_heads": 8, "head_dim": 128},),
)
