"""Attention over what a selector and a budget keep: prefill, backward and decode by one call."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from foveal._attend import attend
from foveal.patterns.base import Pattern
from foveal.patterns.blocks import Blocks
from foveal.patterns.dense import Causal
from foveal.scores.base import Score
from foveal.scores.softmax import Softmax
from foveal.selectors.base import Budget, Selector, select


@overload
def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selector: Selector,
    budget: Budget,
    *,
    q_block: int = ...,
    kv_block: int = ...,
    causal: bool = ...,
    score: Score = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Tensor: ...
@overload
def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selector: Selector,
    budget: Budget,
    *,
    q_block: int = ...,
    kv_block: int = ...,
    causal: bool = ...,
    score: Score = ...,
    return_lse: Literal[True],
    implementation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selector: Selector,
    budget: Budget,
    *,
    q_block: int = 128,
    kv_block: int = 128,
    causal: bool = True,
    score: Score = Softmax(),
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attend` over the key blocks that `budget` keeps of those that `selector` scores.

    Shapes: q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]; the last query stands on the last
    key, so that one query against a cache is a decode step.  Gradients as of `attend`; the choice has
    none.  Equals: with a budget that keeps all, dense or causal attention.
    """
    selection = select(q, k, selector, budget, q_block=q_block, kv_block=kv_block, causal=causal)
    pattern: Pattern = Blocks(selection) & Causal() if causal else Blocks(selection)
    if return_lse:
        return attend(q, k, v, pattern, score, return_lse=True, implementation=implementation)
    return attend(q, k, v, pattern, score, implementation=implementation)
