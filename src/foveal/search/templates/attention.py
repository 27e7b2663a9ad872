"""Attention in tiles, in plain PyTorch: what a search tunes where there is no GPU.

    o[h, i] = sum_j softmax_j(q[h, i] . k[h, j] / sqrt(D)) v[h, j],    j <= i + Lk - Lq when causal,

with q [H, Lq, D], k and v [H, Lk, D].  A running maximum and sum per row join the tiles of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def build(
    *,
    causal: bool = True,
    reference: bool = False,
    q_tile: int = 64,
    kv_tile: int = 64,
    skip: bool = False,
    base2: bool = False,
    heads_first: bool = False,
    scaled: str = "scores",
) -> Attention:
    """The reference, or attention in tiles of `q_tile` queries and `kv_tile` keys.

    Options: skip: leave out tiles in which no pair is seen; base2: exponentials to the base 2;
    heads_first: one head after the other in place of all at once; scaled: "scores" or "queries" are
    multiplied with the scale.
    """
    if reference:
        return lambda q, k, v: _plain(q, k, v, causal)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        offset = k.shape[1] - q.shape[1]
        unit = _LOG2_E if base2 else 1.0
        scale = unit / math.sqrt(q.shape[2])
        q = q * scale if scaled == "queries" else q
        rows = []
        for first in range(0, q.shape[1], q_tile):
            part = q[:, first : first + q_tile]
            last_seen = first + part.shape[1] + offset
            stop = min(k.shape[1], last_seen) if causal and skip else k.shape[1]
            rows.append(
                _row_of_tiles(
                    part,
                    k[:, :stop],
                    v[:, :stop],
                    kv_tile,
                    first + offset if causal else None,
                    1.0 if scaled == "queries" else scale,
                    torch.exp2 if base2 else torch.exp,
                )
            )
        return torch.cat(rows, 1)

    if not heads_first:
        return whole
    return lambda q, k, v: torch.cat(
        [whole(q[h : h + 1], k[h : h + 1], v[h : h + 1]) for h in range(len(q))]
    )


def _row_of_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_tile: int,
    diagonal: int | None,
    scale: float,
    exponential: Callable[[Tensor], Tensor],
) -> Tensor:
    """`diagonal`: the last key that the first query sees; None: all are seen."""
    largest = q.new_full((*q.shape[:2], 1), -math.inf)
    total = q.new_zeros((*q.shape[:2], 1))
    o = q.new_zeros((*q.shape[:2], v.shape[2]))
    rows = torch.arange(q.shape[1])[:, None]
    for first in range(0, k.shape[1], kv_tile):
        keys = k[:, first : first + kv_tile]
        scores = (q @ keys.transpose(1, 2)) * scale  # [H, q_tile, kv_tile]
        last = first + keys.shape[1] - 1
        if diagonal is not None and last > diagonal:
            columns = torch.arange(first, last + 1)[None]
            scores = scores.masked_fill(columns > rows + diagonal, -math.inf)
        higher = torch.maximum(largest, scores.amax(2, keepdim=True))
        safe = torch.where(higher == -math.inf, 0.0, higher)
        kept = exponential(largest - safe)
        weights = exponential(scores - safe)
        total = total * kept + weights.sum(2, keepdim=True)
        o = o * kept + weights @ v[:, first : first + kv_tile]
        largest = higher
    return o / torch.where(total == 0, 1.0, total)


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    if causal:
        rows = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        scores = scores.masked_fill(torch.arange(k.shape[1])[None] > rows, -math.inf)
    return torch.softmax(scores, 2) @ v
