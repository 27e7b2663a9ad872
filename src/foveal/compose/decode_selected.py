"""A decode step over the blocks of its cache that a list names."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, overload

import torch
from torch import Tensor

from foveal._arguments import need_tensors
from foveal._decode_plan import choose_decode
from foveal._errors import CacheError, ScoreError, SelectionError, ShapeError
from foveal.caches.base import Cache, KVShape, Part
from foveal.caches.view import View
from foveal.engines.decode import triton
from foveal.engines.decode.problem import describe_decode, describe_terms
from foveal.patterns.base import Pattern
from foveal.patterns.blocks import BlockSelection
from foveal.patterns.dense import Dense
from foveal.scores.base import Score
from foveal.scores.softmax import Softmax


@overload
def decode_selected(
    q: Tensor,
    cache: Cache,
    selection: BlockSelection,
    score: Softmax = ...,
    *,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Tensor: ...
@overload
def decode_selected(
    q: Tensor,
    cache: Cache,
    selection: BlockSelection,
    score: Softmax = ...,
    *,
    return_lse: Literal[True],
    implementation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def decode_selected(
    q: Tensor,
    cache: Cache,
    selection: BlockSelection,
    score: Softmax = Softmax(),
    *,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`decode` of one query per sequence over the stored tokens of the blocks that are listed for it.

    Shapes: q [B, 1, Hq, D]; selection.indices [B or 1, 1 or Hkv, 1, n], blocks of kv_block stored tokens
    each, of which the last of a sequence may be shorter; returns o [B, 1, Hq, Dv] and, with
    `return_lse`, the natural lse [B, 1, Hq].
    Options: score, a `Softmax`; implementation as for `decode`.
    Cost: the bytes of the listed tokens; nothing waits for the device.
    Limits: a cache of one part; no gradient.  A sequence whose list is empty gives o = 0, lse = -inf.
    Equals: with all blocks listed `decode`; `attend` of the last query with `Blocks(selection)`.
    """
    view = view_of(cache)
    check_one_query(q)
    if not isinstance(score, Softmax):
        raise ScoreError("score", score, "a Softmax is needed")
    listed = listed_view(view, selection)
    found = decode_view(q, listed, cache.shape, score, Dense(), implementation)
    return found if return_lse else found[0]


def check_one_query(q: Tensor) -> None:
    if q.dim() == 4 and q.shape[1] != 1:
        raise ShapeError("q", list(q.shape), "one query per sequence is needed")


def check_step(q: Tensor, score: object) -> None:
    """Raises for what is no query of a step, or no score that a cache of this folder reads."""
    need_tensors(q=q)
    if q.dim() != 4:
        raise ShapeError("q", list(q.shape), "[batch, 1, heads, head_dim] is needed")
    check_one_query(q)
    if not isinstance(score, Softmax):
        raise ScoreError("score", score, "a Softmax is needed")


def view_of(cache: Cache) -> View:
    """The only part of a cache that keeps keys as they came."""
    parts = cache.parts()
    if len(parts) != 1 or parts[0].shared or type(cache).project is not Cache.project:
        raise CacheError(
            "cache", type(cache).__name__, "a cache of one part of whole keys is needed"
        )
    return parts[0].view


def decode_view(
    q: Tensor,
    view: View,
    shape: KVShape,
    score: Score,
    pattern: Pattern,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o and natural lse over the tokens of a view."""
    parts = (Part(view),)
    problem = describe_decode(q, shape, parts)
    terms = describe_terms(problem, score, pattern, parts)
    plan = choose_decode(problem, terms, implementation)
    found: tuple[Tensor, Tensor] = plan.module.decode(view, terms, q)
    return found


def listed_view(view: View, selection: BlockSelection) -> View:
    """The stored tokens of the listed blocks, one behind the other, as a view of its own."""
    batch, heads = view.batch, view.kv_heads
    shape = selection.indices.shape
    if shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] != 1:
        needed = f"[{batch} or 1, {heads} or 1, 1, n] is needed"
        raise SelectionError("selection", list(shape), needed)
    size = math.gcd(view.page_size, selection.kv_block)
    page_step, head_step, token_step = view.steps
    if token_step != 1 or page_step % size or head_step % size:
        raise CacheError("cache", f"steps {view.steps}", "tokens of a page beside each other")
    table, indices = view.page_table, selection.indices[:, :, 0]
    indices = indices.to(table.device)
    if table.is_cuda and triton.installed():
        from foveal.compose import listed_kernel

        entries, lengths = listed_kernel.listed_pages(view, indices, selection.kv_block, size)
    else:
        entries, lengths = listed_pages(view, indices, selection.kv_block, size)
    lists = entries.shape[1]
    if lists > 1 and table.shape[1] == 1:
        head_step = 0
    return dataclasses.replace(
        view,
        lengths=lengths,
        host_lengths=[[entries.shape[2] * size] * lists for _ in range(batch)],
        page_table=entries,
        page_size=size,
        steps=(size, head_step, 1),
    )


def listed_pages(view: View, indices: Tensor, block: int, size: int) -> tuple[Tensor, Tensor]:
    """The table [B, lists, pieces] and the lengths [B, lists] of blocks [B or 1, 1 or Hkv, n] of a view."""
    table = view.page_table
    page_step, head_step, _ = view.steps
    numbers = indices.to(torch.int64).expand(view.batch, -1, -1)
    within = torch.arange(0, block, size, device=table.device)
    start = (numbers[..., None] * block + within).flatten(2)  # first token of each piece
    used = (numbers >= 0).repeat_interleave(len(within), dim=2)
    lists = max(start.shape[1], table.shape[1], view.lengths.shape[1])
    start, used = start.expand(-1, lists, -1), used.expand(-1, lists, -1)
    inside = (view.lengths[..., None] - start).clamp(0, size)
    lengths = torch.where(used, inside, 0).sum(-1, dtype=torch.int32)
    page = (start // view.page_size).clamp(0, max(table.shape[2] - 1, 0))
    first = table.expand(-1, lists, -1).gather(2, page).long() * page_step
    first = first + start % view.page_size
    if lists > 1 and table.shape[1] == 1:
        first = first + torch.arange(lists, device=table.device)[:, None] * head_step
    return torch.where(used, first // size, 0).to(torch.int32), lengths
