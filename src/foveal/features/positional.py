"""Maps that put the position of a token into its features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal._errors import RuleError, ShapeError


def cosine_reweighted(x: Tensor, positions: Tensor, limit: int) -> Tensor:
    """phi(x_t) = [relu(x_t) sin(a_t), relu(x_t) cos(a_t)], a_t = pi t / (2 limit).

    phi(q_i) . phi(k_j) = relu(q_i) . relu(k_j) cos(pi (i - j) / (2 limit)).
    Shapes: x [B, L, H, D], positions t [L] or [B, L]; returns [B, L, H, 2 D].
    Limits: positions must lie in 0, ..., limit, else weights turn negative; a model keeps one limit.
    Paper: cosFormer (2202.08791).
    """
    if not limit > 0:
        raise RuleError("limit", limit, "at least 1 token is needed")
    angle = (_places(positions, x) * (math.pi / (2 * limit)))[..., None, None]
    positive = torch.relu(x)
    sin, cos = (wave.to(x.dtype) for wave in (angle.sin(), angle.cos()))
    return torch.cat([positive * sin, positive * cos], dim=-1)


def linear_relative(x: Tensor, positions: Tensor, angles: Tensor) -> Tensor:
    """phi(x_t) = [x_t cos(t theta), x_t sin(t theta)]: products sum_d q_d k_d cos((i - j) theta_d).

    Shapes: x [B, L, H, D], positions t [L] or [B, L], angles theta [H, D]; returns [B, L, H, 2 D].
    Paper: linearised relative positional encoding, as in TransNormerLLM (2307.14995).
    """
    if angles.shape != x.shape[-2:]:
        raise ShapeError("angles", list(angles.shape), f"{list(x.shape[-2:])} is needed")
    places = _places(positions, x)
    phase = places[..., None, None] * angles.to(places.dtype)
    cos, sin = (wave.to(x.dtype) for wave in (phase.cos(), phase.sin()))
    return torch.cat([x * cos, x * sin], dim=-1)


def _places(positions: Tensor, x: Tensor) -> Tensor:
    """Positions in float32 at least: bfloat16 counts to 256, and a phase needs the digits behind it."""
    return positions.to(torch.promote_types(x.dtype, torch.float32))
