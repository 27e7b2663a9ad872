"""A local mix by its definition: gather every window, multiply, add.  Any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.engines.convolution.mix_problem import LocalMix, places


def refuses(problem: LocalMix) -> str | None:
    return None


def caveat(problem: LocalMix) -> str | None:
    return None


def mix(problem: LocalMix, weights: Tensor, v: Tensor) -> Tensor:
    """[B, *grid, H, D]"""
    return mix_in(torch.promote_types(v.dtype, torch.float32), problem, weights, v)


def mix_in(dtype: torch.dtype, problem: LocalMix, weights: Tensor, v: Tensor) -> Tensor:
    """As `mix` with all arithmetic in `dtype`."""
    index, exists = (x.to(v.device) for x in places(problem))
    near = v.flatten(1, -3).to(dtype)[:, index]  # [B, L, taps, H, D]
    near = torch.where(exists[:, :, None, None], near, 0.0)
    o = (weights.flatten(1, -3).to(dtype).mT[..., None] * near).sum(2)
    found: Tensor = o.unflatten(1, problem.grid).to(v.dtype)
    return found
