"""Attention of some key heads of every sequence: the others are not computed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import SelectionError
from foveal.caches.base import Cache
from foveal.compose.decode_selected import decode_view, view_of
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Causal, Dense
from foveal.patterns.selections import HeadSelection
from foveal.scores.softmax import Softmax


def attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: HeadSelection,
    pattern: Pattern = Dense(),
    score: Softmax = Softmax(),
    *,
    implementation: str | None = None,
) -> Tensor:
    """`attend` of the key heads that are listed for each sequence; query heads of the others give 0.

    Shapes: q [B, *grid, Hq, D], k [B, *grid, Hkv, D], v [B, *grid, Hkv, Dv]; selection.indices [B, n];
    returns o [B, *grid, Hq, Dv].
    Options: pattern without lists per head; score, a scale and a soft cap.
    Cost: that of n of the Hkv key heads.  Gradients of heads that are left out are 0.
    Equals: with all heads listed `attend`.
    Paper: Polar Sparsity (2505.14884).
    """
    heads = k.shape[-2]
    indices = _checked(selection, k.shape[0], heads)
    if score.sink is not None:
        raise SelectionError("score", "a sink", "a Softmax without one is needed")
    grouped = q.unflatten(-2, (heads, -1))
    own_q = _taken(grouped, indices, -3).flatten(-3, -2)
    own_k, own_v = (_taken(x, indices, -2) for x in (k, v))
    o = attend(own_q, own_k, own_v, pattern, score, implementation=implementation)
    o = o.unflatten(-2, (indices.shape[1], -1))
    listed = (selection.indices >= 0).to(o.device)
    o = o.masked_fill(~_along(listed, o, -3), 0.0)
    whole = o.new_zeros(*o.shape[:-3], heads + 1, *o.shape[-2:])
    place = torch.where(listed, indices, heads)
    whole = whole.scatter(o.dim() - 3, _along(place, o, -3).expand_as(o), o)
    found: Tensor = whole[..., :heads, :, :].flatten(-3, -2)
    return found


def decode_heads(
    q: Tensor,
    cache: Cache,
    selection: HeadSelection,
    score: Softmax = Softmax(),
    *,
    implementation: str | None = None,
) -> Tensor:
    """`decode` of the key heads that are listed for each sequence; query heads of the others give 0.

    Shapes: q [B, Lq, Hq, D]; selection.indices [B, n]; returns o [B, Lq, Hq, Dv].
    Cost: the stored bytes of the listed heads.
    Limits: a cache of one part; no gradient.
    Equals: with all heads listed `decode`.
    Paper: Polar Sparsity (2505.14884).
    """
    view = view_of(cache)
    batch, heads = view.batch, view.kv_heads
    _checked(selection, batch, heads)
    mask = selection.mask(heads).to(view.lengths.device)
    page_step, head_step, token_step = view.steps
    table = view.page_table
    if table.shape[1] == 1 and heads > 1:
        if page_step and head_step % page_step:
            raise SelectionError("cache", f"steps {view.steps}", "heads whole pages apart")
        apart = head_step // page_step if page_step else 0
        table = table + torch.arange(heads, device=table.device, dtype=table.dtype)[:, None] * apart
    own = dataclasses.replace(
        view,
        lengths=torch.where(mask, view.lengths.expand(-1, heads), 0),
        host_lengths=[list(row) * (heads // len(row)) for row in view.host_lengths],
        page_table=table.contiguous(),
        steps=(page_step, 0 if heads > 1 else head_step, token_step),
    )
    return decode_view(q, own, cache.shape, score, Causal(), implementation)[0]


def _checked(selection: HeadSelection, batch: int, heads: int) -> Tensor:
    """int64 [B, n], 0 where a list is shorter."""
    indices = selection.indices
    if indices.shape[0] != batch or (indices.numel() and int(indices.max()) >= heads):
        raise SelectionError(
            "selection", list(indices.shape), f"lists of {batch} sequences below {heads} are needed"
        )
    return indices.clamp(min=0).long()


def _taken(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """The heads of each sequence that are listed."""
    shape = list(x.shape)
    shape[axis] = indices.shape[1]
    return x.gather(x.dim() + axis, _along(indices.to(x.device), x, axis).expand(shape))


def _along(x: Tensor, other: Tensor, axis: int) -> Tensor:
    """x [B, n] with its n on an axis of `other`."""
    before = other.dim() + axis - 1
    return x.view(x.shape[0], *(1,) * before, x.shape[1], *(1,) * (-axis - 1))
