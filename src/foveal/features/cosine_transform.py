"""Softmax of weighted cosine-transform coefficients: the feature map of DiJiang."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal._errors import ShapeError


def dct_matrix(dim: int) -> Tensor:
    """The orthonormal cosine transform C [dim, dim] in float64: row i holds coefficient i of a vector.

    C_ij = sqrt(2 / dim) cos(pi i (2 j + 1) / (2 dim)), row 0 times sqrt(1/2).
    """
    at = torch.arange(dim, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi * at[:, None] * (2 * at + 1) / (2 * dim)) * math.sqrt(2 / dim)
    matrix[0] *= math.sqrt(0.5)
    return matrix


def gaussian_quantiles(dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Weights [dim] in float32 for `dct_softmax`: normal quantiles of uniform random numbers."""
    device = "cpu" if generator is None else generator.device
    uniform = torch.rand(dim, generator=generator, dtype=torch.float64, device=device)
    quantiles: Tensor = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    return quantiles.float()


def dct_softmax(x: Tensor, weights: Tensor) -> Tensor:
    """phi(x) = softmax(weights * C x), C the orthonormal cosine transform: positive, sums to 1.

    Shapes: x [..., D], weights [D]; returns [..., D].
    Paper: DiJiang (2403.19928), weighted quasi-Monte-Carlo features.
    """
    if weights.shape != x.shape[-1:]:
        raise ShapeError("weights", list(weights.shape), f"{list(x.shape[-1:])} is needed")
    matrix = dct_matrix(x.shape[-1]).to(x) * weights.to(x)[:, None]
    return torch.softmax(x @ matrix.mT, dim=-1)
