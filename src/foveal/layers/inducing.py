"""Attention between sets: the blocks of the Set Transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import ShapeError
from foveal._judged import judged
from foveal.patterns import Dense
from foveal.scores import KeyBias, Score, Softmax


@judged
def set_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """o_i = q_i + sum_j softmax_j(scale q_i . k_j) v_j: the query itself is the residual.

    Shapes: q [B, Lq, H, D], k and v [B, Lk, H, D]; key_mask bool [B, Lk], False hides a member.
    Options: scale None is (H D)^-1/2, with the width of all heads as in the paper.
    Equals: in any order of the keys the same.
    Paper: Set Transformer (1810.00825).
    """
    if v.shape[-1] != q.shape[-1]:
        raise ShapeError("v", list(v.shape), f"the head_dim of q, {q.shape[-1]}, is needed")
    if key_mask is not None and key_mask.shape != k.shape[:2]:
        raise ShapeError("key_mask", list(key_mask.shape), f"{list(k.shape[:2])} is needed")
    scale = (q.shape[2] * q.shape[3]) ** -0.5 if scale is None else scale
    score: Score = Softmax(scale=scale)
    if key_mask is not None:
        hidden = torch.zeros(key_mask.shape, dtype=torch.promote_types(q.dtype, torch.float32))
        hidden = hidden.to(q.device).masked_fill(~key_mask, -torch.inf)
        score = score + KeyBias(hidden[:, None])
    return q + attend(q, k, v, Dense(), score, implementation=implementation)


class SetAttentionBlock(nn.Module):
    """MAB(x, y) = LN(h + relu(W h)), h = LN(set_attention(W_q x, W_k y, W_v y)).

    Shapes: x [B, Lx, dim], y [B, Ly, dim], by default x; key_mask bool [B, Ly]; returns [B, Lx, dim].
    Equals: another order of x gives the same rows in that order; another order of y, the same.
    Paper: Set Transformer (1810.00825).
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ShapeError("heads", heads, f"a divisor of dim, {dim}, is needed")
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.units = nn.Linear(dim, dim)
        self.norms = nn.ModuleList((nn.LayerNorm(dim), nn.LayerNorm(dim)))

    def forward(self, x: Tensor, y: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        q, k, v = (
            each(z).unflatten(-1, (self.heads, -1))
            for each, z in ((self.q, x), (self.k, y), (self.v, y))
        )
        h = self.norms[0](set_attention(q, k, v, key_mask=key_mask).flatten(-2))
        z: Tensor = self.norms[1](h + torch.relu(self.units(h)))
        return z


class InducedSetAttention(nn.Module):
    """ISAB(x) = MAB(x, MAB(I, x)) with `points` learned rows I: linear in the size of the set.

    Shapes: x and y [B, L, dim]; key_mask bool [B, L], False hides a member from the others.
    Paper: Set Transformer (1810.00825).
    """

    def __init__(self, dim: int, heads: int, *, points: int = 16) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(points, dim) * dim**-0.5)
        self.gather = SetAttentionBlock(dim, heads)
        self.spread = SetAttentionBlock(dim, heads)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        summary = self.gather(self.points.expand(len(x), -1, -1), x, key_mask)
        y: Tensor = self.spread(x, summary)
        return y


class SetPooling(nn.Module):
    """PMA(x) = MAB(S, relu(W x)) with `seeds` learned rows S: a set becomes a few vectors.

    Shapes: x [B, L, dim]; returns [B, seeds, dim]; key_mask bool [B, L].
    Equals: in any order of x the same.
    Paper: Set Transformer (1810.00825).
    """

    def __init__(self, dim: int, heads: int, *, seeds: int = 1) -> None:
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(seeds, dim) * dim**-0.5)
        self.units = nn.Linear(dim, dim)
        self.block = SetAttentionBlock(dim, heads)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.block(
            self.seeds.expand(len(x), -1, -1), torch.relu(self.units(x)), key_mask
        )
        return y
