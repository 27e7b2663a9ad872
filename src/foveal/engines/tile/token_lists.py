"""Lists of key blocks per query token, and the same lists the other way round: tokens per key block."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.patterns.base import Extent, Pattern
from foveal.patterns.blocks import Blocks
from foveal.patterns.combine import Intersection
from foveal.patterns.dense import Causal


@dataclass(frozen=True)
class TokenLists:
    """The key blocks that each query token of a key head visits; its query heads share the list.

    indices: int32 [B, Hkv, Lq, slots], no block twice in a list, -1 where a slot is not used.
    starts, stops: int32 [blocks]; block b holds the keys starts[b] <= j < stops[b], of which a causal
    token sees those up to its own position i + shift.  `block` is the most keys that a block holds.
    """

    indices: Tensor
    starts: Tensor
    stops: Tensor
    block: int
    causal: bool
    shift: int

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


@functools.lru_cache(maxsize=64)
def block_spans(length: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Starts and stops of blocks laid one behind the other.  int32 [blocks]"""
    starts = torch.arange(0, max(length, 1), block, device=device, dtype=torch.int32)
    return starts, (starts + block).clamp(max=length)


@dataclass(frozen=True)
class Segments:
    """Listings sorted by the block that is listed, cut into segments of at most `longest`.

    order: int64 [listings], the place of each in `indices`, those of a block together and ascending.
    block: int32 [segments], counted over (batch, key head, block), past the last where the segment is
    not used; first and stop int32: its listings.  of_block: int32 [all blocks + 1], its segments.
    """

    order: Tensor
    block: Tensor
    first: Tensor
    stop: Tensor
    of_block: Tensor


def segments(lists: TokenLists, longest: int) -> Segments:
    """At most listings / longest + blocks segments, so that the host need not wait for the device."""
    indices = lists.indices
    lines = indices.shape[0] * indices.shape[1]
    total = lines * lists.blocks
    line = torch.arange(lines, device=indices.device, dtype=torch.int32).view(-1, 1)
    flat = indices.reshape(lines, -1)
    place = torch.where(flat < 0, total, flat + line * lists.blocks).flatten()
    found, order = torch.sort(place, stable=True)
    every = torch.arange(total + 1, device=indices.device, dtype=torch.int32)
    bounds = torch.searchsorted(found, every)
    pieces = (bounds.diff() + (longest - 1)) // longest
    of_block = torch.nn.functional.pad(pieces.cumsum(0), (1, 0))
    number = torch.arange(indices.numel() // longest + total, device=indices.device)
    own = (torch.searchsorted(of_block, number, right=True) - 1).clamp(max=total - 1)
    first = bounds[own] + (number - of_block[own]) * longest
    stop = (first + longest).minimum(bounds[own + 1])
    block = torch.where(number < of_block[-1], own, total)
    small = (x.to(torch.int32) for x in (block, first, stop, of_block))
    return Segments(order, *small)
