"""The exponential by its first terms."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def taylor(x: Tensor) -> Tensor:
    """phi(x) with phi(q) . phi(k) = 1 + z + z^2 / 2, z = q . k / sqrt(D): at least 1/2, near exp(z).

    Equal products x_a x_b and x_b x_a share one feature, times sqrt(2).
    Shapes: x [..., D]; returns [..., 1 + D + D (D + 1) / 2].
    Paper: Based (2402.18668).
    """
    dim = x.shape[-1]
    a, b = torch.triu_indices(dim, dim, device=x.device)
    weight = torch.ones(len(a), dtype=x.dtype, device=x.device)
    weight = weight.masked_fill(a == b, math.sqrt(0.5)) / math.sqrt(dim)
    products = x[..., a] * x[..., b] * weight
    return torch.cat([torch.ones_like(x[..., :1]), x / dim**0.25, products], dim=-1)
