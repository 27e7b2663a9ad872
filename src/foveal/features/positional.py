"""Maps that put the position of a token into its features."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_reweighted(x: Tensor, positions: Tensor, limit: int) -> Tensor:
    """phi(x_t) = [relu(x_t) sin(a_t), relu(x_t) cos(a_t)], a_t = pi t / (2 limit).

    phi(q_i) . phi(k_j) = relu(q_i) . relu(k_j) cos(pi (i - j) / (2 limit)).
    Shapes: x [B, L, H, D], positions t [L] or [B, L]; returns [B, L, H, 2 D].
    Limits: positions must lie in 0, ..., limit, else weights turn negative; a model keeps one limit.
    Paper: cosFormer (2202.08791).
    """
    angle = (positions.to(x.dtype) * (math.pi / (2 * limit)))[..., None, None]
    positive = torch.relu(x)
    return torch.cat([positive * angle.sin(), positive * angle.cos()], dim=-1)


def linear_relative(x: Tensor, positions: Tensor, angles: Tensor) -> Tensor:
    """phi(x_t) = [x_t cos(t theta), x_t sin(t theta)]: products sum_d q_d k_d cos((i - j) theta_d).

    Shapes: x [B, L, H, D], positions t [L] or [B, L], angles theta [H, D]; returns [B, L, H, 2 D].
    Paper: linearised relative positional encoding, as in TransNormerLLM (2307.14995).
    """
    phase = positions.to(x.dtype)[..., None, None] * angles.to(x.dtype)
    return torch.cat([x * phase.cos(), x * phase.sin()], dim=-1)
