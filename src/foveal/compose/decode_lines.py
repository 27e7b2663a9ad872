"""A decode with a score that fits lines: the stored rows beside each other, then `attend`."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import CacheError, DeviceError, PatternError
from foveal._explain import Explanation, explain
from foveal.caches.base import Cache, Part
from foveal.caches.offloaded import Offloaded
from foveal.engines.decode.problem import DecodeProblem, reach
from foveal.patterns.base import Extent, Pattern
from foveal.scores.base import Geometry, Score
from foveal.scores.local_linear import LocalLinear, Parallax, local_form


def fits_lines(score: Score) -> bool:
    """Whether sums over parts of the keys do not merge by their lse alone."""
    return isinstance(score, LocalLinear | Parallax)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Query heads of sequences that see the same number of stored keys."""

    length: int
    sequences: tuple[int, ...]
    heads: slice
    key_heads: slice


def decode_lines(
    q: Tensor,
    cache: Cache,
    score: Score,
    pattern: Pattern,
    problem: DecodeProblem,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and natural lse [B, Lq, Hq] of a `LocalLinear` or `Parallax`."""
    check_lines(cache, score, pattern, problem)
    k, v = cache.dense()
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    for rows in groups(cache, problem.q_heads):
        at = torch.tensor(rows.sequences, device=q.device)
        own = q[at, :, rows.heads]
        keys, values = (x[at, : rows.length, rows.key_heads] for x in (k, v))
        part = _of_rows(score, at, rows.heads)
        found = attend(
            own, keys, values, pattern, part, return_lse=True, implementation=implementation
        )
        if rows.heads == slice(0, problem.q_heads) and len(at) == len(q):
            return found
        o[at, :, rows.heads], lse[at, :, rows.heads] = found
    return o, lse


def explain_lines(
    q: Tensor,
    cache: Cache,
    score: Score,
    pattern: Pattern,
    problem: DecodeProblem,
    implementation: str | None,
) -> Explanation:
    """What `attend` will run for the longest rows."""
    check_lines(cache, score, pattern, problem)
    longest = max(groups(cache, problem.q_heads), key=lambda rows: rows.length)
    own = q[:1, :, longest.heads]
    heads = longest.key_heads.stop - longest.key_heads.start
    k, v = (
        q.new_empty(1).expand(1, longest.length, heads, dim)
        for dim in (problem.head_dim, problem.value_dim)
    )
    at = torch.tensor(longest.sequences[:1], device=q.device)
    part = _of_rows(score, at, longest.heads)
    return explain(own, k, v, pattern, part, implementation=implementation)


def check_lines(cache: Cache, score: Score, pattern: Pattern, problem: DecodeProblem) -> None:
    """Raises where the score does not fit the queries, or the cache does not hold plain keys."""
    _, left, sink_tokens = reach(pattern)
    grid, longest = (problem.Lq,), (max(1, *(n for row in cache.host_lengths for n in row)),)
    sizes = problem.batch, problem.q_heads, problem.kv_heads
    form = local_form(score, problem.head_dim, Geometry(pattern, Extent(grid, longest), *sizes))
    for x in form.parameters:
        if x.device.type != problem.device:
            raise DeviceError(form.names[0], x.device, "the device of q is needed")
    parts: tuple[Part, ...] = cache.parts()
    if isinstance(cache, Offloaded) or any(part.view.bias is not None for part in parts):
        needed = "a cache of keys on one device, without weights of their own, is needed"
        raise CacheError("cache", type(cache).__name__, f"{needed} for {score.key}")
    evicted = any(
        n != seen
        for row, seen in zip(cache.host_lengths, cache.host_seen, strict=True)
        for n in row
    )
    if left is not None and evicted and (problem.gaps or sink_tokens):
        raise PatternError(
            "pattern", pattern, f"Causal() or Dense() is needed behind an eviction for {score.key}"
        )


def groups(cache: Cache, q_heads: int) -> Iterator[Rows]:
    """All sequences and heads, those of one length together."""
    lengths = cache.host_lengths
    lists = max(len(row) for row in lengths)
    per_list, keys = q_heads // lists, cache.shape.kv_heads // lists
    for h in range(lists):
        found: dict[int, list[int]] = defaultdict(list)
        for b, row in enumerate(lengths):
            found[row[h % len(row)]].append(b)
        heads = slice(h * per_list, (h + 1) * per_list)
        for length, sequences in found.items():
            yield Rows(length, tuple(sequences), heads, slice(h * keys, (h + 1) * keys))


def _of_rows(score: Score, at: Tensor, heads: slice) -> Score:
    """The score of some sequences and heads."""
    if isinstance(score, Parallax):
        return dataclasses.replace(score, r=score.r[at, :, heads])
    assert isinstance(score, LocalLinear)
    if isinstance(score.ridge, Tensor):
        return dataclasses.replace(score, ridge=score.ridge[heads])
    return score
