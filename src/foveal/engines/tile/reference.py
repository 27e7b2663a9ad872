"""The definition, written for reading: every pair, a mask, a softmax.  Any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._problem import Problem
from foveal.patterns.base import Pattern
from foveal.scores.base import Geometry
from foveal.scores.normal import NormalForm


def refuses(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    return None


def attend(
    problem: Problem,
    pattern: Pattern,
    score: NormalForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and lse [B, Lq, Hq] of q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]."""
    extent = problem.extent
    k = k.repeat_interleave(problem.groups, dim=2)
    v = v.repeat_interleave(problem.groups, dim=2)
    products = torch.einsum("bihd,bjhd->bhij", q, k) * score.scale
    if score.soft_cap is not None:
        products = score.soft_cap * torch.tanh(products / score.soft_cap)
    q_tokens, k_tokens = torch.arange(extent.Lq)[None], torch.arange(extent.Lk)[None]
    for term in score.terms:
        values = term.values(term.parameter, q_tokens, k_tokens, geometry)
        products = products + values.squeeze(1).to(products.dtype)

    visible = geometry.pattern.allows(
        extent.q_positions()[:, None], extent.k_positions()[None], extent
    ).to(q.device)
    if visible.dim() == 4 and visible.shape[1] not in (1, problem.q_heads):
        visible = visible.repeat_interleave(problem.groups, dim=1)
    products = products.masked_fill(~visible, -torch.inf)
    largest = products.detach().amax(-1, keepdim=True) if extent.Lk else products.new_zeros(())
    if score.sink is not None:
        sink = score.sink.to(products.dtype)[:, None, None]
        largest = torch.maximum(largest, sink.detach())
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weights = torch.exp(products - largest)
    total = weights.sum(-1, keepdim=True)
    if score.sink is not None:
        total = total + torch.exp(sink - largest)
    empty = total == 0
    lse = torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1.0, total)) + largest)
    weights = weights / torch.where(empty, 1.0, total)
    o = visible_product(weights, v.transpose(1, 2), visible)
    return o.transpose(1, 2), lse.squeeze(-1).transpose(1, 2)


def visible_product(weights: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """weights @ values in which a hidden pair adds nothing, even where its value is NaN or inf.

    Shapes: weights [..., i, j] that are 0 where hidden, values [..., j, d], visible [..., i, j].
    """
    if bool(torch.isfinite(values).all()):
        return weights @ values
    pairs = weights[..., None] * values[..., None, :, :]
    return pairs.masked_fill(~visible[..., None], 0.0).sum(-2)
