"""alpha-entmax of the rows of a matrix, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 60


def threshold(z: Tensor, power: Tensor | float) -> Tensor:
    """tau [..., 1] with sum_j [z_j - tau]_+ ^ power = 1 of z [..., j] (-inf: not there); no gradient.

    Bisection inside [max z - 1, max z), each step replaced by Halley's where that stays inside.  A row
    without entries gives inf.
    """
    with torch.no_grad():
        if z.shape[-1] == 0:
            return z.new_full((*z.shape[:-1], 1), torch.inf)
        top = z.amax(-1, keepdim=True)
        blind = top == -torch.inf
        high = torch.where(blind, torch.ones_like(top), top)
        low = high - 1
        tau, tiny = low, torch.finfo(z.dtype).eps
        for _ in range(_STEPS):
            over, slope, curve = _moments(z, tau, power)
            low, high = torch.where(over >= 0, tau, low), torch.where(over <= 0, tau, high)
            first, second = -power * slope, power * (power - 1) * curve
            below = 2 * first * first - over * second
            guess = tau - 2 * over * first / torch.where(below > 0, below, 1.0)
            inside = (below > 0) & (guess >= low) & (guess <= high)
            found = torch.where(inside, guess, (low + high) / 2)
            done = bool(((found - tau).abs() <= tiny * high.abs().clamp_min(1.0)).all())
            tau = found
            if done:
                break
        return torch.where(blind, torch.inf, tau)


def _moments(z: Tensor, tau: Tensor, power: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """sum r^a - 1, sum r^(a-1) and sum r^(a-2) over r = z - tau > 0."""
    r = (z - tau).clamp_min(0.0)
    some = r > 0
    safe = torch.where(some, r, 1.0)
    slope = torch.where(some, safe ** (power - 1), 0.0)
    over = (slope * r).sum(-1, keepdim=True) - 1
    return over, slope.sum(-1, keepdim=True), (slope / safe).sum(-1, keepdim=True)


def weights(s: Tensor, alpha: Tensor | float) -> Tensor:
    """p [..., j] of scores s (-inf: not there), differentiable in s and alpha; rows without entries are 0.

    The threshold is found without gradients; a Newton step from it, which is 0 to rounding, has the
    gradient of the solution.
    """
    power = 1 / (alpha - 1)
    hidden = s == -torch.inf
    z = torch.where(hidden, 0.0, s) * (alpha - 1)
    tau = threshold(z.detach().masked_fill(hidden, -torch.inf), _detached(power))
    blind = tau == torch.inf
    tau = torch.where(blind, 0.0, tau)
    some = (z.detach() > tau) & ~hidden & ~blind
    r = torch.where(some, z - tau, 1.0)
    slope = torch.where(some, r.detach() ** (_detached(power) - 1), 0.0).sum(-1, keepdim=True)
    over = torch.where(some, r**power, 0.0).sum(-1, keepdim=True) - 1
    step = torch.where(blind, 0.0, over / (_detached(power) * torch.where(blind, 1.0, slope)))
    # A key that the step takes below the threshold keeps its place: its weight is 0 to rounding.
    p = torch.where(some, torch.where(some, z - tau - step, 1.0).clamp_min(0.0), 0.0)
    return torch.where(some & (p > 0), torch.where(p > 0, p, 1.0) ** power, 0.0)


def _detached(x: Tensor | float) -> Tensor | float:
    return x.detach() if isinstance(x, Tensor) else x
