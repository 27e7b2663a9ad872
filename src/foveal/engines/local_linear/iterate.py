"""Conjugate gradients for many small systems at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, limit: Tensor, max_iterations: int
) -> tuple[Tensor, Tensor, int]:
    """x with A x = b for every row, its residual norms and the number of iterations.

    product(d) is A d, each row by its own positive definite A; a row rests when its residual is at most its
    `limit`, and all end together when every row rests, is not finite, or has an A d that rounding made
    indefinite.  Rows are solved at size 1, so that squares of small ones do not vanish.
    Shapes: b and x [..., rows, D], limit and residual [..., rows, 1].
    """
    unit = b.abs().amax(-1, keepdim=True) if b.shape[-1] else torch.ones_like(limit)
    unit = torch.where((unit > 0) & unit.isfinite(), unit, 1.0)
    x, residual = torch.zeros_like(b), b / unit
    direction = residual.clone()
    size = _dot(residual, residual)
    floor = (limit / unit).square()
    for iteration in range(max_iterations):
        active = size > floor
        if not bool(active.any()):
            return x * unit, size.sqrt() * unit, iteration
        image = product(direction)
        energy = _dot(direction, image)
        definite = energy > 0
        step = torch.where(active & definite, size / energy, 0.0)
        x.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        before, size = size, _dot(residual, residual)
        direction.mul_(torch.where(active, size / before, 0.0)).add_(residual)
        floor = torch.where(definite, floor, torch.inf)
    return x * unit, size.sqrt() * unit, max_iterations


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
