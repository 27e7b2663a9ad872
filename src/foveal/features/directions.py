"""Maps that treat the length of a token and its direction apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-12


def unit(x: Tensor) -> Tensor:
    """x / |x|, 0 for x = 0: products are cosines.  Paper: Cottention (2409.18747)."""
    return F.normalize(x, dim=-1, eps=_TINY)


def standardised(x: Tensor) -> Tensor:
    """(x - mean(x)) / std(x) over the last axis, std without correction, 1e-6 added to the variance.

    Paper: FAST (2402.07901).
    """
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def norm_aware_q(q: Tensor) -> Tensor:
    """[relu(d)^p, relu(-d)^p], d = q / |q|, p = 3 (1/2 + tanh |q|): long queries are more pointed.

    Shapes: [..., D]; returns [..., 2 D].  The gradient is 0 where a coordinate is 0.
    Paper: NaLaFormer (2506.21137).
    """
    length = (q.square().sum(-1, keepdim=True) + _TINY).sqrt()
    power = 3 * (0.5 + torch.tanh(length))
    direction = q / length
    return torch.cat([_powered(direction, power), _powered(-direction, power)], dim=-1)


def norm_aware_k(k: Tensor) -> Tensor:
    """[relu(k^3), relu(-k^3)]: signs in two halves, lengths kept.

    Shapes: [..., D]; returns [..., 2 D].  Paper: NaLaFormer (2506.21137).
    """
    cubed = k**3
    return torch.cat([torch.relu(cubed), torch.relu(-cubed)], dim=-1)


def _powered(x: Tensor, power: Tensor) -> Tensor:
    """relu(x)^power, with gradient 0 where x <= 0."""
    inside = x > 0
    base = torch.where(inside, x, 1.0)
    return torch.where(inside, base**power, 0.0)
