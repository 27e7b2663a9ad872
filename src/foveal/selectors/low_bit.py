"""S4: an estimate of every score from 4-bit queries and keys, relative to an exactly computed local mass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import SelectionError
from foveal.engines.tile.low_bit import largest_estimates
from foveal.patterns import Sliding
from foveal.selectors.base import Tiling


@dataclass(frozen=True, slots=True)
class LowBit:
    """max_ij of ln RAS_ij in every tile, RAS_ij = exp(s^_ij - m_i) / l_i.

    s^ is the score estimated from queries and keys less their means over the sequence, rounded to `bits`
    with one scale per token; the part of the mean query is added exactly.  m_i and l_i are the maximum
    and the sum of exp(s - m) over the first `sink` keys and the last `local` ones of query i, exactly;
    tiles among those score +inf.  Products of whole numbers are exact: by 8-bit units of a GPU, in float32
    or float64 elsewhere.
    Budget: Threshold(ln tau); tau = 0 (-inf) keeps all.
    Limits: the released code rounds the local region out to segments of 128 tokens, adds the part of the mean
    query in whole units of the key, and stays dense below 1,024 tokens, which is left to the caller.
    Paper: SALE (2505.24179).
    """

    bits: int = 4
    sink: int = 32
    local: int = 128

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SelectionError("bits", self.bits, "2 to 8 are needed")
        if self.sink < 0:
            raise SelectionError("sink", self.sink, "at least 0 keys are needed")
        if self.local < 1:
            raise SelectionError("local", self.local, "at least 1, a query's own key, is needed")

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        if not tiling.causal:
            raise SelectionError("causal", False, "a local region behind each query is needed")
        near = Sliding(self.local - 1, sink_tokens=self.sink)
        _, level = attend(q, k, k, near, return_lse=True)
        sides = (tiling.q_block, tiling.kv_block)
        far = largest_estimates(q, k, level, self.bits, self.local, *sides)
        return far.masked_fill(self._near(tiling, q.device), torch.inf)

    def _near(self, tiling: Tiling, device: torch.device) -> Tensor:
        """Tiles with a pair in the sink or the local region.  bool [q_blocks, kv_blocks]"""
        first = torch.arange(tiling.kv_blocks, device=device) * tiling.kv_block
        behind = tiling.first(device)[:, None] - self.local
        local = first + tiling.kv_block - 1 > behind
        return (local | (first < self.sink)) & tiling.visible(device)
