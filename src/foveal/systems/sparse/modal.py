"""Prefill of prompts with tokens of several kinds, such as text and frames of a video."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import OptionError
from foveal._judged import judged
from foveal.patterns import Causal, Sliding
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.sparse.heads import Head, Mode, attend_planned
from foveal.systems.sparse.shapes import qkv_shapes


@judged
def mminference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kinds: Tensor | None = None,
    *,
    heads: Sequence[Head] = (Head("none", (Mode("grid", 256, 1024),)),),
) -> Tensor:
    """Causal attention in which every head has a pattern of its own, on tokens grouped by their kind.

    A head attends as a mode says (window, columns and diagonals, blocks, or a comb of keys that repeat from
    frame to frame beside a window), on the whole sequence, for the queries of each kind apart, or for each
    pair of kinds of queries and keys, joined in one softmax.  Keys of a comb and of a kind are gathered, so
    that they stand side by side.
    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv]; kinds int [L], 0 and up (None: one kind).
    Options: heads, one entry per query head or one for all, as `search_heads` finds them offline and a plan
    in JSON keeps them.  The paper's estimate of stride and place of a comb is not established; here it is the
    comb that holds most of the last queries' mass beyond its share of the keys.
    Limits: a prompt in chunks gives other lists; what the last queries attend to decides.
    Equals: dense modes are causal attention for every boundary.
    Paper: MMInference (2504.16083).
    """
    if not isinstance(heads, Sequence):
        raise OptionError("heads", repr(heads), "a sequence of Head is needed")
    own = tuple(heads) * q.shape[2] if len(heads) == 1 else tuple(heads)
    return attend_planned(q, k, v, own, kinds)[0]


def _kinds(draw: Draw, length: int) -> Tensor:
    return torch.tensor([draw.integer(0, 1) for _ in range(length - 2)] + [0, 1])


def _dense_cells(draw: Draw) -> Claim:
    length = draw.integer(5, 12)
    kinds, boundary = _kinds(draw, length), ("query", "both")[draw.integer(0, 1)]
    modes = (Mode("dense"),) * (2 if boundary == "query" else 4)
    head = Head("query" if boundary == "query" else "both", modes)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: mminference(q, k, v, kinds, heads=(head,)),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _wide_grid(draw: Draw) -> Claim:
    length = draw.integer(5, 12)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: mminference(q, k, v, heads=(Head("none", (Mode("grid", 4, length),)),)),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _windows_by_query(draw: Draw) -> Claim:
    """With one mode for both kinds the boundary between queries does not matter."""
    length = draw.integer(6, 12)
    kinds = _kinds(draw, length)
    head = Head("query", (Mode("a_shape", 1, 3),) * 2)
    return Claim(
        draw.qkv((length,), heads=4, kv_heads=2),
        lambda q, k, v: mminference(q, k, v, kinds, heads=(head,)),
        lambda q, k, v: attend(q, k, v, Sliding(2, sink_tokens=1)),
    )


MMINFERENCE = System(
    name="mminference",
    title="MMInference: Accelerating Pre-filling for Long-Context VLMs via Modality-Aware Permutation "
    "Sparse Attention",
    year=2025,
    paper="Li et al. (Surrey, Microsoft), ICML 2025; arXiv 2504.16083",
    kind="operator",
    family="sparse",
    summary="A pattern per head on tokens grouped by their kind: combs that repeat from frame to frame, and "
    "patterns for each pair of kinds of queries and keys, found offline.",
    op=mminference,
    identities=(
        Identity("dense_cells", "Dense modes in every cell are causal attention.", _dense_cells),
        Identity("wide_grid", "A window of the length is causal attention.", _wide_grid),
        Identity(
            "windows_by_query", "One window for all kinds of queries is that window.",
            _windows_by_query,
        ),
    ),
    operands=qkv_shapes,
    reference_shapes=({"grid": (16384,), "heads": 16, "kv_heads": 4, "head_dim": 128},),
)  # fmt: skip
