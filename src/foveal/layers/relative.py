"""Random-feature attention with a weight for every distance: kernelised relative position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal._errors import ShapeError
from foveal._judged import judged
from foveal.features import positive_random, toeplitz_contract, unit
from foveal.layers.feature_attention import default_projection
from foveal.layers.heads import Projections


@judged
def kernelised_relative(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    projection: Tensor | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """o_i = sum_j w_ij v_j / sum_j w_ij, w_ij = exp(bias_{j-i}) phi(q_i) . phi(k_j), unit q and k.

    phi is `positive_random` with products near exp(q_i . k_j).
    Shapes: q, k, v [B, L, H, .]; bias [H, 2 L - 1], entry j - i + L - 1, 0 by default; projection [m, D],
    by default D ln D orthogonal directions.
    Options: implementation "fft" or "pairs" as for `toeplitz_contract`.
    """
    projection = default_projection(q.shape[-1]) if projection is None else projection
    if bias is None:
        bias = v.new_zeros(q.shape[2], max(2 * q.shape[1] - 1, 0))
    phi_q, phi_k = (positive_random(unit(x), projection, scale=1.0) for x in (q, k))
    return toeplitz_contract(phi_q, phi_k, v, bias, causal=causal, implementation=implementation)


class KernelisedRelativeAttention(Projections):
    """y = W_o kernelised_relative(q, k, v, bias) with a learned bias for every distance up to `longest`.

    Shapes: x and y [B, L, dim], L <= longest.
    Paper: Kernelized Attention with Relative Positional Encoding (2106.12566).
    """

    projection: Tensor

    def __init__(self, dim: int, heads: int, *, longest: int = 512, causal: bool = False) -> None:
        super().__init__(dim, heads)
        self.causal = causal
        self.longest = longest
        self.bias = nn.Parameter(torch.zeros(heads, 2 * longest - 1))
        self.register_buffer("projection", default_projection(dim // heads))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length > self.longest:
            raise ShapeError("x", list(x.shape), f"at most {self.longest} tokens are needed")
        bias = self.bias[:, self.longest - length : self.longest + length - 1]
        o = kernelised_relative(
            *self.split(x), bias, projection=self.projection, causal=self.causal
        )
        return self.join(o)
