"""Windows of compressed keys and the blocks that they score, of one sequence or of packed documents."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._kept import kept
from foveal.engines.tile.token_lists import TokenLists


@dataclass(frozen=True)
class Windows:
    """Every block of `block` keys starts `step` windows of `length` keys, one every `stride`.

    starts, stops: int32 [blocks], the keys of each block; offsets: the place of its first in its
    document; windows have numbers step x block upwards, so
    that those of a document begin with its first block.  Of every token, int32 [Lq]: the `first` block
    of its document, its `own` block, and `seen`, past the last window that ends at or before it.
    """

    length: int
    stride: int
    block: int
    starts: Tensor
    stops: Tensor
    offsets: Tensor
    first: Tensor
    own: Tensor
    seen: Tensor
    shift: int
    packed: bool = False

    @property
    def step(self) -> int:
        return self.block // self.stride

    @property
    def reach(self) -> int:
        return self.length // self.stride - 1

    @property
    def count(self) -> int:
        return len(self.starts) * self.step

    @property
    def places(self) -> Tensor:
        """The first key of each window.  int64 [windows]"""
        within = torch.arange(self.step, device=self.starts.device) * self.stride
        return (self.starts.long()[:, None] + within).flatten()

    @property
    def positions(self) -> Tensor:
        """The place of the first key of each window in its document.  int64 [windows]"""
        within = torch.arange(self.step, device=self.starts.device) * self.stride
        return (self.offsets.long()[:, None] + within).flatten()

    def at(self, tokens: Tensor) -> Windows:
        """As some of the tokens see them."""
        first, own, seen = (x[tokens] for x in (self.first, self.own, self.seen))
        return dataclasses.replace(self, first=first, own=own, seen=seen)

    def lists(self, indices: Tensor, near: tuple[int, int] | None = None) -> TokenLists:
        """near: how many of the first and the last blocks of a sequence every token lists."""
        near = None if self.packed else near
        return TokenLists(indices, self.starts, self.stops, self.block, True, self.shift, near)


def windows(
    Lq: int,
    Lk: int,
    length: int,
    stride: int,
    block: int,
    device: torch.device,
    cu_seqlens: Tensor | None = None,
) -> Windows:
    """Of a sequence whose last query stands on its last key, or of the documents that cu_seqlens cuts."""
    if cu_seqlens is None:
        return _of_sequence(Lq, Lk, length, stride, block, device)
    return _of_documents(Lk, length, stride, block, cu_seqlens.to(device=device, dtype=torch.int64))


@kept(64)
def _of_sequence(
    Lq: int, Lk: int, length: int, stride: int, block: int, device: torch.device
) -> Windows:
    starts = torch.arange(0, max(Lk, 1), block, device=device)
    blocks = (starts, (starts + block).clamp(max=Lk), starts)
    position = torch.arange(Lk - Lq, Lk, device=device)
    return _made((length, stride, block), blocks, torch.zeros_like(position), position, Lk - Lq)


def _of_documents(total: int, length: int, stride: int, block: int, cuts: Tensor) -> Windows:
    """At most total / block + documents blocks: no synchronisation with the host."""
    counts = (cuts.diff() + block - 1) // block
    base = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    number = torch.arange(total // block + len(cuts) - 1, device=cuts.device)
    document = (torch.searchsorted(base, number, right=True) - 1).clamp(max=len(cuts) - 2)
    offsets = (number - base[document]) * block
    starts = (cuts[document] + offsets).clamp(max=total)
    blocks = (starts, (starts + block).minimum(cuts[document + 1]).maximum(starts), offsets)
    token = torch.arange(total, device=cuts.device)
    mine = torch.searchsorted(cuts, token, right=True) - 1
    made = _made((length, stride, block), blocks, base[mine], token - cuts[mine], 0)
    return dataclasses.replace(made, packed=True)


def _made(
    sizes: tuple[int, int, int],
    blocks: tuple[Tensor, Tensor, Tensor],
    first: Tensor,
    position: Tensor,
    shift: int,
) -> Windows:
    """position: of each token in its document."""
    length, stride, block = sizes
    ended = (position + 1 - length).div(stride, rounding_mode="floor") + 1
    seen = first * (block // stride) + ended.clamp(min=0)
    own = first + position // block
    small = [x.to(torch.int32) for x in (*blocks, first, own, seen)]
    starts, stops, offsets, first, own, seen = small
    return Windows(length, stride, block, starts, stops, offsets, first, own, seen, shift)
