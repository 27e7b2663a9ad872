"""The definition, written for reading: every pair, and a direct solve of D x D per query."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._problem import Problem
from foveal.patterns.base import Pattern
from foveal.scores.base import Geometry
from foveal.scores.local_linear import LocalForm


def refuses(problem: Problem, pattern: Pattern, score: LocalForm) -> str | None:
    return None


def attend(
    problem: Problem,
    pattern: Pattern,
    score: LocalForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and lse [B, Lq, Hq] of q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv].

    The system is assembled in the dtype of q and solved in float32 at least.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(problem.groups, dim=1) for x in (k, v))
    visible = _visible(problem, geometry, q.device)
    k, bad_rows = _contained(k, visible)
    weights, lse = _softmax(q @ k.mT * score.scale, visible)
    mean = weights @ k
    r = _solved(score, q, k, weights, mean, lse) if score.r is None else _rows(score.r).to(q.dtype)
    correction = r @ k.mT - (r * mean).sum(-1, keepdim=True)
    v, bad_entries = _contained_columns(v, visible)
    o = (weights * (1 - correction)) @ v
    o = o.masked_fill(bad_entries | bad_rows, torch.nan)
    lse = lse.masked_fill(bad_rows.squeeze(-1), torch.nan)
    return o.transpose(1, 2), lse.transpose(1, 2)


def _rows(r: Tensor) -> Tensor:
    """[B, H, Lq, D] of [B, *grid, H, D]"""
    return r.flatten(1, -3).transpose(1, 2)


def _visible(problem: Problem, geometry: Geometry, device: torch.device) -> Tensor:
    """[Lq, Lk] or [B or 1, Hq or 1, Lq, Lk]"""
    extent = problem.extent
    visible = geometry.pattern.allows(
        extent.q_positions()[:, None], extent.k_positions()[None], extent
    ).to(device)
    if visible.dim() == 4 and visible.shape[1] not in (1, problem.q_heads):
        visible = visible.repeat_interleave(problem.groups, dim=1)
    return visible


def _contained(k: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """k without NaN and inf, and the rows [..., Lq, 1] that see some."""
    bad = ~k.isfinite().all(-1)
    rows = (visible & bad[..., None, :]).any(-1, keepdim=True)
    return k.masked_fill(bad[..., None], 0.0), rows


def _contained_columns(v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """v without NaN and inf, and the entries [..., Lq, Dv] that are summed from some."""
    bad = ~v.isfinite()
    if not bool(bad.any()):
        return v, bad[..., :1, :1].new_zeros(())
    return v.masked_fill(bad, 0.0), visible.double() @ bad.double() > 0


def _softmax(products: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, 0 in a row that sees nothing, and lse [..., Lq]."""
    products = products.masked_fill(~visible, -torch.inf)
    largest = products.detach().amax(-1, keepdim=True) if products.shape[-1] else 0.0
    largest = torch.where(torch.as_tensor(largest == -torch.inf), 0.0, largest)
    weights = torch.exp(products - largest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, torch.log(safe) + largest)
    return weights / safe, lse.squeeze(-1)


def _solved(
    score: LocalForm, q: Tensor, k: Tensor, weights: Tensor, mean: Tensor, lse: Tensor
) -> Tensor:
    """r [B, H, Lq, D]"""
    centred = k[:, :, None] - mean[:, :, :, None]  # [B, H, Lq, Lk, D]
    system = (weights[..., None] * centred).mT @ centred
    ridge = score.ridge_per_head(q.shape[1], q)[:, None].expand(q.shape[:3])
    if score.detached:
        # ridge times the sum of weights as a constant, over the sum of weights.
        empty = lse == -torch.inf
        finite = lse.masked_fill(empty, 0.0)
        ridge = ridge * torch.exp(finite.detach() - finite)
    system = system + ridge[..., None, None] * torch.eye(
        q.shape[-1], dtype=q.dtype, device=q.device
    )
    wide = torch.promote_types(q.dtype, torch.float32)
    solution: Tensor = torch.linalg.solve_ex(system.to(wide), (mean - q).to(wide)[..., None])[0]
    return solution.squeeze(-1).to(q.dtype)
