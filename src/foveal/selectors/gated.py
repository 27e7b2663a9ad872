"""S8: small learned projections of queries and of pooled keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.selectors.base import Tiling, tile_means


@dataclass(frozen=True, slots=True, eq=False)
class LearnedGate:
    """a = softmax over blocks of (W_q q~_m) . (W_k k~_n) / sqrt(Dg), one score per key head.

    q~ are the query heads of a key head side by side, averaged over the tile; k~ the maximum, minimum and
    mean of the block side by side.  Shapes: q_map [Hkv, G D, Dg], k_map [Hkv, 3 D, Dg].
    Paper: SeerAttention-R (2506.08889); 2410.13276.
    """

    q_map: Tensor
    k_map: Tensor

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        heads = k.shape[2]
        rows = tile_means(q, tiling.q_block).unflatten(2, (heads, -1)).flatten(3)
        gate_q = torch.einsum("bihd,hde->bihe", rows, self.q_map.to(rows.dtype))
        gate_k = torch.einsum(
            "bjhd,hde->bjhe", block_summary(k, tiling.kv_block), self.k_map.to(rows.dtype)
        )
        a = torch.einsum("bihe,bjhe->bhij", gate_q, gate_k) * self.q_map.shape[-1] ** -0.5
        return torch.softmax(a.masked_fill(~tiling.visible(q.device), -torch.inf), dim=-1)


def block_summary(k: Tensor, block: int) -> Tensor:
    """Maximum, minimum and mean of every block of keys, side by side.  [B, blocks, H, 3 D]"""
    behind = -k.shape[1] % block
    wide = torch.promote_types(k.dtype, torch.float32)

    def blocks(fill: float) -> Tensor:
        padded = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, behind), value=fill)
        result: Tensor = padded.unflatten(1, (-1, block))
        return result

    largest, smallest = blocks(-torch.inf).amax(2), blocks(torch.inf).amin(2)
    return torch.cat([largest.to(wide), smallest.to(wide), tile_means(k, block)], dim=-1)
