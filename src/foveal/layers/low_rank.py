"""Attention on factors: queries, keys and values are rebuilt piece by piece, never as a whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import ShapeError
from foveal._judged import judged, need_dtype, need_shape
from foveal.compose import merge
from foveal.patterns import Causal, Dense

Factors = tuple[Tensor, Tensor, Tensor]


@judged
def flash_svd(
    q_factor: Tensor,
    k_factor: Tensor,
    v_factor: Tensor,
    q_map: Tensor,
    k_map: Tensor,
    v_map: Tensor,
    *,
    causal: bool = False,
    piece: int = 256,
) -> Tensor:
    """Attention of q = P_q V_q, k = P_k V_k, v = P_v V_v, `piece` tokens of each at a time.

    Shapes: factors P [B, L, H, r], maps V [H, r, D]; returns [B, L, H, D].  r may differ between the
    three.
    Options: piece >= 1 tokens; memory beside the factors and the output is that of three pieces.
    Cost: a key is rebuilt once per piece of queries, L^2 r D / piece more FLOPs per head.
    Equals: attention of the products.
    Paper: FlashSVD: Memory-Efficient Inference with Streaming for Low-Rank Models (2025; number not
    established).
    """
    if piece < 1:
        raise ShapeError("piece", piece, "at least 1 token is needed")
    batch, length, heads = _sizes(q_factor)
    given = (("q", q_factor, q_map), ("k", k_factor, k_map), ("v", v_factor, v_map))
    for name, factor, back in given:
        need_shape(f"{name}_factor", factor, (batch, length, heads, -1), like=q_factor)
        width = q_map.shape[-1] if name == "k" and q_map.dim() else -1
        need_shape(f"{name}_map", back, (heads, factor.shape[3], width), like=q_factor)
        need_dtype(q_factor, **{f"{name}_factor": factor, f"{name}_map": back})
    outputs = []
    for start in range(0, length, piece):
        q = _rebuilt(q_factor[:, start : start + piece], q_map)
        found = []
        for first in range(0, start + piece if causal else length, piece):
            if first >= length:
                break
            k = _rebuilt(k_factor[:, first : first + piece], k_map)
            v = _rebuilt(v_factor[:, first : first + piece], v_map)
            pattern = Causal() if causal and first == start else Dense()
            found.append(attend(q, k, v, pattern, return_lse=True))
        outputs.append(merge([o for o, _ in found], [lse for _, lse in found])[0])
    return torch.cat(outputs, dim=1) if outputs else q_factor.new_zeros(0)


def _sizes(factor: Tensor) -> tuple[int, int, int]:
    need_shape("q_factor", factor, (-1, -1, -1, -1), like=factor)
    return factor.shape[0], factor.shape[1], factor.shape[2]


def _rebuilt(factor: Tensor, back: Tensor) -> Tensor:
    return torch.einsum("blhr,hrd->blhd", factor, back)


class LowRankAttention(nn.Module):
    """y = W_o attention(P_q V_q, P_k V_k, P_v V_v) with P = x A: every projection of a head has rank r.

    Shapes: x and y [B, L, dim]; A [dim, heads r], V [heads, r, D].
    Options: latent_dim r; head_dim D, default dim / heads; `LowRankAttention.of` takes the best factors
    of weights that are there.
    Paper: FlashSVD: Memory-Efficient Inference with Streaming for Low-Rank Models (2025).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        latent_dim: int,
        head_dim: int | None = None,
        causal: bool = False,
        piece: int = 256,
    ) -> None:
        super().__init__()
        D = dim // heads if head_dim is None else head_dim
        self.heads, self.causal, self.piece = heads, causal, piece
        self.down = nn.ModuleList(nn.Linear(dim, heads * latent_dim, bias=False) for _ in range(3))
        self.up = nn.ParameterList(
            nn.Parameter(torch.randn(heads, latent_dim, D) * latent_dim**-0.5) for _ in range(3)
        )
        self.out = nn.Linear(heads * D, dim, bias=False)

    @classmethod
    def of(
        cls,
        weights: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        heads: int,
        *,
        latent_dim: int,
        causal: bool = False,
        piece: int = 256,
    ) -> LowRankAttention:
        """The layer of weights W_q, W_k, W_v [heads D, dim] and W_o [dim, heads D], cut to rank r.

        Equals: with r = min(dim, D), the layer of the weights themselves.
        """
        head_dim, dim = weights[0].shape[0] // heads, weights[0].shape[1]
        options = {"latent_dim": latent_dim, "head_dim": head_dim}
        layer = cls(dim, heads, causal=causal, piece=piece, **options).to(weights[0])
        with torch.no_grad():
            layer.out.weight.copy_(out)
            for weight, down, up in zip(weights, layer.down, layer.up, strict=True):
                left, sizes, right = torch.linalg.svd(
                    weight.unflatten(0, (heads, head_dim)).transpose(1, 2), full_matrices=False
                )
                root = sizes[:, :latent_dim].sqrt()
                factor = left[:, :, :latent_dim] * root[:, None]  # [heads, dim, r]
                down.weight.copy_(factor.transpose(1, 2).flatten(0, 1))  # type: ignore[operator]
                up.copy_(root[:, :, None] * right[:, :latent_dim])
        return layer

    def forward(self, x: Tensor) -> Tensor:
        factors = [down(x).unflatten(-1, (self.heads, -1)) for down in self.down]
        o = flash_svd(*factors, *self.up, causal=self.causal, piece=self.piece)
        y: Tensor = self.out(o.flatten(-2))
        return y
