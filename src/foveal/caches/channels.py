"""Rows of which only the largest entries are kept, each with the number of its channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.caches.codec import Codec


@dataclass(frozen=True)
class ChannelCodec(Codec):
    """The `kept` entries of a row that are largest in size, and a byte for the channel of each.

    Both columns are padded to a multiple of 8 by repeating the entry of the first channel.  Entry
    8 c + e is number c + e width / 8 in the order of channels: lanes of a kernel that take 8 entries
    each write neighbors at a time, in different banks of shared memory.  NaN counts as the largest.
    """

    kept: int

    @property
    def kind(self) -> str:
        return "channels"

    @property
    def columns(self) -> tuple[tuple[int, torch.dtype], ...]:
        width = -(-self.kept // 8) * 8
        return (width, self.dtype), (width, torch.uint8)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        size = torch.where(x.isnan(), torch.inf, x.abs().float())
        channels = size.topk(self.kept, -1, sorted=False).indices.sort(-1).values
        (width, _), _ = self.columns
        first = channels[..., :1].expand(*channels.shape[:-1], width - self.kept)
        channels = torch.cat((channels, first), -1).unflatten(-1, (8, width // 8))
        channels = channels.transpose(-1, -2).flatten(-2)
        return x.gather(-1, channels).to(self.dtype), channels.to(torch.uint8)

    def decode(self, columns: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        entries, channels = columns
        rows = entries.new_zeros(*entries.shape[:-1], self.dim, dtype=dtype)
        return rows.scatter_(-1, channels.long(), entries.to(dtype))
