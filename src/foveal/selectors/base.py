"""What a selector and a budget are, and how the two make a list of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from foveal._arguments import need_tensors
from foveal._errors import SelectionError, ShapeError
from foveal._judged import need_dtype, need_shape
from foveal.engines.tile.rows import places
from foveal.patterns.blocks import BlockSelection


@dataclass(frozen=True)
class Tiling:
    """Tiles of `q_block` queries and blocks of `kv_block` keys; the last query stands on the last key."""

    Lq: int
    Lk: int
    q_block: int
    kv_block: int
    causal: bool

    @property
    def q_blocks(self) -> int:
        return -(-self.Lq // self.q_block)

    @property
    def kv_blocks(self) -> int:
        return -(-self.Lk // self.kv_block)

    def last(self, device: torch.device) -> Tensor:
        """Position of the last query of each tile.  int64 [q_blocks]"""
        stop = (torch.arange(self.q_blocks, device=device) + 1) * self.q_block
        return stop.clamp(max=self.Lq) - 1 + (self.Lk - self.Lq)

    def first(self, device: torch.device) -> Tensor:
        """Position of the first query of each tile.  int64 [q_blocks]"""
        return torch.arange(self.q_blocks, device=device) * self.q_block + (self.Lk - self.Lq)

    def visible(self, device: torch.device) -> Tensor:
        """Whether some query of a tile may see a key of a block.  bool [q_blocks, kv_blocks]"""
        if not self.causal:
            return torch.ones(self.q_blocks, self.kv_blocks, dtype=torch.bool, device=device)
        block = torch.arange(self.kv_blocks, device=device) * self.kv_block
        return block <= self.last(device)[:, None]


class Selector(Protocol):
    """Scores the key blocks for every tile of queries; a frozen value in a file of its own."""

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        """Float [B, heads, q_blocks, kv_blocks]; heads is 1, the key heads or the query heads.

        q [B, Lq, Hq, D], k [B, Lk, Hkv, D], in float32 or float64, without gradients.  What a tile may
        not see is hidden by the caller afterwards; a selector that normalises hides it itself.
        """


class Budget(Protocol):
    """Which of the scored blocks are kept."""

    def keep(self, scores: Tensor, tiling: Tiling) -> Tensor:
        """bool like scores [..., q_blocks, kv_blocks], where -inf marks what may not be kept."""


def select(
    q: Tensor,
    k: Tensor,
    selector: Selector,
    budget: Budget,
    *,
    q_block: int = 128,
    kv_block: int = 128,
    causal: bool = True,
) -> BlockSelection:
    """The blocks that `budget` keeps of those that `selector` scores, per head; no gradient.

    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D].  Ties go to the lower block; scores in float32, or in
    float64 for float64 inputs; what a causal tile cannot see is never listed.
    """
    _fit(q, k)
    for name, size in (("q_block", q_block), ("kv_block", kv_block)):
        if not isinstance(size, int) or size < 1:
            raise SelectionError(name, size, "a whole number of at least 1 token is needed")
    tiling = Tiling(q.shape[1], k.shape[1], q_block, kv_block, causal)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    visible = tiling.visible(q.device)
    with torch.no_grad():
        scores = selector.scores(q.detach(), k.detach(), tiling)
        if scores.shape[-2:] != visible.shape:
            raise SelectionError(
                "scores", list(scores.shape), f"[B, heads, {tiling.q_blocks}, {tiling.kv_blocks}]"
            )
        scores = scores.to(wide).masked_fill(~visible, -torch.inf)
        kept = budget.keep(scores, tiling) & visible
    return BlockSelection(places(kept), q_block, kv_block)


def _fit(q: Tensor, k: Tensor) -> None:
    need_tensors(q=q, k=k)
    need_shape("q", q, (-1, -1, -1, -1), like=q)
    need_shape("k", k, (len(q), -1, -1, q.shape[3]), like=q)
    need_dtype(q, k=k)
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        needed = f"heads that divide the {q.shape[2]} query heads are needed"
        raise ShapeError("k", list(k.shape), needed)


def group_queries(q: Tensor, k: Tensor) -> Tensor:
    """[B, L, Hkv, G, D] of q [B, L, Hq, D]"""
    result: Tensor = q.unflatten(2, (k.shape[2], -1))
    return result


def tile_means(x: Tensor, tile: int) -> Tensor:
    """Mean of every tile of tokens, the last over those it has.  [B, tiles, H, D] of [B, L, H, D]"""
    length = x.shape[1]
    tiles = -(-length // tile)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    whole = length // tile
    means = x[:, : whole * tile].unflatten(1, (whole, tile)).mean(2, dtype=wide)
    if whole < tiles:
        means = torch.cat([means, x[:, whole * tile :].mean(1, keepdim=True, dtype=wide)], dim=1)
    result: Tensor = means
    return result


def against_keys(q: Tensor, k: Tensor) -> Tensor:
    """Products [B, Hq, Lq, Lk] of queries [B, Lq, Hq, D] with the keys [B, Lk, Hkv, D] of their group."""
    found = torch.einsum("bihgd,bjhd->bhgij", group_queries(q, k), k)
    return found.flatten(1, 2)
