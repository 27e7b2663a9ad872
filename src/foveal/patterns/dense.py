"""All pairs, or all pairs up to the diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.patterns.base import Bounds, Extent, Pattern


@dataclass(frozen=True, slots=True, repr=False)
class Dense(Pattern):
    """Every query sees every key.

    Cost: 4 Lq Lk Hq D FLOPs (D = Dv) forward.
    """

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        return (q_pos == q_pos) & (k_pos == k_pos)

    def bounds(self, extent: Extent) -> Bounds:
        zero = torch.zeros(extent.Lq, dtype=torch.int64)
        return Bounds(extent.flat(), (zero,), (zero + extent.Lk,))


@dataclass(frozen=True, slots=True, repr=False)
class Causal(Pattern):
    """Query i sees keys j <= i in raster order; with Lq != Lk the last query sees every key.

    Equals: Sliding(left=Lk, right=0).  Cost: about half of dense when Lq = Lk.
    """

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        return k_pos <= q_pos

    def simplify(self, extent: Extent) -> Pattern:
        return Dense() if extent.Lq == 1 else self

    def bounds(self, extent: Extent) -> Bounds:
        upper = (extent.q_positions() + 1).clamp(min=0)
        return Bounds(extent.flat(), (torch.zeros_like(upper),), (upper,))
