"""The definition, written for reading: every stored key of a sequence, a mask, a softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.caches.view import View
from foveal.engines.decode.pairs import pair_scores, read_rows
from foveal.engines.decode.problem import DecodeProblem, Terms
from foveal.engines.tile.reference import visible_product


def refuses(problem: DecodeProblem, terms: Terms) -> str | None:
    return None


def decode(view: View, terms: Terms, q: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and lse [B, Lq, Hq] of q [B, Lq, Hq, D], computed in the dtype of q."""
    outputs, lses = [], []
    for b in range(view.batch):
        o, lse = _one(view, terms, q, b)
        outputs.append(o)
        lses.append(lse)
    return torch.stack(outputs), torch.stack(lses)


def _one(view: View, terms: Terms, q: Tensor, b: int) -> tuple[Tensor, Tensor]:
    _, Lq, heads, _ = q.shape
    k, v, slots = read_rows(view, b, 0, max(view.host_lengths[b]), q.dtype)
    rows = q[b].view(Lq, view.kv_heads, -1, q.shape[3]).permute(1, 2, 0, 3)
    s, visible = pair_scores(view, terms, rows, k, slots, b, 0)
    if terms.sink is not None:
        sink = terms.sink.to(s.dtype).view(view.kv_heads, -1, 1, 1).expand(*s.shape[:3], 1)
        s = torch.cat((s, sink), -1)
    lse = torch.logsumexp(s, -1)
    weights = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    weights = weights[..., : k.shape[1]]
    o = visible_product(weights, v[:, None].expand(-1, weights.shape[1], -1, -1), visible)
    return (
        o.permute(2, 0, 1, 3).reshape(Lq, heads, view.value_dim),
        lse.permute(2, 0, 1).reshape(Lq, heads),
    )
