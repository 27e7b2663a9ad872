"""What policies score with, from queries and keys, never as a matrix of all pairs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.caches.policies.base import Reading

_ROWS_AT_ONCE = 256


def wide(x: Tensor) -> Tensor:
    """x in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def window_weights(reading: Reading, window: int) -> Tensor:
    """Softmax weights of the newest queries on all stored keys, [B, Hq, w, L].

    P_ij = softmax_j(scale q_i.k_j), causal inside the window; w = min(window, Lq).
    """
    rows = reading.q[:, max(reading.q.shape[1] - window, 0) :]
    return _weights(reading, rows, rows.shape[1])


def attention_sums(reading: Reading) -> Tensor:
    """a_j = sum_i P_ij over all queries of the call, [B, Hq, L], some rows at a time."""
    total = wide(reading.q.new_zeros(len(reading.q), reading.q.shape[2], reading.k.shape[1]))
    newest = reading.q.shape[1]
    for start in range(0, newest, _ROWS_AT_ONCE):
        rows = reading.q[:, start : start + _ROWS_AT_ONCE]
        total = total + _weights(reading, rows, newest - start).sum(2)
    return total


def row_weights(reading: Reading, rows: Tensor) -> Tensor:
    """Softmax weights of any queries [B, w, Hq, D] on all stored keys, without direction."""
    return _weights(replace(reading, causal=False), rows, 0)


def triangle_mass(reading: Reading, width: int) -> Tensor:
    """T_j = sum_{i=j}^{j+width-1} sum_{l=j}^{i} P_il, [B, Hq, L], for a call that reads a whole."""
    length = reading.k.shape[1]
    total = wide(reading.q.new_zeros(len(reading.q), reading.q.shape[2], length))
    for start in range(0, length, _ROWS_AT_ONCE):
        rows = reading.q[:, start : start + _ROWS_AT_ONCE]
        tail = _weights(reading, rows, length - start).flip(-1).cumsum(-1).flip(-1)
        i = torch.arange(start, start + rows.shape[1], device=tail.device)
        for back in range(width):
            inside = i[i >= back]
            total.index_add_(2, inside - back, tail[:, :, inside - start, inside - back])
    return total


def _weights(reading: Reading, rows: Tensor, first_age: int) -> Tensor:
    """Weights of the queries `rows` [B, w, Hq, D], the first of which has `first_age` - 1 behind it."""
    w = rows.shape[1]
    q = wide(rows).transpose(1, 2).unflatten(1, (-1, reading.groups))  # [B, Hkv, G, w, D]
    k = wide(reading.k).transpose(1, 2)[:, :, None]
    scores = torch.matmul(q, k.transpose(-1, -2)) * reading.scale
    if reading.soft_cap is not None:
        scores = reading.soft_cap * torch.tanh(scores / reading.soft_cap)
    visible = reading.real[:, :, None, None]
    if reading.causal:
        ages = first_age - 1 - torch.arange(w, device=q.device)
        visible = visible & (reading.age[:, :, None, None] >= ages[:, None])
    scores = scores.masked_fill(~visible, -torch.inf)
    found: Tensor = scores.softmax(-1).nan_to_num(0.0).flatten(1, 2)
    return found


def per_kv_head(x: Tensor, groups: int) -> Tensor:
    """Mean over the query heads that share a key head: [B, Hkv, ...] of [B, Hq, ...]."""
    mean: Tensor = x.unflatten(1, (-1, groups)).mean(2)
    return mean


def smooth(x: Tensor, width: int) -> Tensor:
    """Mean over `width` neighbours (odd), zeros beyond the ends: [..., L]."""
    flat = x.reshape(-1, 1, x.shape[-1])
    return F.avg_pool1d(flat, width, 1, width // 2, count_include_pad=True).view_as(x)


def widen(x: Tensor, width: int) -> Tensor:
    """Largest of `width` neighbours (odd): [..., L]."""
    return F.max_pool1d(x.reshape(-1, 1, x.shape[-1]), width, 1, width // 2).view_as(x)
