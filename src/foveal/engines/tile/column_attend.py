"""Attention along unaligned blocks and columns on a GPU, forward only."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.engines.tile.spec import padded
from foveal.patterns.base import Pattern
from foveal.patterns.combine import Intersection
from foveal.patterns.dense import Causal
from foveal.patterns.selections import Chosen, ColumnSelection


def listed_columns(pattern: Pattern) -> tuple[ColumnSelection, bool] | None:
    """The lists of a pattern of blocks and columns, and whether Causal() is joined to it by `&`."""
    members = pattern.flattened() if isinstance(pattern, Intersection) else (pattern,)
    chosen = [p for p in members if isinstance(p, Chosen)]
    if len(chosen) != 1 or any(p != Causal() for p in members if p is not chosen[0]):
        return None
    selection = chosen[0].selection
    return (selection, len(members) > 1) if isinstance(selection, ColumnSelection) else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, selection: ColumnSelection, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and base-2 lse float32 [B, Hq, Lq]."""
    from foveal.engines.tile.column_kernel import column_attend_forward
    from foveal.engines.tile.launches import Launch

    B, Lq, heads, dim = q.shape
    starts, columns = (
        x.to(torch.int32).expand(B, -1, -1, -1).contiguous()
        for x in (selection.starts, selection.columns)
    )
    lists, tiles = starts.shape[1:3]
    o = q.new_empty(B, Lq, heads, v.shape[3])
    lse = q.new_empty(B, heads, Lq, dtype=torch.float32)
    arguments = (
        q, k, v, o, lse, starts, columns, q.stride()[:3], k.stride()[:3], v.stride()[:3], o.stride()[:3],
        heads, heads // k.shape[2], heads // lists, lists, Lq, k.shape[1], tiles,
        starts.shape[3], columns.shape[3], k.shape[1] - Lq, scale,
    )  # fmt: skip
    sizes = dim, padded(dim), v.shape[3], padded(v.shape[3])
    options = {
        "BLOCK": padded(selection.kv_block), "SPAN": selection.kv_block, "ROWS": selection.q_block,
        "SPEC": sizes, "CAUSAL": causal, "STAGES": 2, "num_warps": 4 if selection.q_block <= 64 else 8,
    }  # fmt: skip
    Launch(column_attend_forward, B * heads * tiles, arguments, options)()
    return o, lse
