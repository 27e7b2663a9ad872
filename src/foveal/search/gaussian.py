"""Gaussian processes over a few hundred measurements, and the improvement that they expect.

With observations y at points X, constant mean m, and covariance

    k(x, x') = theta (1 + sqrt(5) r + 5/3 r^2) exp(-sqrt(5) r),   r^2 = sum_d (x_d - x'_d)^2 / l_d^2

plus noise nu on the diagonal, the posterior at x has mean m + k^T (K + nu I)^-1 (y - m) and variance
k(x, x) - k^T (K + nu I)^-1 k.  The expected improvement below y* is, for g = (y* - mean) / s,

    EI(x) = s (g Phi(g) + phi(g)).

Hyper-parameters are integrated out by slice sampling.  Paper: J. Snoek, H. Larochelle, R. P. Adams, Practical
Bayesian Optimization of Machine Learning Algorithms, 2012.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SQRT5 = math.sqrt(5.0)
_JITTER = 1e-10
_STEPS_OUT = 6
_SHRINKS = 20


@dataclass(frozen=True)
class Hyper:
    """Lengths [D], amplitude theta, noise nu and mean of one process."""

    lengths: Tensor
    amplitude: float
    noise: float
    mean: float


class Posterior:
    """A process given observations y [N] at x [N, D]; several columns y [N, S] share the points."""

    def __init__(self, x: Tensor, y: Tensor, hyper: Hyper) -> None:
        self.x, self.hyper = x, hyper
        self.y = y if y.dim() == 2 else y[:, None]
        covariance = kernel(x, x, hyper)
        covariance.diagonal().add_(hyper.noise + _JITTER * hyper.amplitude)
        self.factor = torch.linalg.cholesky(covariance)
        self.weights = torch.cholesky_solve(self.y - hyper.mean, self.factor)  # [N, S]

    def at(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [P, S] and standard deviation [P] at points [P, D]."""
        cross = kernel(points, self.x, self.hyper)  # [P, N]
        mean = self.hyper.mean + cross @ self.weights
        solved = torch.linalg.solve_triangular(self.factor, cross.T, upper=False)  # [N, P]
        variance = self.hyper.amplitude - solved.square().sum(0)
        return mean, variance.clamp(min=1e-18).sqrt()

    def draw(self, points: Tensor, count: int, source: torch.Generator) -> Tensor:
        """Joint draws [P, count] at points, of the first column."""
        cross = kernel(points, self.x, self.hyper)
        mean = self.hyper.mean + cross @ self.weights[:, :1]
        solved = torch.linalg.solve_triangular(self.factor, cross.T, upper=False)
        covariance = kernel(points, points, self.hyper) - solved.T @ solved
        covariance.diagonal().add_(1e-8 * self.hyper.amplitude + 1e-12)
        normal = torch.randn(len(points), count, generator=source, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(covariance)
        drawn: Tensor = mean + vectors @ (values.clamp(min=0).sqrt()[:, None] * normal)
        return drawn

    @property
    def log_likelihood(self) -> float:
        """Of the first column."""
        fit = float((self.y[:, 0] - self.hyper.mean) @ self.weights[:, 0])
        volume = 2 * float(self.factor.diagonal().log().sum())
        return -0.5 * (fit + volume + len(self.y) * math.log(2 * math.pi))


def kernel(x: Tensor, z: Tensor, hyper: Hyper) -> Tensor:
    """Matern 5/2 covariances [N, M] of x [N, D] and z [M, D]."""
    r = torch.cdist(
        x / hyper.lengths, z / hyper.lengths, compute_mode="donot_use_mm_for_euclid_dist"
    )
    found: Tensor = hyper.amplitude * (1 + _SQRT5 * r + 5 / 3 * r.square()) * torch.exp(-_SQRT5 * r)
    return found


def expected_improvement(mean: Tensor, deviation: Tensor, best: Tensor | float) -> Tensor:
    """EI below `best`; shapes broadcast."""
    g = (best - mean) / deviation
    density = torch.exp(-0.5 * g.square()) / math.sqrt(2 * math.pi)
    found: Tensor = deviation * (g * torch.special.ndtr(g) + density)
    return found


def sample_hypers(
    x: Tensor, y: Tensor, source: torch.Generator, draws: int = 8, burn_in: int = 8
) -> list[Hyper]:
    """Draws from the posterior of the hyper-parameters, by slices in random directions."""
    state = torch.zeros(x.shape[1] + 2, dtype=torch.float64)
    level = _log_density(state, x, y)
    found = []
    for step in range(burn_in + 2 * draws):
        state, level = _slice(state, level, x, y, source)
        if step >= burn_in and (step - burn_in) % 2:
            found.append(_hyper(state, y))
    return found


def _hyper(state: Tensor, y: Tensor) -> Hyper:
    """State 0 is the middle of the priors: lengths 0.5, the spread of y, a noise of 2 % of that."""
    spread = float(y.var(unbiased=False)) + 1e-6
    return Hyper(
        0.5 * state[:-2].exp(),
        spread * float(state[-2].exp()),
        spread * 0.02 * float((1.5 * state[-1]).exp()),
        float(y.mean()),
    )


def _log_density(state: Tensor, x: Tensor, y: Tensor) -> float:
    prior = -0.5 * float(state.square().sum())
    try:
        return Posterior(x, y, _hyper(state, y)).log_likelihood + prior
    except RuntimeError:  # not positive definite
        return -math.inf


def _slice(
    state: Tensor, level: float, x: Tensor, y: Tensor, source: torch.Generator
) -> tuple[Tensor, float]:
    def uniform() -> float:
        return float(torch.rand((), generator=source, dtype=torch.float64))

    direction = torch.randn(len(state), generator=source, dtype=torch.float64)
    direction = direction / direction.norm()
    height = level + math.log(max(uniform(), 1e-300))
    low = -uniform()
    high = low + 1.0
    for _ in range(_STEPS_OUT):
        if _log_density(state + low * direction, x, y) <= height:
            break
        low -= 1.0
    for _ in range(_STEPS_OUT):
        if _log_density(state + high * direction, x, y) <= height:
            break
        high += 1.0
    for _ in range(_SHRINKS):
        step = low + uniform() * (high - low)
        moved = state + step * direction
        reached = _log_density(moved, x, y)
        if reached > height:
            return moved, reached
        low, high = (step, high) if step < 0 else (low, step)
    return state, level
