"""S7: the softmax over compressed keys, summed over the query heads of a key head, added up to blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._errors import SelectionError
from foveal.selectors.base import Tiling, against_keys


@dataclass(frozen=True, slots=True)
class Compressed:
    """Probabilities of means of `length` keys every `stride`, per block, summed over the tokens of a tile.

    pool "sum": a block counts each window as often as its strides overlap it (Native Sparse Attention);
    "max": the largest of the windows that overlap it, and one before (InfLLM-V2).
    Limits: stride divides length and the block.  `compose.native_sparse` lists per token in one pass
    and never lays the scores out; here they are.
    Paper: Native Sparse Attention (2502.11089); InfLLM-V2 (2509.24663).
    """

    length: int = 32
    stride: int = 16
    pool: Literal["sum", "max"] = "sum"

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        step, reach = self._step(tiling), self.length // self.stride - 1
        windows = max((tiling.Lk - self.length) // self.stride + 1, 0)
        wide = torch.promote_types(q.dtype, torch.float32)
        place = torch.arange(windows, device=q.device) * self.stride
        within = torch.arange(self.length, device=q.device)
        means = k[:, place[:, None] + within].mean(2, dtype=wide)
        s = against_keys(q.to(wide), means) * q.shape[-1] ** -0.5
        if tiling.causal:
            position = torch.arange(tiling.Lq, device=q.device)[:, None] + tiling.Lk - tiling.Lq
            s = s.masked_fill(place + self.length - 1 > position, -torch.inf)
        p = torch.softmax(s, dim=-1).nan_to_num(0.0)
        p = p.unflatten(1, (k.shape[2], -1)).sum(2)  # [B, Hkv, Lq, windows]
        p = F.pad(p, (0, max(tiling.kv_blocks * step - windows, 0)))[..., : tiling.kv_blocks * step]
        blocks = self._binned(p, step, reach)
        blocks = F.pad(blocks, (0, 0, 0, -tiling.Lq % tiling.q_block))
        result: Tensor = blocks.unflatten(2, (-1, tiling.q_block)).sum(3)
        return result

    def _binned(self, p: Tensor, step: int, reach: int) -> Tensor:
        """Windows step j - reach ... step j + step - 1 make block j."""
        if self.pool == "max":
            most: Tensor = p.unflatten(-1, (-1, step)).amax(-1)
            for before in range(1, max(reach, 1) + 1):
                edge = F.pad(p, (before, 0))[..., : p.shape[-1]]
                most = torch.maximum(most, edge.unflatten(-1, (-1, step))[..., 0])
            return most
        total = torch.zeros_like(p[..., ::step])
        for m in range(step):
            for n in range(reach + 1):
                moved = F.pad(p, (reach, step))[..., m + n :]
                total = total + moved[..., ::step][..., : total.shape[-1]]
        return total

    def _step(self, tiling: Tiling) -> int:
        if self.length < 1:
            raise SelectionError("length", self.length, "at least 1 is needed")
        if self.stride < 1 or self.length % self.stride or tiling.kv_block % self.stride:
            needed = f"a divisor of the length, {self.length}, and the block, {tiling.kv_block}"
            raise SelectionError("stride", self.stride, needed)
        return tiling.kv_block // self.stride
