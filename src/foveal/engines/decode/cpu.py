"""A running softmax over runs of keys, in PyTorch's products; memory does not grow with the length."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.caches.view import View
from foveal.engines.decode.pairs import pair_scores, read_rows
from foveal.engines.decode.problem import DecodeProblem, Terms
from foveal.engines.tile.reference import visible_product

_KEYS = 4096


def refuses(problem: DecodeProblem, terms: Terms) -> str | None:
    return None


def decode(view: View, terms: Terms, q: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] in the dtype of q and lse [B, Lq, Hq]; computed in float32 or wider."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    found = [_one(view, terms, q[b].to(wide), b) for b in range(view.batch)]
    return torch.stack([o for o, _ in found]).to(q.dtype), torch.stack([lse for _, lse in found])


def _one(view: View, terms: Terms, q: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """o [Lq, Hq, Dv] and lse [Lq, Hq] of q [Lq, Hq, D]."""
    Lq, heads, _ = q.shape
    rows = q.view(Lq, view.kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)
    if terms.sink is None:
        largest = q.new_full(rows.shape[:3], -torch.inf)
        total = q.new_zeros(rows.shape[:3])
    else:
        sink = terms.sink.to(q.dtype).view(view.kv_heads, -1, 1)
        largest = sink.expand(rows.shape[:3])
        total = torch.ones_like(largest)
    o = q.new_zeros(*rows.shape[:3], view.value_dim)
    for start, stop in _runs(view, terms, b, Lq):
        k, v, slots = read_rows(view, b, start, stop, q.dtype)
        s, visible = pair_scores(view, terms, rows, k, slots, b, start)
        found = torch.maximum(largest, s.amax(-1))
        base = torch.where(found == -torch.inf, 0.0, found)
        weights = torch.exp(s - base[..., None])
        factor = torch.exp(largest - base)
        total = total * factor + weights.sum(-1)
        values = v[:, None].expand(-1, weights.shape[1], -1, -1)
        o = o * factor[..., None] + visible_product(weights, values, visible)
        largest = found
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, safe.log() + largest)
    o = o / safe[..., None]
    return (
        o.permute(2, 0, 1, 3).reshape(Lq, heads, view.value_dim),
        lse.permute(2, 0, 1).reshape(Lq, heads),
    )


def _runs(view: View, terms: Terms, b: int, Lq: int) -> list[tuple[int, int]]:
    """Runs of keys that some query may see."""
    longest = max(view.host_lengths[b])
    first = 0
    if terms.left is not None:
        first = max(min(view.host_lengths[b]) - terms.left - Lq, 0)
    runs = [(start, min(start + _KEYS, longest)) for start in range(first, longest, _KEYS)]
    sinks = min(terms.sink_tokens, first)
    return [(0, sinks), *runs] if sinks else runs
