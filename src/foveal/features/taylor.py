"""The exponential by its first terms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal._errors import RuleError


def taylor(x: Tensor, order: int = 2, scale: float | None = None) -> Tensor:
    """phi(x) with phi(q) . phi(k) = 1 + z + z^2 / 2, z = scale q . k: at least 1/2, near exp(z).

    Equal products x_a x_b and x_b x_a share one feature, times sqrt(2).
    Shapes: x [..., D]; returns [..., 1 + D + D (D + 1) / 2].
    Options: order 1 leaves the square out (weights may be negative then), order 0 everything but the
    1; scale None is D^-1/2.
    Paper: Based (2402.18668); with normalised q and k, FAST (2402.07901).
    """
    if order not in (0, 1, 2):
        raise RuleError("order", order, "0, 1 or 2 is needed")
    dim = x.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    parts = [torch.ones_like(x[..., :1])]
    if order >= 1:
        parts.append(x * math.sqrt(scale))
    if order == 2:
        a, b = torch.triu_indices(dim, dim, device=x.device)
        weight = torch.ones(len(a), dtype=x.dtype, device=x.device)
        weight = weight.masked_fill(a == b, math.sqrt(0.5)) * scale
        parts.append(x[..., a] * x[..., b] * weight)
    return torch.cat(parts, dim=-1)
