"""Keys that lie in several caches: in segments, or behind a prefix that many sequences share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from foveal._errors import CacheError, ShapeError
from foveal.caches.base import Cache, Part
from foveal.caches.view import View


class Joined(Cache):
    """Several caches of the same sequences, oldest tokens first; what is appended goes to the last.

    `decode` reads each and merges the results by their lse, exactly.  The parts may differ in everything
    but batch, heads and dimensions: dense and quantised pages, or segments held elsewhere.
    Limits: `keep` is refused: evict in the parts.
    Equals: one cache that holds all tokens in that order.
    Paper: DistAttention (2401.02669); ARKV, for its mixture of precisions.
    """

    def __init__(self, members: Sequence[Cache]) -> None:
        if not isinstance(members, Sequence) or not members:
            raise CacheError("members", members or "none", "a list of at least one cache is needed")
        for member in members:
            _check_cache("members", member)
        self.members = tuple(members)
        self.shape = members[-1].shape
        for member in members:
            if member.shape != self.shape:
                raise ShapeError("members", member.shape, f"caches of {self.shape} are needed")
            _check_plain("members", member)

    @property
    def lengths(self) -> Tensor:
        first, *others = (member.lengths for member in self.members)
        return sum(others, first)

    @property
    def seen(self) -> Tensor:
        first, *others = (member.seen for member in self.members)
        return sum(others, first)

    @property
    def host_lengths(self) -> list[list[int]]:
        return _sums([member.host_lengths for member in self.members])

    @property
    def host_seen(self) -> list[int]:
        return [sum(n) for n in zip(*(member.host_seen for member in self.members), strict=True)]

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        counts: Sequence[int] | None = None,
        last: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        self.members[-1].append(k, v, counts=counts, last=last, bias=bias)

    def prepare(self, tokens: int = 1) -> None:
        self.members[-1].prepare(tokens)

    def free(self, sequences: Sequence[int] | None = None) -> None:
        for member in self.members:
            member.free(sequences)

    def keep(self, indices: Tensor) -> None:
        raise CacheError("indices", "an eviction", "an eviction in the members is needed")

    def dense(self) -> tuple[Tensor, Tensor]:
        parts = [member.dense() for member in self.members]
        lengths = [_shortest(member) for member in self.members]
        return _stacked([k for k, _ in parts], lengths), _stacked([v for _, v in parts], lengths)

    def bytes(self) -> int:
        return sum(member.bytes() for member in self.members)

    def capacity_bytes(self) -> int:
        return sum(member.capacity_bytes() for member in self.members)

    def parts(self) -> tuple[Part, ...]:
        found: list[Part] = []
        after = torch.zeros_like(self.members[-1].seen)
        seen = self.seen
        for member in reversed(self.members):
            for part in reversed(member.parts()):
                view = part.view
                behind = after if view.after is None else after + view.after
                replaced = dataclasses.replace(view, seen=seen, after=behind)
                found.append(dataclasses.replace(part, view=replaced))
            if member.lengths.shape[1] > 1 and member is not self.members[0]:
                raise CacheError("members", "lengths per head", "they are needed in the first only")
            after = after + member.lengths[:, 0]
        return tuple(reversed(found))


class Shared(Cache):
    """A prefix that all sequences share, read once for all their queries, and what each has of its own.

    The prefix is a cache of one sequence.  Where it is long, a decode costs as if it were read once, not
    once per sequence.
    Limits: with a sliding window, slopes, or queries that stand in the prefix, every sequence reads the
    prefix for itself; `decode` refuses a window with sink tokens; `keep` and `free` act on the suffix.
    Equals: a cache in which every sequence holds the prefix itself.
    Paper: cascade inference in FlashInfer (2501.01005).
    """

    def __init__(self, prefix: Cache, suffix: Cache) -> None:
        _check_cache("prefix", prefix)
        _check_cache("suffix", suffix)
        alone = dataclasses.replace(suffix.shape, batch=1)
        if prefix.shape != alone:
            raise ShapeError("prefix", prefix.shape, f"a cache of {alone} is needed")
        for member in (prefix, suffix):
            _check_plain("members", member)
        self.prefix, self.suffix, self.shape = prefix, suffix, suffix.shape

    @property
    def lengths(self) -> Tensor:
        return self.prefix.lengths + self.suffix.lengths

    @property
    def seen(self) -> Tensor:
        return self.prefix.seen + self.suffix.seen

    @property
    def host_lengths(self) -> list[list[int]]:
        prefix = self.prefix.host_lengths * self.shape.batch
        return _sums([prefix, self.suffix.host_lengths])

    @property
    def host_seen(self) -> list[int]:
        return [n + self.prefix.host_seen[0] for n in self.suffix.host_seen]

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        counts: Sequence[int] | None = None,
        last: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        self.suffix.append(k, v, counts=counts, last=last, bias=bias)

    def prepare(self, tokens: int = 1) -> None:
        self.suffix.prepare(tokens)

    def free(self, sequences: Sequence[int] | None = None) -> None:
        self.suffix.free(sequences)

    def keep(self, indices: Tensor) -> None:
        self.suffix.keep(indices)

    def dense(self) -> tuple[Tensor, Tensor]:
        batch = self.shape.batch
        prefix = [x.expand(batch, *x.shape[1:]) for x in self.prefix.dense()]
        lengths = [_shortest(self.prefix) * batch, _shortest(self.suffix)]
        k, v = zip(prefix, self.suffix.dense(), strict=True)
        return _stacked(list(k), lengths), _stacked(list(v), lengths)

    def bytes(self) -> int:
        return self.prefix.bytes() + self.suffix.bytes()

    def capacity_bytes(self) -> int:
        return self.prefix.capacity_bytes() + self.suffix.capacity_bytes()

    def parts(self) -> tuple[Part, ...]:
        behind = min(n for row in self.suffix.host_lengths for n in row)
        prefix = (self._shared(part, behind) for part in self.prefix.parts())
        return (*prefix, *self.suffix.parts())

    def _shared(self, part: Part, behind: int) -> Part:
        """A part of the prefix with `behind` or more tokens behind it."""
        if self.suffix.lengths.shape[1] > 1:
            return Part(part.view, shared=True, behind=behind)
        return Part(part.view, True, lambda: self._apart(part.view), behind)

    def _apart(self, view: View) -> View:
        """The tokens of a part of the prefix as those of every sequence."""
        batch, after = self.shape.batch, self.suffix.lengths[:, 0].contiguous()
        return dataclasses.replace(
            view,
            lengths=view.lengths.repeat(batch, 1),
            host_lengths=view.host_lengths * batch,
            seen=self.seen,
            page_table=view.page_table.expand(batch, -1, -1),
            after=after if view.after is None else after + view.after,
        )


def _check_cache(argument: str, cache: object) -> None:
    if not isinstance(cache, Cache):
        raise CacheError(argument, cache, "a cache such as foveal.caches.Paged is needed")


def _check_plain(argument: str, cache: Cache) -> None:
    if type(cache).project is not Cache.project:
        raise CacheError(argument, type(cache).__name__, "caches that take queries as they are")


def _sums(lengths: Sequence[list[list[int]]]) -> list[list[int]]:
    """Sums of lengths [batch][1 or heads]."""
    found = []
    for rows in zip(*lengths, strict=True):
        heads = max(len(row) for row in rows)
        found.append([sum(row[h % len(row)] for row in rows) for h in range(heads)])
    return found


def _shortest(cache: Cache) -> list[int]:
    """The length of every sequence; raises where its heads hold different ones."""
    for row in cache.host_lengths:
        if len(set(row)) > 1:
            raise CacheError(
                "dense", "heads of different lengths", "dense() of the parts is needed"
            )
    return [row[0] for row in cache.host_lengths]


def _stacked(tensors: Sequence[Tensor], lengths: Sequence[list[int]]) -> Tensor:
    """Sequences one behind the other, [batch, longest, H, D], 0 behind the last."""
    rows = [
        torch.cat([x[b, : n[b]] for x, n in zip(tensors, lengths, strict=True)])
        for b in range(tensors[0].shape[0])
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
