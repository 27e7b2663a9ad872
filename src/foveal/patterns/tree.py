"""Tokens in groups on several levels: sentences, sections, documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveal._arguments import need_tensors
from foveal._errors import PatternError
from foveal._kept import kept
from foveal.patterns.base import Extent, Part, Pattern
from foveal.patterns.blocked import Reordered

# Tokens of the tiles by which an order is judged, and the share of tiles below which it pays its copies.
_TILE = 64
_WORTHWHILE = 0.8


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Tree(Pattern):
    """Query i sees key j if on some level both are members of the same group.

    groups[l, i] = groups[l, j] >= 0 for some l.

    Shapes: groups int64 [levels, L], the number of each token's group, -1 where it is no member; kept
    as a copy and compared by content.
    Limits: queries and keys are the same L tokens; a token on no level sees nothing (o = 0).
    Equals: one level with one group is Dense(); one level numbered by document is Documents().
    Cost: pairs of the levels together over L^2; tiles are skipped by the groups that they hold, tokens
    being brought together first where that skips more.
    Paper: HDT: Hierarchical Document Transformer (2407.08330).
    """

    groups: Tensor
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        need_tensors(groups=self.groups)
        if self.groups.dim() != 2 or self.groups.is_floating_point():
            raise PatternError("groups", list(self.groups.shape), "integers [levels, L] are needed")
        kept = self.groups.detach().to("cpu", torch.int64, copy=True).contiguous()
        object.__setattr__(self, "groups", kept)
        object.__setattr__(self, "digest", hashlib.sha1(kept.numpy().tobytes()).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[str, torch.Size]:
        return self.digest, self.groups.shape

    @property
    def key(self) -> str:
        levels, length = self.groups.shape
        return f"Tree({levels} levels of {length} #{self.digest[:8]})"

    def validate(self, extent: Extent) -> None:
        length = self.groups.shape[1]
        if extent.Lq != length or extent.Lk != length:
            raise PatternError(
                "groups",
                f"{length} tokens",
                f"as many as queries and keys are needed, {extent.Lq} and {extent.Lk}",
            )

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        visible = torch.zeros_like(q_pos + k_pos, dtype=torch.bool)
        for level in self.groups:
            own = level[q_pos]
            visible |= (own == level[k_pos]) & (own >= 0)
        return visible

    def parts(self, extent: Extent) -> tuple[Part, ...] | None:
        order = _best_order(self)
        if order is None:
            return None
        line, tokens = (extent.Lk,), order[None]
        return (Part(Gathered(self, extent.kv_grid), Extent(line, line), tokens, tokens),)

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        q_tiles, kv_tiles = -(-extent.Lq // q_tile), -(-extent.Lk // kv_tile)
        seen = torch.zeros(q_tiles, kv_tiles, dtype=torch.bool)
        full = torch.zeros_like(seen)
        for level in self.groups:
            found, compact = torch.unique(level, return_inverse=True)
            members = [_members(level, compact, len(found), tile) for tile in (q_tile, kv_tile)]
            seen |= (members[0] @ members[1].T) > 0
            q_only, k_only = (_only_group(level, tile) for tile in (q_tile, kv_tile))
            full |= (q_only[:, None] == k_only) & (q_only[:, None] >= 0)
        return seen.to(torch.uint8) + full.to(torch.uint8)


@dataclass(frozen=True, slots=True, repr=False)
class Gathered(Reordered):
    """A tree with the tokens that see each other brought together."""

    inner: Tree

    @property
    def order(self) -> Tensor:
        order = _best_order(self.inner)
        assert order is not None, "only trees that gain by an order stand in one"
        return order

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        return Tree(self.inner.groups[:, self.order]).tile_map(extent, q_tile, kv_tile)


@kept(32)
def _best_order(tree: Tree) -> Tensor | None:
    """The order in which fewest tiles are visited; None: the one at hand, or nearly."""
    extent = Extent(*((tree.groups.shape[1],),) * 2)

    def visited(groups: Tensor) -> int:
        return int((Tree(groups).tile_map(extent, _TILE, _TILE) > 0).sum())

    now = visited(tree.groups)
    counted = ((visited(tree.groups[:, order]), order) for order in _orders(tree.groups))
    least, best = min(counted, key=lambda pair: pair[0], default=(now, None))
    return best if least < _WORTHWHILE * now else None


def _orders(groups: Tensor) -> Iterator[Tensor]:
    """By the groups of one level; and the members of the higher levels first, by the groups of all."""
    for number, level in enumerate(groups):
        yield torch.argsort(level, stable=True)
        above = (groups[number:] >= 0).any(0)
        yield torch.argsort(above.logical_not().to(torch.int8), stable=True)


def _members(level: Tensor, compact: Tensor, groups: int, tile: int) -> Tensor:
    """Which groups each tile holds members of.  float [tiles, groups], 0 or 1"""
    tiles = -(-len(level) // tile)
    present = torch.zeros(tiles, groups)
    inside = level >= 0
    present[torch.arange(len(level))[inside] // tile, compact[inside]] = 1.0
    return present


def _only_group(level: Tensor, tile: int) -> Tensor:
    """The group of which all tokens of a tile are members, or -1.  int64 [tiles]"""
    ends = [(part.amin(), part.amax()) for part in level.split(tile)]
    least, most = (torch.stack(values) for values in zip(*ends, strict=True))
    return torch.where(least == most, least, -1)
