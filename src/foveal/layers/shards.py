"""Attention whose heads look at different blocks of the context."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import PatternError
from foveal._kept import kept
from foveal.layers.heads import MultiHead
from foveal.patterns import Blocks, BlockSelection, Causal, Pattern


def head_shards(
    blocks: int,
    heads: int,
    local_blocks: int,
    vert_stride: int,
    offset: int = 0,
    dense_heads: int = 0,
    causal: bool = True,
) -> Tensor:
    """Which key blocks each query block of each key head visits.  bool [1, heads, blocks, blocks]

    Key block c of query block r and head h: r - c < local_blocks, or (c + h step + offset) a
    multiple of vert_stride, with step = max(1, vert_stride // heads); the last dense_heads see all;
    c <= r when causal. Not causal: the stride is counted from the edge of the local window and is
    the same for all heads.
    """
    row, column = torch.arange(blocks)[:, None], torch.arange(blocks)
    head = torch.arange(heads)[:, None, None]
    if causal:
        step = max(1, vert_stride // heads)
        near = row - column < local_blocks
        far = (column + head * step + offset) % vert_stride == 0
    else:
        beyond = ((row - column).abs() - local_blocks + 1).clamp(min=0)
        near = beyond == 0
        far = beyond.expand(heads, -1, -1) % vert_stride == 0
    chosen = near | far | (head >= heads - dense_heads)
    return (chosen & (column <= row) if causal else chosen)[None]


def coverage(mask: Tensor) -> float:
    """Share of the causal blocks that at least one head visits.  mask [1, heads, blocks, blocks]

    Heads together should see everything (1.0), which two heads with a stride of eight do not.
    """
    blocks = mask.shape[-1]
    below = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    return float((mask[0].any(0) & below).sum() / below.sum())


@kept(32)
def shards(
    length: int,
    kv_heads: int,
    block: int,
    local_blocks: int,
    vert_stride: int,
    offset: int,
    dense_heads: int,
    causal: bool,
    device: torch.device,
) -> Pattern:
    """The pattern of `head_shards` on a sequence, blocks of `block` tokens."""
    sizes = {"block": block, "local_blocks": local_blocks, "vert_stride": vert_stride}
    for name, size in sizes.items():
        if size < 1:
            raise PatternError(name, size, "at least 1 is needed")
    if not 0 <= dense_heads <= kv_heads:
        raise PatternError("dense_heads", dense_heads, f"0 to {kv_heads} key heads are needed")
    blocks = -(-length // block)
    mask = head_shards(blocks, kv_heads, local_blocks, vert_stride, offset, dense_heads, causal)
    indices = BlockSelection.from_block_mask(mask, block, block).indices.to(device)
    chosen: Pattern = Blocks(BlockSelection(indices, block, block))
    return chosen & Causal() if causal else chosen


class ShardedAttention(MultiHead):
    """Causal attention in which every head visits its own shard of the context, as `head_shards` says.

    Shapes: x and y [B, L, dim].
    Options: block tokens per block; local_blocks near the diagonal for every head, one in vert_stride
    blocks beyond, moved from head to head and by `offset`; the last dense_heads see everything.
    Cost: (local_blocks + L / (block vert_stride)) / (L / block) of causal attention, about.
    Paper: S2-Attention (2407.17678).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        block: int = 64,
        local_blocks: int = 32,
        vert_stride: int = 8,
        offset: int = 0,
        dense_heads: int = 0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias, dropout=dropout)
        self.options = (block, local_blocks, vert_stride, offset, dense_heads, True)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, shards(k.shape[1], k.shape[-2], *self.options, k.device))
