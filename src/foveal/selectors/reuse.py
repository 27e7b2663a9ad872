"""S11: lists that another layer or an earlier step made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.patterns.blocks import BlockSelection
from foveal.selectors.base import Tiling


@dataclass(frozen=True, slots=True, eq=False)
class Reuse:
    """1 for the blocks of a selection of an earlier layer or step, 0 for the others.

    Fewer lists than tiles: the last one serves the rest; blocks that came since score 0.
    Budget: Threshold(0.5), with Forced for what came since.
    Paper: DELTA (2510.09883); Self-Selected Span (2404.09336).
    """

    selection: BlockSelection

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        mask = self.selection.block_mask(tiling.kv_blocks)
        last = mask.shape[2] - 1
        tiles = torch.arange(tiling.q_blocks, device=mask.device).clamp(max=last)
        return mask[:, :, tiles].to(torch.float32)
