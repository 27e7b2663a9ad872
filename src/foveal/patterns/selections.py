"""Lists finer than blocks: single keys, runs of keys, unaligned blocks with columns, and heads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from foveal._errors import SelectionError
from foveal.patterns.base import FULL, PARTIAL, Extent, Pattern, for_heads

_TILE = 64


@dataclass(frozen=True, eq=False)
class _KeyLists:
    """Lists of a tile of `q_block` queries, per head; heads is 1, the key heads or the query heads."""

    def rows(self, tiles: Tensor, Lk: int) -> Tensor:
        """Which keys the tiles see.  bool [B or 1, heads, tiles, Lk]"""
        raise NotImplementedError

    @property
    def lists(self) -> tuple[Tensor, ...]:
        """The tensors, each [B or 1, heads, q_blocks, n]."""
        values = (getattr(self, entry.name) for entry in fields(self))
        return tuple(x for x in values if isinstance(x, Tensor))

    @property
    def queries_per_list(self) -> int:
        size = getattr(self, "q_block", 1)
        return int(size)

    def __post_init__(self) -> None:
        if self.queries_per_list < 1:
            raise SelectionError("q_block", self.queries_per_list, "at least 1 token is needed")
        for entry in fields(self):
            x = getattr(self, entry.name)
            if isinstance(x, Tensor) and (
                x.dim() != 4 or x.is_floating_point() or x.shape[:3] != self.lists[0].shape[:3]
            ):
                needed = "integers [B, heads, q_blocks, n] are needed, alike in the first three"
                raise SelectionError(entry.name, list(x.shape), needed)


@dataclass(frozen=True, eq=False)
class TokenSelection(_KeyLists):
    """Single keys: every list ascends, holds no key twice, and ends in -1 where it is shorter than n.

    Shapes: indices int [B or 1, heads, q_blocks, n]; q_block queries share a list.
    """

    indices: Tensor
    q_block: int = 1

    def __post_init__(self) -> None:
        _KeyLists.__post_init__(self)
        _check_ascending("indices", self.indices)

    @classmethod
    def from_mask(cls, mask: Tensor, q_block: int = 1) -> TokenSelection:
        """The selection of the keys that are true in `mask` [B, heads, q_blocks, Lk]."""
        width = int(mask.sum(-1).max()) if mask.numel() else 0
        place = torch.arange(mask.shape[-1], device=mask.device)
        ordered = torch.where(mask, place, mask.shape[-1]).sort(-1).values[..., : max(width, 1)]
        return cls(torch.where(ordered == mask.shape[-1], -1, ordered).to(torch.int32), q_block)

    def rows(self, tiles: Tensor, Lk: int) -> Tensor:
        return _marked(self.indices[:, :, tiles], Lk)


@dataclass(frozen=True, eq=False)
class SpanSelection(_KeyLists):
    """Runs of keys start <= j < stop that need no alignment; a run with stop <= start is empty.

    Shapes: starts, stops int [B or 1, heads, q_blocks, n]; q_block queries share a list.  Runs that
    overlap count once.
    """

    starts: Tensor
    stops: Tensor
    q_block: int = 1

    def rows(self, tiles: Tensor, Lk: int) -> Tensor:
        return _covered(self.starts[:, :, tiles], self.stops[:, :, tiles], Lk)


@dataclass(frozen=True, eq=False)
class ColumnSelection(_KeyLists):
    """Blocks of `kv_block` keys at any start, and single keys beside them.

    Shapes: starts int [B or 1, heads, q_blocks, n], columns [B or 1, heads, q_blocks, m], both ascending
    and unique, -1 at the end where a list is shorter.  A block that reaches the next one ends there; a
    key in a block and among the columns counts once.
    Paper: vertical-slash heads of MInference (2407.02490).
    """

    starts: Tensor
    columns: Tensor
    q_block: int = 64
    kv_block: int = 64

    def __post_init__(self) -> None:
        _KeyLists.__post_init__(self)
        _check_ascending("starts", self.starts)
        _check_ascending("columns", self.columns)

    def rows(self, tiles: Tensor, Lk: int) -> Tensor:
        starts = self.starts[:, :, tiles]
        stops = torch.where(starts < 0, starts, (starts + self.kv_block).clamp(max=Lk))
        return _covered(starts, stops, Lk) | _marked(self.columns[:, :, tiles], Lk)


@dataclass(frozen=True, eq=False)
class HeadSelection:
    """Key heads that are computed at all, per sequence: indices int [B, n] as in `TokenSelection`.

    The query heads of other key heads give 0.
    Paper: Polar Sparsity (2505.14884).
    """

    indices: Tensor

    def __post_init__(self) -> None:
        if self.indices.dim() != 2 or self.indices.is_floating_point():
            raise SelectionError("indices", list(self.indices.shape), "integers [B, n] are needed")
        _check_ascending("indices", self.indices)

    def mask(self, heads: int) -> Tensor:
        """bool [B, heads]"""
        return _marked(self.indices, heads)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Chosen(Pattern):
    """A query sees the keys that a `TokenSelection`, `SpanSelection` or `ColumnSelection` lists for it.

    Cost: of the tiles of 64 x 64 that hold a listed key on a CPU; on a GPU of the listed keys, forward.
    Limits: the gradient on a GPU meets all keys, some queries at a time; lists of more than 128 queries
    run in the reference there.
    """

    selection: TokenSelection | SpanSelection | ColumnSelection

    @property
    def key(self) -> str:
        digest = hashlib.sha1()
        for x in self.selection.lists:
            digest.update(x.cpu().contiguous().numpy().tobytes())
        shape = "x".join(str(n) for n in self.selection.lists[0].shape)
        return f"Chosen({type(self.selection).__name__} {shape} #{digest.hexdigest()[:8]})"

    @property
    def depends_on_data(self) -> bool:
        return True

    def validate(self, extent: Extent) -> None:
        size, first = self.selection.queries_per_list, self.selection.lists[0]
        tiles = -(-extent.Lq // size)
        if first.shape[2] != tiles:
            needed = f"{extent.Lq} queries in blocks of {size} need {tiles} lists"
            raise SelectionError("selection", list(first.shape), needed)

    def validate_lists(self, batch: int, q_heads: int, kv_heads: int) -> None:
        shape = self.selection.lists[0].shape
        if shape[0] not in (1, batch) or shape[1] not in (1, kv_heads, q_heads):
            needed = f"a batch of {batch} or 1 and lists for 1, {kv_heads} or {q_heads} heads"
            raise SelectionError("selection", list(shape), needed)

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        tile = (q_pos - (extent.Lk - extent.Lq)) // self.selection.queries_per_list
        device = self.selection.lists[0].device
        tiles, place = tile.unique(return_inverse=True)
        rows = self.selection.rows(tiles.to(device), extent.Lk)
        return rows[:, :, place.to(device), k_pos.to(device)]

    def allows_listed(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        tile = (q_pos - (extent.Lk - extent.Lq)) // self.selection.queries_per_list
        rows = self.selection.rows(tile, extent.Lk)
        columns = k_pos[:, :, None, :]
        shape = [max(pair) for pair in zip(rows.shape[:2], columns.shape[:2], strict=True)]
        rows = for_heads(rows, shape[1], 1).expand(*shape, -1, -1)
        return rows.gather(-1, for_heads(columns, shape[1], 1).expand(*shape, len(q_pos), -1))

    def tile_unit(self) -> tuple[int, int]:
        size = self.selection.queries_per_list
        return (size if size >= _TILE else _TILE // size * size), _TILE

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        size = self.selection.queries_per_list
        behind = -extent.Lk % kv_tile
        found = []
        for first in range(0, extent.Lq, q_tile):
            query = torch.arange(first, min(first + q_tile, extent.Lq))
            tiles = (query // size).unique().to(self.selection.lists[0].device)
            rows = self.selection.rows(tiles, extent.Lk)
            some, whole = rows.any(2), rows.all(2)
            some = torch.nn.functional.pad(some, (0, behind)).unflatten(-1, (-1, kv_tile)).any(-1)
            whole = torch.nn.functional.pad(whole, (0, behind), value=True)
            whole = whole.unflatten(-1, (-1, kv_tile)).all(-1)
            found.append(some.to(torch.uint8) * PARTIAL + whole.to(torch.uint8) * (FULL - PARTIAL))
        return torch.stack(found, dim=2)


def _check_ascending(name: str, x: Tensor) -> None:
    before, after = x[..., :-1], x[..., 1:]
    ordered = (after == -1) | ((before != -1) & (after > before))
    if not bool(ordered.all()) or bool((x < -1).any()):
        needed = "ascending, unique, -1 only at the end is needed"
        raise SelectionError(name, "lists out of order", needed)


def _marked(indices: Tensor, length: int) -> Tensor:
    """bool [..., length], true at the indices that are not -1."""
    place = torch.where(indices < 0, length, indices).long()
    mask = torch.zeros(*indices.shape[:-1], length + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, place, True)[..., :length]


def _covered(starts: Tensor, stops: Tensor, length: int) -> Tensor:
    """bool [..., length], true in start <= j < stop of some run."""
    used = stops > starts
    ends = torch.zeros(*starts.shape[:-1], length + 1, dtype=torch.int32, device=starts.device)
    one = used.to(torch.int32)
    first, last = (x.clamp(0, length).long() for x in (starts, stops))
    ends.scatter_add_(-1, first, one).scatter_add_(-1, last, -one)
    return ends.cumsum(-1)[..., :length] > 0
