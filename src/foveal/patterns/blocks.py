"""Attention over a list of key blocks per query block, found from the data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._arguments import need_tensors
from foveal._errors import SelectionError
from foveal.patterns.base import FULL, Extent, Pattern, for_heads


def places(mask: Tensor) -> Tensor:
    """Ascending places of the true entries of the last axis, -1 behind them.  int32 [..., most of them]"""
    most = max(int(mask.sum(-1).max()), 1) if mask.numel() else 1
    order = torch.argsort(mask.to(torch.uint8), dim=-1, descending=True, stable=True)
    chosen = order[..., :most]
    return torch.where(mask.gather(-1, chosen), chosen, -1).to(torch.int32)


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """Which key blocks each query block visits, per head.

    Shapes: indices int32 or int64 [B or 1, heads, q_blocks, n]; heads is 1, the key heads or the
    query heads.  Every list ascends, holds no block twice and ends in -1 where it is shorter than n.
    Options: q_block, kv_block >= 1 tokens per block.
    """

    indices: Tensor
    q_block: int = 64
    kv_block: int = 64

    def __post_init__(self) -> None:
        need_tensors(indices=self.indices)
        for name in ("q_block", "kv_block"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise SelectionError(name, size, "an integer of at least 1 token is needed")
        if self.indices.dim() != 4 or self.indices.is_floating_point():
            raise SelectionError(
                "indices", list(self.indices.shape), "integers [B, heads, q_blocks, n] are needed"
            )
        before, after = self.indices[..., :-1], self.indices[..., 1:]
        ordered = (after == -1) | ((before != -1) & (after > before))
        if not bool(ordered.all()) or bool((self.indices < -1).any()):
            raise SelectionError(
                "indices", "lists out of order", "ascending, unique, -1 only at the end is needed"
            )

    @classmethod
    def from_block_mask(cls, mask: Tensor, q_block: int = 64, kv_block: int = 64) -> BlockSelection:
        """The selection of the blocks that are true in `mask` [B, heads, q_blocks, kv_blocks]."""
        return cls(places(mask), q_block, kv_block)

    @property
    def counts(self) -> Tensor:
        """Number of blocks in each list.  [B, heads, q_blocks]"""
        return (self.indices >= 0).sum(-1)

    def transposed(self, kv_blocks: int) -> BlockSelection:
        """The query blocks that visit each key block, as a selection of its own; twice gives it back."""
        mask = self.block_mask(kv_blocks).transpose(-1, -2)
        return BlockSelection.from_block_mask(mask, self.kv_block, self.q_block)

    def density(self, Lk: int) -> float:
        """Share of the key blocks that a query block visits, on average."""
        return float(self.counts.double().mean()) / max(-(-Lk // self.kv_block), 1)

    def block_mask(self, kv_blocks: int) -> Tensor:
        """bool [B, heads, q_blocks, kv_blocks]"""
        shape = (*self.indices.shape[:-1], kv_blocks + 1)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.indices.device)
        place = torch.where(self.indices < 0, kv_blocks, self.indices).long()
        return mask.scatter_(-1, place, True)[..., :kv_blocks]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Blocks(Pattern):
    """A query sees the keys of the blocks that the selection lists for its block and head.

    Equals: all blocks listed is Dense().  Cost: selection.density(Lk) of dense.
    """

    selection: BlockSelection

    def __post_init__(self) -> None:
        if not isinstance(self.selection, BlockSelection):
            raise SelectionError("selection", type(self.selection), "a BlockSelection is needed")

    @property
    def key(self) -> str:
        shape = "x".join(str(size) for size in self.selection.indices.shape)
        content = hashlib.sha1(self.selection.indices.cpu().numpy().tobytes()).hexdigest()[:8]
        return f"Blocks({shape} #{content}, {self.selection.q_block}, {self.selection.kv_block})"

    @property
    def depends_on_data(self) -> bool:
        return True

    def validate(self, extent: Extent) -> None:
        selection = self.selection
        q_blocks = -(-extent.Lq // selection.q_block)
        if selection.indices.shape[2] != q_blocks:
            raise SelectionError(
                "indices",
                list(selection.indices.shape),
                f"{extent.Lq} queries in blocks of {selection.q_block} need {q_blocks} lists",
            )
        kv_blocks = -(-extent.Lk // selection.kv_block)
        if selection.indices.numel() and int(selection.indices.max()) >= kv_blocks:
            raise SelectionError(
                "indices",
                f"block {int(selection.indices.max())}",
                f"{extent.Lk} keys in blocks of {selection.kv_block} make {kv_blocks} blocks",
            )

    def validate_lists(self, batch: int, q_heads: int, kv_heads: int) -> None:
        shape = self.selection.indices.shape
        if shape[0] not in (1, batch):
            raise SelectionError("indices", list(shape), f"a batch of {batch} or 1 is needed")
        if shape[1] not in (1, kv_heads, q_heads):
            raise SelectionError(
                "indices", list(shape), f"lists for 1, {kv_heads} or {q_heads} heads are needed"
            )

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        mask = self.selection.block_mask(-(-extent.Lk // self.selection.kv_block))
        q_index = q_pos - (extent.Lk - extent.Lq)
        return mask[..., q_index // self.selection.q_block, k_pos // self.selection.kv_block]

    def allows_listed(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        mask = self.selection.block_mask(-(-extent.Lk // self.selection.kv_block))
        rows = mask[:, :, (q_pos - (extent.Lk - extent.Lq)) // self.selection.q_block]
        columns = (k_pos // self.selection.kv_block)[:, :, None, :]
        batch, heads = (max(rows.shape[axis], columns.shape[axis]) for axis in (0, 1))
        rows = for_heads(rows, heads, 1).expand(batch, heads, -1, -1)
        columns = for_heads(columns, heads, 1).expand(batch, heads, len(q_pos), -1)
        return rows.gather(-1, columns)

    def tile_unit(self) -> tuple[int, int]:
        return self.selection.q_block, self.selection.kv_block

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        kv_blocks = -(-extent.Lk // self.selection.kv_block)
        states = self.selection.block_mask(kv_blocks).to(torch.uint8) * FULL
        if (q_tile, kv_tile) == (self.selection.q_block, self.selection.kv_block):
            return states
        q_tiles, kv_tiles = -(-extent.Lq // q_tile), -(-extent.Lk // kv_tile)
        device = states.device
        rows = torch.arange(q_tiles, device=device) * q_tile // self.selection.q_block
        columns = torch.arange(kv_tiles, device=device) * kv_tile // self.selection.kv_block
        return states[..., rows[:, None], columns[None]]
