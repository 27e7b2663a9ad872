"""The tiled edition in plain PyTorch: time and memory follow the tiles of the pattern, never Lq x Lk."""

from __future__ import annotations

from torch import Tensor

from foveal._problem import Problem
from foveal.engines.tile import cpu as tile
from foveal.patterns.base import Pattern
from foveal.scores.base import Geometry
from foveal.scores.entmax import EntmaxForm


def refuses(problem: Problem, pattern: Pattern, score: EntmaxForm) -> str | None:
    if problem.return_lse:
        return "alpha-entmax has no log-sum-exp"
    if isinstance(score.alpha, Tensor):
        return "its tiles share one number alpha; 'reference' takes one per head"
    if problem.device != "cpu":
        return f"it runs on CPU tensors; these are on {problem.device}"
    return None


def attend(
    problem: Problem,
    pattern: Pattern,
    score: EntmaxForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, None]:
    """o [B, Lq, Hq, Dv] of q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]."""
    o, _ = tile.attend(problem, pattern, score, geometry, q, k, v)  # type: ignore[arg-type]
    return o, None
