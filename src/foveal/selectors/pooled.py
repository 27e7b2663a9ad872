"""S1: the mean query of a tile against the mean key of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.selectors.base import Tiling, against_keys, tile_means


@dataclass(frozen=True, slots=True)
class Pooled:
    """a[m, n] = mean(Q_m) . mean(K_n) / sqrt(D), or its softmax over the blocks a tile may see.

    Options: softmax=False leaves the products; centred subtracts the mean of all keys first, which moves
    no softmax; similar > 0 keeps rows and columns of blocks whose tokens point apart (mean pairwise
    cosine below it): their means say little.
    Paper: the block heads of MInference (2407.02490); PBS-Attn (2510.21270); SLA (2509.24006);
    Faster VGGT (2509.07120); the guard of SpargeAttn (2502.18137).
    """

    softmax: bool = True
    centred: bool = False
    similar: float = 0.0

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        queries, keys = tile_means(q, tiling.q_block), tile_means(k, tiling.kv_block)
        if self.centred:
            keys = keys - k.mean(1, keepdim=True, dtype=keys.dtype)
        a = against_keys(queries, keys) * q.shape[-1] ** -0.5
        visible = tiling.visible(q.device)
        a = a.masked_fill(~visible, -torch.inf)
        if self.softmax:
            a = torch.softmax(a, dim=-1)
        if self.similar > 0:
            groups = q.shape[2] // k.shape[2]
            apart_q = cosine(q, tiling.q_block) < self.similar
            apart_k = (cosine(k, tiling.kv_block) < self.similar).repeat_interleave(groups, dim=1)
            a = a.masked_fill(apart_q[..., None] | apart_k[..., None, :], torch.inf)
        result: Tensor = a
        return result


def cosine(x: Tensor, tile: int) -> Tensor:
    """Mean cosine of all pairs of tokens of a tile.  [B, H, tiles] of x [B, L, H, D]

    The square of the mean of the unit vectors: no pair is formed.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = tile_means(F.normalize(x.to(wide), dim=-1), tile)
    return mean.square().sum(-1).transpose(1, 2)
