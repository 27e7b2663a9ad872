"""explain_decode(): the plan of a decode, in numbers and sentences, without running it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from foveal._decode import asked
from foveal._decode_plan import choose_decode
from foveal._host import on_host
from foveal.caches.base import Cache, Part
from foveal.compose.decode_lines import explain_lines, fits_lines
from foveal.engines.decode.problem import (
    DecodeProblem,
    Terms,
    describe_decode,
    describe_terms,
)
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Causal
from foveal.probe.ceilings import Ceilings
from foveal.scores.base import Score
from foveal.scores.local_linear import collect_local
from foveal.scores.softmax import Softmax


@dataclass(frozen=True)
class DecodeExplanation:
    """What a call of `decode` will do.

    keys counts the stored tokens that are read, over sequences and key heads; bytes is their rows, each
    once; flops counts all queries against them; storage_bytes is what the cache occupies; bound_seconds the
    larger of bytes and flops over the measured ceilings of this device, or None.
    """

    implementation: str
    score: str
    refusals: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]
    sequences: int
    keys: int
    bytes: int
    flops: int
    storage_bytes: int
    bound_seconds: float | None

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"runs       {self.implementation}",
            f"score      {self.score}",
            f"rows       {' + '.join(self.kinds)}, {self.storage_bytes / 1e6:,.3f} MB of storage",
            f"reads      {self.keys:,} keys of {self.sequences:,} sequences, {self.bytes / 1e6:,.3f} MB",
            f"work       {self.flops / 1e9:,.3f} GFLOP",
        ]
        if self.bound_seconds is not None:
            lines.append(f"bound      {self.bound_seconds * 1e3:,.3f} ms on this device")
        lines.extend(f"refused    {name}: {reason}" for name, reason in self.refusals)
        return "\n".join(lines)


@on_host
def explain_decode(
    q: Tensor,
    cache: Cache,
    score: Score = Softmax(),
    *,
    pattern: Pattern = Causal(),
    implementation: str | None = None,
    ceilings: Ceilings | None = None,
) -> DecodeExplanation:
    """What `decode` with the same arguments will run, read and cost; nothing is computed.

    Options: ceilings, from foveal.probe.ceilings, adds the time bound of this device.
    """
    parts = asked(q, cache)
    problem = describe_decode(q, cache.shape, parts)
    if fits_lines(score):
        return _of_lines(q, cache, score, pattern, problem, implementation, ceilings)
    terms = describe_terms(problem, score, pattern, parts)
    plan = choose_decode(problem, terms, implementation)
    read = [_keys(part, terms, problem.Lq) for part in parts]
    moved = sum(n * part.view.row_bytes() for n, part in zip(read, parts, strict=True))
    rows = problem.Lq * problem.groups
    per_key = [2 * (part.view.head_dim + part.view.value_dim) * rows for part in parts]
    served = [problem.batch if part.shared else 1 for part in parts]
    flops = sum(n * cost * s for n, cost, s in zip(read, per_key, served, strict=True))
    return DecodeExplanation(
        plan.implementation,
        score.key,
        plan.refusals,
        problem.kinds,
        problem.batch,
        sum(read),
        moved,
        flops,
        cache.bytes(),
        _bound(flops, moved, ceilings),
    )


def _of_lines(
    q: Tensor,
    cache: Cache,
    score: Score,
    pattern: Pattern,
    problem: DecodeProblem,
    implementation: str | None,
    ceilings: Ceilings | None,
) -> DecodeExplanation:
    """All stored rows are read, written beside each other and read again; iterations do not count."""
    found = explain_lines(q, cache, score, pattern, problem, implementation)
    views = [part.view for part in cache.parts()]
    served = [problem.batch // view.batch for view in views]
    keys = [sum(map(sum, v.host_lengths)) * v.kv_heads // len(v.host_lengths[0]) for v in views]
    copied = sum(n * s for n, s in zip(keys, served, strict=True))
    rows = copied * (problem.head_dim + problem.value_dim) * q.element_size()
    moved = sum(n * view.row_bytes() for n, view in zip(keys, views, strict=True)) + 2 * rows
    pair = collect_local(score, problem.head_dim).pair_flops(problem.head_dim, problem.value_dim)
    flops = copied * problem.Lq * problem.groups * pair
    return DecodeExplanation(
        found.implementation,
        score.key,
        found.refusals,
        problem.kinds,
        problem.batch,
        sum(keys),
        moved,
        flops,
        cache.bytes(),
        _bound(flops, moved, ceilings),
    )


def _bound(flops: int, moved: int, ceilings: Ceilings | None) -> float | None:
    if ceilings is None:
        return None
    return max(flops / ceilings.flops_per_second, moved / ceilings.bytes_per_second)


def _keys(part: Part, terms: Terms, Lq: int) -> int:
    """Stored tokens of all sequences and key heads that some query may see."""
    view = part.view
    most = None if terms.left is None else terms.left + Lq + terms.sink_tokens
    lengths = [n if most is None else min(n, most) for row in view.host_lengths for n in row]
    return sum(lengths) * view.kv_heads // len(view.host_lengths[0])
