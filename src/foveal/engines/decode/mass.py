"""The weight that every page of a cache got: a second pass over the keys, with the known lse."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.caches.view import View
from foveal.engines.decode.pairs import pair_scores, read_rows
from foveal.engines.decode.problem import Terms

_KEYS = 4096


def page_weights(view: View, terms: Terms, q: Tensor, lse: Tensor) -> Tensor:
    """[B, Hq, pages]: sums of exp(s_ij - lse_i) over the queries and the tokens of each page.

    Shapes: q [B, Lq, Hq, D], lse [B, Lq, Hq]; pages of page_size tokens in the order of storage.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, Lq, heads, dim = q.shape
    size = view.page_size
    pages = -(-max(max(row) for row in view.host_lengths) // size)
    found = torch.zeros(batch, heads, pages, dtype=wide, device=q.device)
    step = max(_KEYS // size, 1) * size
    for b, lengths in enumerate(view.host_lengths):
        rows = q[b].to(wide).view(Lq, view.kv_heads, -1, dim).permute(1, 2, 0, 3)
        base = lse[b].to(wide).view(Lq, view.kv_heads, -1).permute(1, 2, 0)
        base = torch.where(base == -torch.inf, 0.0, base)
        for start in range(0, max(lengths), step):
            stop = min(start + step, max(lengths))
            k, _, slots = read_rows(view, b, start, stop, wide)
            s, _ = pair_scores(view, terms, rows, k, slots, b, start)
            weights = torch.exp(s - base[..., None]).sum(2).flatten(0, 1)
            weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % size))
            first = start // size
            sums = weights.unflatten(1, (-1, size)).sum(-1)
            found[b, :, first : first + sums.shape[1]] = sums
    return found
