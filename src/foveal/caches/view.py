"""What the decode engine reads of a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.caches.codec import Codec


@dataclass(frozen=True)
class Columns:
    """The keys or the values of a store: a codec and its columns, each [slots, width]."""

    codec: Codec
    tensors: tuple[Tensor, ...]

    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [*slots, dim] in `dtype`."""
        return self.codec.decode(tuple(x[slots] for x in self.tensors), dtype)


@dataclass(frozen=True)
class View:
    """Stored tokens of B sequences and Hkv key heads, found through a table of pages.

    Shapes: lengths int32 [B, 1 or Hkv]; page_table int32 [B, 1 or Hkv, pages]; bias float32 and
    positions int32 [slots]; seen and after int32 [B].  Token j of sequence b and key head h lies in slot
    page_table[b, h, j // page_size] * page_step + h * head_step + (j % page_size) * token_step
    (0 in place of h where the second axis of the table is Hkv: such a page holds one head).
    values None: the first value_dim channels of the keys are the values.
    positions None: token j of a sequence has position j plus what was dropped before it, seen - length.
    after: how many tokens of the sequence are stored elsewhere behind these, its newest ones; never fewer
    than `behind` where there are tokens in this view.
    host_lengths: what lengths holds, without asking the device.
    guarded: slots behind the length of a sequence must not even be read.
    """

    lengths: Tensor
    host_lengths: list[list[int]]
    seen: Tensor
    page_table: Tensor
    page_size: int
    steps: tuple[int, int, int]
    kv_heads: int
    keys: Columns
    values: Columns | None
    value_dim: int
    bias: Tensor | None = None
    positions: Tensor | None = None
    after: Tensor | None = None
    guarded: bool = False
    behind: int = 0

    @property
    def batch(self) -> int:
        return self.page_table.shape[0]

    @property
    def head_dim(self) -> int:
        return self.keys.codec.dim

    @property
    def per_head(self) -> bool:
        """Whether every key head has its own pages."""
        return self.page_table.shape[1] > 1

    def slots(self, tokens: Tensor) -> Tensor:
        """int64 slots [B, Hkv, n] of stored tokens [B or 1, 1 or Hkv, n]."""
        return slots_of(self.page_table, tokens, self.page_size, self.steps, self.kv_heads)

    def row_bytes(self) -> int:
        """Bytes that a decode moves for one token of one key head."""
        return self.keys.codec.row_bytes + (self.values.codec.row_bytes if self.values else 0)


def slots_of(
    page_table: Tensor,
    tokens: Tensor,
    page_size: int,
    steps: tuple[int, int, int],
    kv_heads: int,
) -> Tensor:
    """int64 [B, Hkv, n]: where tokens [B or 1, 1 or Hkv, n] lie."""
    page_step, head_step, token_step = steps
    batch, table_heads, _ = page_table.shape
    tokens = tokens.long().expand(batch, -1, -1)
    if table_heads > 1:
        tokens = tokens.expand(-1, table_heads, -1)
    table = page_table.long().expand(-1, tokens.shape[1], -1)
    slots = table.gather(2, tokens // page_size) * page_step + tokens % page_size * token_step
    slots = slots.expand(-1, kv_heads, -1)
    if table_heads > 1:
        return slots
    heads = torch.arange(kv_heads, device=slots.device) * head_step
    return slots + heads[None, :, None]
