"""Regression with nothing trained: keys are points, values noisy targets, a query asks for the target there.

Points lie on a sphere, where softmax weights are those of a Gaussian kernel.  Every estimator has one knob
or two, chosen on sets of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import foveal as fv

Estimate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries [B, Q, d], points [B, n, d], targets [B, n, 1]) to what is expected at the queries [B, Q, 1]."""


@dataclass(frozen=True)
class Target:
    """A piecewise smooth function on the sphere of R^d: two waves, a slope, and a jump across a plane."""

    dim: int
    seed: int

    def __call__(self, x: Tensor) -> Tensor:
        """[..., 1] of x [..., d]"""
        source = torch.Generator().manual_seed(self.seed)
        waves = torch.randn(self.dim, 2, generator=source, dtype=torch.float64)
        edge = torch.randn(self.dim, generator=source, dtype=torch.float64)
        phases = x @ waves * (2 * math.pi / waves.norm(dim=0)) / 2
        jump = (x @ edge > 0).to(x.dtype)
        return (phases.sin().sum(-1) + 0.5 * x @ edge / edge.norm() + jump)[..., None]


def sphere(source: torch.Generator, *shape: int) -> Tensor:
    """Points drawn evenly from the unit sphere."""
    x = torch.randn(shape, generator=source, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def _heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x[:, :, None] for x in tensors)


def _softmax(scale: float) -> Estimate:
    return lambda q, k, v: fv.attend(*_heads(q, k, v), score=fv.Softmax(scale))[:, :, 0]


def _local_linear(scale: float, ridge: float) -> Estimate:
    score = fv.LocalLinear(ridge, scale=scale, tolerance=1e-6)
    return lambda q, k, v: fv.attend(*_heads(q, k, v), score=score)[:, :, 0]


def _linear(ridge: float) -> Estimate:
    """One line through all points: what linear attention can hold at its best."""

    def estimate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mean_k, mean_v = k.mean(1, keepdim=True), v.mean(1, keepdim=True)
        k, v = k - mean_k, v - mean_v
        system = k.mT @ k / k.shape[1] + ridge * torch.eye(k.shape[2], dtype=k.dtype)
        return mean_v + (q - mean_k) @ torch.linalg.solve(system, k.mT @ v / v.shape[1])

    return estimate


def _delta(gate: float, decay: float) -> Estimate:
    """Gated DeltaNet: descends on the error at one point after another; a constant joins the coordinates."""

    def estimate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = torch.ones_like(k[..., :1])
        keys = torch.cat([k, one], dim=-1) / math.sqrt(2)
        gates = torch.full_like(k[..., :1], gate)
        decays = torch.full_like(gates, decay)
        _, state = fv.scan(
            *_heads(keys, keys, v),
            fv.Delta(),
            log_decay=decays,
            write_gate=gates,
            return_state=True,
        )
        asked = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1) / math.sqrt(2)
        return asked @ state[:, 0]

    return estimate


_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
KNOBS: dict[str, tuple[Estimate, ...]] = {
    "local linear": tuple(
        _local_linear(s, r) for s, r in itertools.product(_SCALES, (1e-3, 1e-2, 1e-1))
    ),
    "softmax": tuple(_softmax(scale) for scale in _SCALES),
    "linear": tuple(_linear(ridge) for ridge in (1e-3, 1e-2, 1e-1)),
    "Gated DeltaNet": tuple(
        _delta(g, a) for g, a in itertools.product((0.03, 0.1, 0.3, 1.0), (0.0, -0.003))
    ),
}
NOISE = 0.3


def judge(dim: int, points: int, draws: int, seed: int) -> list[dict[str, Any]]:
    """Mean squared error, squared bias and variance of every estimator on one target, over draws of noise
    and points; knobs are chosen on other draws."""
    target, source = Target(dim, seed), torch.Generator().manual_seed(1000 + seed)

    def data(count: int) -> tuple[Tensor, Tensor]:
        x = sphere(source, count, points, dim)
        noise = torch.randn(count, points, 1, generator=source, dtype=torch.float64)
        return x, target(x) + NOISE * noise

    asked = sphere(source, 1, 128, dim)
    truth = target(asked)
    records = []
    chosen_on, judged_on = data(max(draws // 4, 1)), data(draws)
    for name, knobs in KNOBS.items():

        def error(estimate: Estimate) -> float:
            x, y = chosen_on
            return float((estimate(asked.expand(len(x), -1, -1), x, y) - truth).square().mean())

        best = min(knobs, key=error)
        found = best(asked.expand(draws, -1, -1), *judged_on)
        variance = float(found.var(0).mean())
        bias = float((found.mean(0) - truth[0]).square().mean()) - variance / draws
        records.append(
            {
                "task": "regression",
                "model": name,
                "dim": dim,
                "points": points,
                "seed": seed,
                "error": float((found - truth).square().mean()),
                "bias": max(bias, 0.0),
                "variance": variance,
            }
        )
    return records
