"""The definition, written for reading: every pair, a mask, a threshold.  Any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._problem import Problem
from foveal.engines.entmax.solve import weights
from foveal.engines.tile.reference import visible_product
from foveal.patterns.base import Pattern
from foveal.scores.base import Geometry
from foveal.scores.entmax import EntmaxForm


def refuses(problem: Problem, pattern: Pattern, score: EntmaxForm) -> str | None:
    return "alpha-entmax has no log-sum-exp" if problem.return_lse else None


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
    extent = problem.extent
    k = k.repeat_interleave(problem.groups, dim=2)
    v = v.repeat_interleave(problem.groups, dim=2)
    products = torch.einsum("bihd,bjhd->bhij", q, k) * score.scale
    visible = geometry.pattern.allows(
        extent.q_positions()[:, None], extent.k_positions()[None], extent
    ).to(q.device)
    if visible.dim() == 4 and visible.shape[1] not in (1, problem.q_heads):
        visible = visible.repeat_interleave(problem.groups, dim=1)
    products = products.masked_fill(~visible, -torch.inf)
    alpha = score.alpha
    if isinstance(alpha, Tensor):
        alpha = alpha.to(products.dtype)[:, None, None]
    p = weights(products, alpha)
    return visible_product(p, v.transpose(1, 2), visible).transpose(1, 2), None
