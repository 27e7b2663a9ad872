"""S9: the largest weight between a random share of the tokens of a tile and of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.selectors.base import Tiling, against_keys


@dataclass(frozen=True, slots=True, eq=False)
class SampledMax:
    """max over sampled i, j of exp(s_ij - max_j' s_ij'), tokens drawn by `generator` once per call.

    Options: share of every tile and block that is drawn, at least 1 token; the maximum over j' is over
    the sampled keys that i may see.
    Paper: Pyramid Sparse Attention (2512.04025).
    """

    share: float = 0.25
    generator: torch.Generator | None = None

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        rows = self._drawn(tiling.Lq, tiling.q_block).to(q.device)
        columns = self._drawn(tiling.Lk, tiling.kv_block).to(q.device)
        wide = torch.promote_types(q.dtype, torch.float32)
        s = against_keys(q[:, rows.flatten()].to(wide), k[:, columns.flatten()].to(wide))
        s = s * q.shape[-1] ** -0.5
        if tiling.causal:
            position = rows.flatten()[:, None] + tiling.Lk - tiling.Lq
            s = s.masked_fill(columns.flatten() > position, -torch.inf)
        weight = torch.exp(s - s.amax(-1, keepdim=True)).nan_to_num(0.0)
        tiles = weight.unflatten(-1, columns.shape).amax(-1).unflatten(2, rows.shape)
        result: Tensor = tiles.amax(3)
        return result

    def _drawn(self, length: int, tile: int) -> Tensor:
        """Tokens of each tile, the last repeated where a tile is short.  int64 [tiles, drawn]"""
        tiles, count = -(-length // tile), max(1, round(tile * self.share))
        device = "cpu" if self.generator is None else self.generator.device
        order = torch.rand(tiles, tile, generator=self.generator, device=device).argsort(-1)
        first = torch.arange(tiles, device=device)[:, None] * tile
        return (first + order[:, :count]).clamp(max=length - 1)
