"""Scores of queries against a run of stored keys, in PyTorch: any device, any precision."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.caches.view import View
from foveal.engines.decode.problem import Terms


def read_rows(
    view: View, b: int, start: int, stop: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """k [Hkv, n, D], v [Hkv, n, Dv] and slots [Hkv, n] of tokens start to stop of sequence b.

    Rows behind the length of their head are 0.
    """
    tokens = torch.arange(start, stop, device=view.lengths.device)
    one = View(
        **{
            **{name: getattr(view, name) for name in view.__dataclass_fields__},
            "page_table": view.page_table[b : b + 1],
        }
    )
    stored = (tokens < view.lengths[b, :, None])[..., None]
    slots = torch.where(stored[..., 0], one.slots(tokens[None, None])[0], 0)
    k = view.keys.read(slots, dtype).masked_fill(~stored, 0)
    if view.values is None:
        return k, k[..., : view.value_dim], slots
    return k, view.values.read(slots, dtype).masked_fill(~stored, 0), slots


def pair_scores(
    view: View, terms: Terms, q: Tensor, k: Tensor, slots: Tensor, b: int, start: int
) -> tuple[Tensor, Tensor]:
    """Scores [Hkv, G, Lq, n] of sequence b, -inf where hidden, and what is visible.

    Shapes: q [Hkv, G, Lq, D], k [Hkv, n, D], slots [Hkv, n]; the keys are tokens start, start + 1, ...
    """
    heads, groups, Lq, _ = q.shape
    count = k.shape[1]
    s = torch.einsum("hgid,hjd->hgij", q, k) * terms.scale
    if terms.soft_cap is not None:
        s = terms.soft_cap * torch.tanh(s / terms.soft_cap)
    device = q.device
    length = view.lengths[b].long()[:, None, None, None]
    after = 0 if view.after is None else view.after[b].long()
    j = torch.arange(start, start + count, device=device)
    i = torch.arange(Lq, device=device)[:, None]
    q_pos = view.seen[b].long() - Lq + i
    if view.positions is None:
        k_pos = j + view.seen[b].long() - after - length
    else:
        k_pos = view.positions[slots].long()[:, None, None]
    visible = (j < length).expand(heads, 1, Lq, count)
    if terms.causal:
        visible = visible & (j <= length + after - Lq + i)
    if terms.left is not None:
        visible = visible & ((k_pos >= q_pos - terms.left) | (k_pos < terms.sink_tokens))
    if terms.slopes is not None:
        slopes = terms.slopes.view(heads, groups, 1, 1).to(s.dtype)
        s = s - slopes * (q_pos - k_pos).abs().to(s.dtype)
    if terms.key_bias is not None:
        bias = terms.key_bias[b if terms.key_bias.shape[0] > 1 else 0, :, start : start + count]
        own = bias.shape[0] == heads * groups
        bias = bias.reshape(heads, groups, 1, count) if own else bias[:, None, None]
        s = s + bias.to(s.dtype)
    if view.bias is not None:
        s = s + view.bias[slots].to(s.dtype)[:, None, None]
    return s.masked_fill(~visible, -torch.inf), visible
