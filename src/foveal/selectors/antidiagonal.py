"""S2: sums along antidiagonals, which meet every row and every column of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._errors import SelectionError
from foveal.engines.tile import antidiagonal
from foveal.selectors.base import Tiling, group_queries

# Elements of the reduced map that are held at once.
_AT_ONCE = 1 << 26


@dataclass(frozen=True, slots=True)
class Antidiagonal:
    """A[a, b] = sum_i q[a s + s - 1 - i] . k[b s + i], i < s; its softmax over b, summed in each block.

    Logits are A / (s sqrt(D)).  Options: stride s divides both blocks.  The first column and the
    diagonal are for the budget to force: Forced(Mass(0.9), counted=False).
    Cost: 1 / stride of the products of dense attention.
    Paper: XAttention (2503.16428).
    """

    stride: int = 16

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        s = self.stride
        if s < 1 or tiling.q_block % s or tiling.kv_block % s:
            needed = f"a divisor of both blocks, {tiling.q_block} and {tiling.kv_block}, is needed"
            raise SelectionError("stride", s, needed)
        if antidiagonal.serves(q, k, s, tiling.kv_block):
            blocks = tiling.q_block, tiling.kv_block
            return antidiagonal.scores(q, k, s, blocks, tiling.causal)
        columns = _folded(k, s)  # [B, Hkv, b, s D]
        rows = _folded(group_queries(q, k).flatten(2, 3), s, reverse=True)
        rows = rows.unflatten(1, (k.shape[2], -1))
        shift = tiling.Lk - tiling.Lq
        found = q.new_zeros(
            q.shape[0], q.shape[2], tiling.q_blocks, tiling.kv_blocks,
            dtype=torch.promote_types(q.dtype, torch.float32),
        )  # fmt: skip
        per = tiling.q_block // s
        tiles = max(1, _AT_ONCE // max(per * columns.shape[2] * q.shape[2] * q.shape[0], 1))
        column = torch.arange(columns.shape[2], device=q.device) * s
        behind = tiling.kv_blocks * tiling.kv_block // s - columns.shape[2]
        rows = rows * (1 / (s * q.shape[-1] ** 0.5))
        for first in range(0, tiling.q_blocks, tiles):
            part = rows[:, :, :, first * per : (first + tiles) * per]
            a = (part.flatten(2, 3) @ columns.mT).unflatten(2, part.shape[2:4])
            if tiling.causal:
                row = torch.arange(part.shape[3], device=q.device)[:, None] + first * per
                a.masked_fill_(column > row * s + s - 1 + shift, -torch.inf)
            p = torch.softmax(a, dim=-1, dtype=found.dtype).flatten(1, 2)
            p = F.pad(p, (0, behind)) if behind else p
            # A query that sees no key adds nothing to its tile.
            p = p.unflatten(3, (tiling.kv_blocks, -1)).sum(-1).nan_to_num(0.0)
            p = F.pad(p, (0, 0, 0, -p.shape[2] % per)).unflatten(2, (-1, per)).sum(3)
            found[:, :, first : first + tiles] = p
        return found


def _folded(x: Tensor, stride: int, reverse: bool = False) -> Tensor:
    """[B, H, ceil(L / s), s D] of x [B, L, H, D]: s tokens side by side, zeros behind the last."""
    padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % stride)).unflatten(1, (-1, stride))
    padded = padded.flip(2) if reverse else padded
    result: Tensor = padded.permute(0, 3, 1, 2, 4).flatten(3)
    return result
