"""S3: the exact attention of the last queries, summed along columns and along diagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.selectors.base import Tiling, against_keys


@dataclass(frozen=True, slots=True)
class LastQueries:
    """The share of the softmax of the last `queries` queries that falls on each key block, for all tiles.

    Limits: a prompt that comes in chunks gives other lists than the whole prompt: only its last queries
    are looked at.
    Paper: the observation window of MInference (2407.02490) and SnapKV (2404.14469).
    """

    queries: int = 64

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        columns = self.map(q, k, tiling.causal).sum(2)  # [B, Hq, Lk]
        behind = tiling.kv_blocks * tiling.kv_block - columns.shape[-1]
        share = torch.nn.functional.pad(columns, (0, behind)).unflatten(-1, (-1, tiling.kv_block))
        result: Tensor = share.sum(-1)[:, :, None].expand(-1, -1, tiling.q_blocks, -1)
        return result

    def map(self, q: Tensor, k: Tensor, causal: bool = True) -> Tensor:
        """Their attention map, float [B, Hq, queries, Lk]."""
        last = q[:, -self.queries :]
        wide = torch.promote_types(q.dtype, torch.float32)
        s = against_keys(last, k).to(wide) * q.shape[-1] ** -0.5
        if causal:
            position = torch.arange(k.shape[1] - last.shape[1], k.shape[1], device=q.device)
            s = s.masked_fill(
                torch.arange(k.shape[1], device=q.device) > position[:, None], -torch.inf
            )
        return torch.softmax(s, dim=-1)

    def columns_and_offsets(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Mass per key [B, Hq, Lk] and per distance q - k [B, Hq, Lk], of causal attention."""
        p = self.map(q, k)
        rows, length = p.shape[2:]
        position = torch.arange(length - rows, length, device=q.device)
        offset = position[:, None] - torch.arange(length, device=q.device)
        place = offset.clamp(min=0).expand_as(p).flatten(2)
        offsets = torch.zeros_like(p[:, :, 0]).scatter_add_(-1, place, p.flatten(2))
        return p.sum(2), offsets
