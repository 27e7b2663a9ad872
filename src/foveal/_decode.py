"""The decode engine's verb."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from foveal._arguments import need_tensors
from foveal._autocast import in_own_dtypes
from foveal._capture import as_one
from foveal._decode_plan import choose_decode
from foveal._errors import CacheError, PatternError, ScoreError, ShapeError
from foveal._host import on_host
from foveal._operators_verbs import Body, as_operator
from foveal.caches.base import Cache, Part
from foveal.caches.view import View
from foveal.compose.decode_lines import decode_lines, fits_lines
from foveal.compose.merge import merge
from foveal.engines.decode import cpu, reference
from foveal.engines.decode.problem import (
    DecodeProblem,
    Terms,
    check_key_bias,
    describe_decode,
    describe_terms,
)
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Causal
from foveal.scores.base import Score
from foveal.scores.softmax import Softmax

Run = Callable[[View, Terms, Tensor], Sequence[Tensor]]
"""o and lse of the tokens of a view."""


@overload
def decode(
    q: Tensor,
    cache: Cache,
    score: Score = ...,
    *,
    pattern: Pattern = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Tensor: ...
@overload
def decode(
    q: Tensor,
    cache: Cache,
    score: Score = ...,
    *,
    pattern: Pattern = ...,
    return_lse: Literal[True],
    implementation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@on_host
@in_own_dtypes
def decode(
    q: Tensor,
    cache: Cache,
    score: Score = Softmax(),
    *,
    pattern: Pattern = Causal(),
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """o_i = sum_j w_ij v_j over the stored keys j that query i sees, w_i = softmax of `score`.

    Shapes: q [B, Lq, Hq, D], the queries of the Lq tokens that were appended last; returns o
    [B, Lq, Hq, Dv] in the dtype of q and, with `return_lse`, the natural log of the softmax denominator
    [B, Lq, Hq] in float32 (float64 for float64).  Query head h reads key head h // (Hq / Hkv).
    Options: score, a sum of `Softmax`, `KeyBias` and `Alibi`, or `LocalLinear` or `Parallax`; pattern
    `Causal()` (query i sees the stored tokens up to its own), `Dense()` (all of them) or
    `Sliding(left, 0, sink_tokens)` in positions of the sequence; implementation names one of "triton",
    "lean" (its shares in the order of LeanAttention), "cpu", "reference", which then runs or raises
    RefusedError; None lets the plan choose.
    Cost: one pass over the stored bytes; 2 (D + Dv) FLOPs per stored key, query and query head.
    Limits: a query that sees no key gives o = 0, lse = -inf; NaN or inf in one sequence reaches no other.
    Rows for `LocalLinear` and `Parallax` are copied beside each other first, sequences of one length at a
    time, and computed by the implementations of `attend`; keys with weights of their own or on the host are
    refused.
    No gradient flows into the cache; one flows into q in "cpu" and "reference".
    Transforms: one operator per part of the cache under torch.compile and torch.export; the graph reads
    what the cache holds when it runs.  Autocast stops here.
    Equals: `attend(q, k, v, Causal())` on the stored keys; any cut of them in parts, merged by lse.
    Paper: FlashDecoding, LeanAttention (2405.10480), FlashInfer (2501.01005).
    """
    parts = asked(q, cache)
    problem = describe_decode(q, cache.shape, parts)
    if not isinstance(score, Score):
        raise ScoreError("score", type(score), "a score such as fv.Softmax() is needed")
    if not isinstance(pattern, Pattern):
        raise PatternError("pattern", type(pattern), "a pattern such as fv.Causal() is needed")
    if fits_lines(score):
        lines = decode_lines(q, cache, score, pattern, problem, implementation)
        return lines if return_lse else lines[0]
    terms = describe_terms(problem, score, pattern, parts)
    if any(part.shared for part in parts) and terms.left is not None and terms.sink_tokens:
        raise PatternError("pattern", pattern, "no sink tokens are needed behind a shared part")
    run: Run
    if as_one(q):
        run = partial(_as_operator, problem, implementation)
    else:
        run = choose_decode(problem, terms, implementation).module.decode
    stored, shift = cache.project(q)
    whole = len(parts) == 1 and stored is q
    inner = terms if whole else dataclasses.replace(terms, sink=None)
    found = [_part(run, part, inner, stored) for part in parts]
    o, lse = found[0] if len(found) == 1 else merge(*zip(*found, strict=True))
    if shift is not None and (terms.soft_cap is not None or terms.slopes is not None):
        raise ScoreError("score", score.key, "without soft cap and slopes, keys without a mean")
    if not whole:
        o = cache.restore(o, lse)
        lse = lse if shift is None else lse + terms.scale * shift.to(lse.dtype)
        if terms.sink is not None:
            o, lse = _with_sink(o, lse, terms.sink)
    return (o, lse) if return_lse else o


def asked(q: Tensor, cache: Cache) -> tuple[Part, ...]:
    """The parts of a cache that a query asks; raises where one of the two is something else."""
    need_tensors(q=q)
    if not isinstance(cache, Cache):
        raise CacheError("cache", type(cache), "a cache such as foveal.caches.Paged is needed")
    return cache.parts()


def _decode(
    problem: DecodeProblem, implementation: str | None, view: View, terms: Terms, q: Tensor
) -> tuple[Tensor, Tensor]:
    plan = choose_decode(problem, terms, implementation)
    if plan.module in (cpu, reference):
        view = dataclasses.replace(view, host_lengths=view.lengths.tolist())
        check_key_bias(terms.key_bias, view)
    found: tuple[Tensor, Tensor] = plan.module.decode(view, terms, q)
    return found


def _outline(
    problem: DecodeProblem, implementation: str | None, view: View, terms: Terms, q: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], view.value_dim)), q.new_empty(q.shape[:3], dtype=dtype)


OPERATOR = Body(_decode, _outline)


def _as_operator(
    problem: DecodeProblem, implementation: str | None, view: View, terms: Terms, q: Tensor
) -> Sequence[Tensor]:
    """The lengths of the host stay behind: a graph would be made for each of them."""
    view = dataclasses.replace(view, host_lengths=[])
    return as_operator("decode", problem, implementation, view, terms, q)


def _part(run: Run, part: Part, terms: Terms, q: Tensor) -> Sequence[Tensor]:
    """o and lse of one part."""
    if not part.shared:
        return run(part.view, terms, q)
    early = terms.causal and q.shape[1] - 1 > part.behind
    if early or terms.left is not None or terms.slopes is not None:
        if part.apart is None:
            raise ShapeError("cache", "lengths per head", "one length per sequence is needed")
        return run(part.apart(), terms, q)
    terms = dataclasses.replace(terms, causal=False)
    o, lse = run(part.view, terms, q.reshape(1, -1, *q.shape[2:]))
    return o.view(*q.shape[:3], -1), lse.view(q.shape[:3])


def _with_sink(o: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """The same softmax with one more term in its denominator."""
    total = torch.logaddexp(lse, sink.to(lse.dtype).expand_as(lse))
    return o * torch.exp(lse - total)[..., None].to(o.dtype), total
