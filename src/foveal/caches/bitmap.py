"""Rows of which only the largest entries are kept, with one bit per channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.caches.codec import Codec


@dataclass(frozen=True)
class BitmapCodec(Codec):
    """The `kept` entries of a row that are largest in size, in the order of their channels.

    Every row has the same number of entries, so that a slot needs no offset: a column of them, padded to
    a multiple of 8, and one of bits, channel c in bit c % 8 of byte c // 8.  NaN counts as the largest.
    """

    kept: int

    @property
    def kind(self) -> str:
        return "bitmap"

    @property
    def columns(self) -> tuple[tuple[int, torch.dtype], ...]:
        return (-(-self.kept // 8) * 8, self.dtype), (-(-self.dim // 8), torch.uint8)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        size = torch.where(x.isnan(), torch.inf, x.abs().float())
        channels = size.topk(self.kept, -1, sorted=False).indices.sort(-1).values
        (width, _), (octets, _) = self.columns
        entries = x.new_zeros(*x.shape[:-1], width, dtype=self.dtype)
        entries[..., : self.kept] = x.gather(-1, channels).to(self.dtype)
        bits = torch.zeros(*x.shape[:-1], octets * 8, dtype=torch.uint8, device=x.device)
        bits.scatter_(-1, channels, 1)
        weights = 1 << torch.arange(8, device=x.device, dtype=torch.uint8)
        return entries, (bits.unflatten(-1, (octets, 8)) * weights).sum(-1).to(torch.uint8)

    def decode(self, columns: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        entries, octets = columns
        shifts = torch.arange(8, device=octets.device, dtype=torch.uint8)
        bits = (octets[..., None] >> shifts & 1).flatten(-2)[..., : self.dim].bool()
        rank = (bits.long().cumsum(-1) - 1).clamp_min(0)
        return torch.where(bits, entries.to(dtype).gather(-1, rank), 0)
