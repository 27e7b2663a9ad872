"""Lists of key blocks per query token, and the same lists the other way round: tokens per key block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._kept import kept
from foveal.engines.tile.launches import Launch
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.blocks import Blocks
from foveal.patterns.combine import Intersection
from foveal.patterns.dense import Causal

# Listings that a program counts.
_COUNTED = 1024


@dataclass(frozen=True)
class TokenLists:
    """The key blocks that each query token of a key head visits; its query heads share the list.

    indices: int32 [B, Hkv, Lq, slots], no block twice in a list, -1 where a slot is not used.
    starts, stops: int32 [blocks]; block b holds the keys starts[b] <= j < stops[b], of which a causal
    token sees those up to its own position i + shift.  `block` is the most keys that a block holds.
    near: (first, last) where blocks lie one behind the other and every token lists the first ones
    and the last ones up to its own.
    """

    indices: Tensor
    starts: Tensor
    stops: Tensor
    block: int
    causal: bool
    shift: int
    near: tuple[int, int] | None = None

    @property
    def blocks(self) -> int:
        return len(self.starts)


def listed(pattern: Pattern, extent: Extent, kv_heads: int) -> TokenLists | None:
    """The lists of a pattern that lists blocks token by token, alone or joined with Causal() by `&`."""
    members = pattern.flattened() if isinstance(pattern, Intersection) else (pattern,)
    blocks = [p for p in members if isinstance(p, Blocks)]
    if len(blocks) != 1 or any(p != Causal() for p in members if p is not blocks[0]):
        return None
    selection = blocks[0].selection
    heads = selection.indices.shape[1]
    if selection.q_block != 1 or heads not in (1, kv_heads):
        return None
    indices = selection.indices.to(torch.int32).expand(-1, kv_heads, -1, -1)
    starts, stops = block_spans(extent.Lk, selection.kv_block, indices.device)
    causal, shift = len(members) > 1, extent.Lk - extent.Lq
    return TokenLists(indices, starts, stops, selection.kv_block, causal, shift)


@kept(64)
def block_spans(length: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Starts and stops of blocks laid one behind the other.  int32 [blocks]"""
    starts = torch.arange(0, max(length, 1), block, device=device, dtype=torch.int32)
    return starts, (starts + block).clamp(max=length)


@dataclass(frozen=True)
class Segments:
    """Listings sorted by the block that is listed, cut into segments of at most `longest`.

    Tokens come in `chunks` of equal size, one after the other, so that the queries of one chunk stay in
    the second-level cache; a cell is (batch, key head, chunk, block).
    order: int64 or int32 [listings], the place of each in `indices`, those of a cell together.
    cell: int32 [segments], the number of cells where the segment is not used; first and stop int32: its
    listings.  of_cell: int32 [cells + 1], its segments.
    """

    chunks: int
    order: Tensor
    cell: Tensor
    first: Tensor
    stop: Tensor
    of_cell: Tensor

    @property
    def cells(self) -> int:
        return len(self.of_cell) - 1


def segments(lists: TokenLists, longest: int, chunk: int, far: bool = False) -> Segments:
    """Chunks of `chunk` tokens; with `far` without what is `near`; listings of a cell ascend.

    At most listings / longest + cells segments, so that the host need not wait for the device.
    """
    indices = lists.indices
    lines = indices.shape[0] * indices.shape[1]
    chunks = max(1, -(-indices.shape[2] // chunk))
    cells = lines * chunks * lists.blocks
    device = indices.device
    line = torch.arange(lines, device=device, dtype=torch.int32)[:, None] * chunks
    part = torch.arange(indices.shape[2], device=device, dtype=torch.int32) // chunk
    cell = (line + part)[..., None] * lists.blocks + indices.flatten(0, 1)
    left_out = indices.flatten(0, 1) < 0
    if far and lists.near is not None:
        first_blocks, last_blocks = lists.near
        token = torch.arange(indices.shape[2], device=device, dtype=torch.int32)
        own = (token + lists.shift) // lists.block
        flat = indices.flatten(0, 1)
        left_out |= (flat < first_blocks) | (flat > (own - last_blocks)[:, None])
    cell = torch.where(left_out, cells, cell)
    found, order = torch.sort(cell.flatten(), stable=True)
    every = torch.arange(cells + 1, device=device, dtype=torch.int32)
    return _cut(order, torch.searchsorted(found, every), longest, chunks)


def _cut(order: Tensor, bounds: Tensor, longest: int, chunks: int) -> Segments:
    """Segments of listings in `order`, where those of each cell start at `bounds` [cells + 1]."""
    cells, device = len(bounds) - 1, order.device
    pieces = (bounds.diff() + (longest - 1)) // longest
    of_cell = torch.nn.functional.pad(pieces.cumsum(0), (1, 0))
    number = torch.arange(order.numel() // longest + cells, device=device)
    own = (torch.searchsorted(of_cell, number, right=True) - 1).clamp(max=cells - 1)
    first = bounds[own] + (number - of_cell[own]) * longest
    stop = (first + longest).minimum(bounds[own + 1])
    own = torch.where(number < of_cell[-1], own, cells)
    small = (x.to(torch.int32) for x in (own, first, stop, of_cell))
    return Segments(chunks, order, *small)


def counted_segments(lists: TokenLists, longest: int, chunk: int, far: bool = False) -> Segments:
    """As `segments` by kernels that count, on a GPU; the listings of a cell come in any order."""
    from foveal.engines.tile.cell_kernels import token_cells, token_order

    indices = lists.indices
    lines, (Lq, slots) = indices.shape[0] * indices.shape[1], indices.shape[2:]
    chunks = max(1, -(-Lq // chunk))
    cells = lines * chunks * lists.blocks
    far = far and lists.near is not None
    near = (*(lists.near or (0, 0)), lists.shift, lists.block)
    sizes = (Lq, lines, chunk, chunks, lists.blocks)
    counts = torch.zeros(cells, dtype=torch.int32, device=indices.device)
    rank = torch.empty(indices.numel(), dtype=torch.int32, device=indices.device)
    order = torch.empty_like(rank)
    options = {"SLOTS": slots, "FAR": far, "ROWS": _COUNTED, "num_warps": 4}
    programs = lines * -(-Lq * slots // _COUNTED)
    Launch(token_cells, programs, (indices, counts, rank, sizes, near), options)()
    bounds = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    Launch(token_order, programs, (indices, bounds, rank, order, sizes, near), options)()
    return _cut(order, bounds, longest, chunks)
