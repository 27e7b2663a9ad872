"""Decodes and their truth: `attend` on the stored keys of one sequence after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

import foveal as fv
from foveal.caches import Cache
from foveal.scores.base import Composed, Score
from foveal.testing.bounds import Verdict, check_near, error, neighbour

T = TypeVar("T")


def truth(
    q: Tensor, cache: Cache, score: Score, pattern: fv.Pattern, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """o and lse of the reference of the tile engine in `dtype`."""
    k, v = (x.to(dtype) for x in cache.dense())
    q, score = q.to(dtype), _cast(score, dtype)
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_zeros(q.shape[:3])
    for b, row in enumerate(cache.host_lengths):
        heads = q.shape[2] // len(row)
        per_head = k.shape[2] // len(row)
        for h, n in enumerate(row):
            own = slice(h * heads, (h + 1) * heads)
            keys = slice(h * per_head, (h + 1) * per_head)
            one = (q[b : b + 1, :, own], k[b : b + 1, :n, keys], v[b : b + 1, :n, keys])
            own_score = _of_heads(_of_sequence(score, b, n), own)
            found = fv.attend(*one, pattern, own_score, return_lse=True, implementation="reference")
            o[b, :, own], lse[b, :, own] = found[0][0], found[1][0]
    return o, lse


def verdicts(
    q: Tensor,
    cache: Cache,
    score: Score = fv.Softmax(),
    pattern: fv.Pattern = fv.Causal(),
    implementation: str | None = None,
) -> list[Verdict]:
    """o and lse against float64, by the bound of a plain computation in the dtype of q."""
    exact = truth(q, cache, score, pattern, torch.float64)
    found = fv.decode(
        q, cache, score, pattern=pattern, return_lse=True, implementation=implementation
    )
    source = torch.Generator().manual_seed(0)

    def errors_at(number: int) -> dict[str, float]:
        near = neighbour(q, source) if number else q
        wide = truth(near, cache, score, pattern, torch.float64) if number else exact
        return named(map(error, truth(near, cache, score, pattern, q.dtype), wide))

    return check_near(named(found), named(exact), errors_at)


def named(results: Iterable[T]) -> dict[str, T]:
    return dict(zip(("o", "lse"), results, strict=True))


def assert_agrees(
    q: Tensor,
    cache: Cache,
    score: Score = fv.Softmax(),
    pattern: fv.Pattern = fv.Causal(),
    implementation: str | None = None,
) -> None:
    checked = verdicts(q, cache, score, pattern, implementation)
    assert all(verdict.ok for verdict in checked), ", ".join(str(x) for x in checked)


def _of_heads(score: Score, own: slice) -> Score:
    """The score with the sinks and slopes of some query heads."""
    if isinstance(score, Composed):
        return Composed(tuple(_of_heads(member, own) for member in score.members))
    if isinstance(score, fv.Softmax) and score.sink is not None:
        return dataclasses.replace(score, sink=score.sink[own])
    return fv.Alibi(score.slopes[own]) if isinstance(score, fv.Alibi) else score


def _of_sequence(score: Score, b: int, n: int) -> Score:
    """The score with the key biases of the n keys of sequence b."""
    if isinstance(score, Composed):
        return Composed(tuple(_of_sequence(member, b, n) for member in score.members))
    if isinstance(score, fv.KeyBias):
        rows = score.tensor[b : b + 1] if score.tensor.shape[0] > 1 else score.tensor
        return fv.KeyBias(rows[..., :n])
    return score


def _cast(score: Score, dtype: torch.dtype) -> Score:
    if isinstance(score, Composed):
        return Composed(tuple(_cast(member, dtype) for member in score.members))
    changed = {
        field.name: x.to(dtype)
        for field in dataclasses.fields(score)  # type: ignore[arg-type]
        if isinstance(x := getattr(score, field.name), Tensor)
    }
    return dataclasses.replace(score, **changed)  # type: ignore[type-var]
