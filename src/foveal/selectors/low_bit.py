"""S4: an estimate of every score from 4-bit queries and keys, relative to an exactly computed local mass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._errors import SelectionError
from foveal.selectors.base import Tiling, group_queries

_AT_ONCE = 1 << 26


@dataclass(frozen=True, slots=True)
class LowBit:
    """max_ij of ln RAS_ij in every tile, RAS_ij = exp(s^_ij - m_i) / l_i.

    s^ is the score estimated from queries and keys less their means over the sequence, rounded to `bits`
    with one scale per token; the part of the mean query is added exactly.  m_i and l_i are the maximum
    and the sum of exp(s - m) over the first `sink` keys and the last `local` ones of query i, exactly;
    tiles among those score +inf.  The estimate is computed as products of whole numbers in the dtype of
    q: 4-bit values are exact in bfloat16, float16 and float32, and so are their products' sums.
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

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        if not tiling.causal:
            raise SelectionError("causal", False, "a local region behind each query is needed")
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = q.shape[-1] ** -0.5
        grouped = group_queries(q, k).to(wide) * scale
        keys = k.to(wide)
        mean = grouped.mean(1, keepdim=True)
        rest_q, q_unit = rounded(grouped - mean, self.bits)
        rest_k, k_unit = rounded(keys - keys.mean(1, keepdim=True), self.bits)
        shared = torch.einsum("bihgd,bjhd->bhgij", mean, keys - keys.mean(1, keepdim=True))
        centre = torch.einsum("bihgd,bjhd->bhgij", grouped, keys.mean(1, keepdim=True))
        found = []
        rows = max(tiling.q_block, _AT_ONCE // max(q.shape[0] * q.shape[2] * k.shape[1], 1))
        rows -= rows % tiling.q_block
        for at in range(0, tiling.Lq, rows):
            own = slice(at, min(at + rows, tiling.Lq))
            estimate = torch.einsum("bihgd,bjhd->bhgij", rest_q[:, own], rest_k)
            estimate = estimate * q_unit[:, own].permute(0, 2, 3, 1, 4)
            estimate = estimate * k_unit.permute(0, 2, 3, 1)[:, :, None]
            estimate = estimate + shared + centre[..., own, :]
            exact = torch.einsum("bihgd,bjhd->bhgij", grouped[:, own], keys)
            found.append(self._tiles(estimate, exact, own, tiling))
        return torch.cat(found, dim=3).flatten(1, 2)

    def _tiles(self, estimate: Tensor, exact: Tensor, own: slice, tiling: Tiling) -> Tensor:
        device = exact.device
        position = torch.arange(own.start, own.stop, device=device)[:, None] + tiling.Lk - tiling.Lq
        key = torch.arange(tiling.Lk, device=device)
        near = ((key < self.sink) | (key > position - self.local)) & (key <= position)
        level = torch.logsumexp(exact.masked_fill(~near, -torch.inf), dim=-1, keepdim=True)
        ratio = (estimate - level).masked_fill(near, torch.inf)
        ratio = ratio.masked_fill(key > position, -torch.inf)
        behind = -ratio.shape[-1] % tiling.kv_block, -ratio.shape[-2] % tiling.q_block
        ratio = F.pad(ratio, (0, behind[0], 0, behind[1]), value=-torch.inf)
        tiles = ratio.unflatten(-1, (-1, tiling.kv_block)).amax(-1)
        result: Tensor = tiles.unflatten(-2, (-1, tiling.q_block)).amax(-2)
        return result


def rounded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers of at most 2^(bits - 1) - 1 and the unit per token: x is about numbers * unit."""
    most = 2 ** (bits - 1) - 1
    unit = x.abs().amax(-1, keepdim=True) / most
    return torch.round(x / torch.where(unit == 0, 1.0, unit)), unit
