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
    `limit`, and all end together when every row rests or is not finite.
    Shapes: b and x [..., rows, D], limit and residual [..., rows, 1].
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    size = _dot(residual, residual)
    floor = limit * limit
    for iteration in range(max_iterations):
        active = size > floor
        if not bool(active.any()):
            return x, size.sqrt(), iteration
        image = product(direction)
        step = torch.where(active, size / _dot(direction, image), 0.0)
        x.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        before, size = size, _dot(residual, residual)
        direction.mul_(torch.where(active, size / before, 0.0)).add_(residual)
    return x, size.sqrt(), max_iterations


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
