"""S6: scores from the first principal directions of the keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._errors import SelectionError
from foveal.selectors.base import Tiling, against_keys


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """max_ij of (q_i U_r) . (k_j U_r) / sqrt(D) in every tile: U_r the first `latent_dim` columns of `basis`.

    Shapes: basis [Hkv, D, D], orthonormal columns by falling variance, as `key_basis` finds them.
    Equals: with latent_dim = D, the exact scores.
    Paper: Loki (2406.02542).
    """

    basis: Tensor
    latent_dim: int

    def __post_init__(self) -> None:
        if not 1 <= self.latent_dim <= self.basis.shape[-1]:
            needed = f"1 to {self.basis.shape[-1]} are needed"
            raise SelectionError("latent_dim", self.latent_dim, needed)

    def scores(self, q: Tensor, k: Tensor, tiling: Tiling) -> Tensor:
        s = self.estimate(q, k)
        if tiling.causal:
            position = torch.arange(tiling.Lq, device=q.device)[:, None] + tiling.Lk - tiling.Lq
            s = s.masked_fill(torch.arange(tiling.Lk, device=q.device) > position, -torch.inf)
        behind = -tiling.Lk % tiling.kv_block, -tiling.Lq % tiling.q_block
        s = F.pad(s, (0, behind[0], 0, behind[1]), value=-torch.inf)
        s = s.unflatten(-1, (-1, tiling.kv_block)).amax(-1)
        result: Tensor = s.unflatten(-2, (-1, tiling.q_block)).amax(-2)
        return result

    def estimate(self, q: Tensor, k: Tensor) -> Tensor:
        """Every estimated score.  [B, Hq, Lq, Lk]"""
        basis = self.basis[..., : self.latent_dim].to(q.dtype)
        groups = q.shape[2] // k.shape[2]
        low_q = torch.einsum("bihd,hdr->bihr", q, basis.repeat_interleave(groups, dim=0))
        low_k = torch.einsum("bjhd,hdr->bjhr", k, basis)
        result: Tensor = against_keys(low_q, low_k) * q.shape[-1] ** -0.5
        return result


def key_basis(k: Tensor) -> Tensor:
    """Principal directions of the keys of each head, by falling variance.  [Hkv, D, D] of [B, L, Hkv, D]"""
    rows = k.detach().flatten(0, 1).transpose(0, 1).to(torch.float64)  # [H, B L, D]
    rows = rows - rows.mean(1, keepdim=True)
    _, vectors = torch.linalg.eigh(rows.mT @ rows)
    result: Tensor = vectors.flip(-1).to(torch.promote_types(k.dtype, torch.float32))
    return result
