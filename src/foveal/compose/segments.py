"""Permuted block-sparse attention: keys sorted inside segments, blocks of earlier segments chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import OptionError, SelectionError
from foveal._judged import judged
from foveal.compose.merge import merge
from foveal.engines.tile.rows import places
from foveal.patterns.blocks import Blocks, BlockSelection
from foveal.patterns.dense import Causal
from foveal.patterns.partition import Partition
from foveal.selectors.base import Tiling, against_keys, tile_means
from foveal.selectors.budgets import Mass
from foveal.selectors.last_queries import LastQueries
from foveal.selectors.permute import by_importance, permuted


@judged
def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment: int = 256,
    block: int = 128,
    mass: float = 0.9,
    queries: int = 128,
) -> Tensor:
    """Causal attention to the whole own segment and to chosen blocks of earlier ones, in one softmax.

    Keys are sorted inside each segment by the attention that the last `queries` queries pay them, summed
    over the query heads of a key head; a tile of `block` queries keeps the blocks of earlier segments
    that hold `mass` of the softmax of mean query times mean key, and always the block of token 0.
    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv] of one length.
    Limits: block divides segment.  The last queries decide on the order: a prompt in chunks gives another
    one, and with mass < 1 another result.
    Equals: mass = 1 is causal attention.
    Paper: PBS-Attn (2510.21270).
    """
    if queries < 1:
        raise OptionError("queries", queries, "at least 1 is needed")
    if segment % block:
        raise SelectionError("segment", segment, f"a multiple of the block, {block}, is needed")
    if q.shape[1] != k.shape[1]:
        raise SelectionError(
            "q", list(q.shape), f"as many queries as keys, {k.shape[1]}, are needed"
        )
    own = attend(q, k, v, Causal() & Partition(segment), return_lse=True)
    if k.shape[1] <= segment:
        return own[0]
    with torch.no_grad():
        order = _order(q, k, queries, segment)
        selection = _earlier(q, permuted(k, order), order, segment, block, mass)
    far = attend(q, permuted(k, order), permuted(v, order), Blocks(selection), return_lse=True)
    return merge((own[0], far[0]), (own[1], far[1]))[0]


def _order(q: Tensor, k: Tensor, queries: int, segment: int) -> Tensor:
    columns = LastQueries(queries).map(q, k).sum(2)  # [B, Hq, L]
    return by_importance(columns.unflatten(1, (k.shape[2], -1)).sum(2), segment)


def _earlier(
    q: Tensor, k: Tensor, order: Tensor, segment: int, block: int, mass: float
) -> BlockSelection:
    """Blocks of the sorted keys in segments before that of the tile."""
    length = q.shape[1]
    tiling = Tiling(length, length, block, block, True)
    s = against_keys(tile_means(q, block), tile_means(k, block)) * q.shape[-1] ** -0.5
    number = torch.arange(tiling.q_blocks, device=q.device) * block // segment
    earlier = number < number[:, None]
    shares = torch.softmax(s.masked_fill(~earlier, -torch.inf), dim=-1)
    kept = Mass(mass).keep(shares.nan_to_num(0.0).masked_fill(~earlier, -torch.inf), tiling)
    if mass == 1.0:
        kept = torch.ones_like(kept)
    first = (order == 0).to(torch.int8).argmax(-1) // block  # [B, Hkv]
    holds = torch.arange(tiling.kv_blocks, device=q.device) == first[..., None]
    holds = holds.repeat_interleave(q.shape[2] // k.shape[2], dim=1)[:, :, None]
    return BlockSelection(places((kept | holds) & earlier), block, block)
