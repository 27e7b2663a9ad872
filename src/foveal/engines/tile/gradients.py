"""The backward of the portable GPU edition: launches, and gradients of what the score holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.engines.tile.backward import (
    tile_attend_backward_kv,
    tile_attend_backward_q,
    tile_attend_backward_shift,
)
from foveal.engines.tile.launch import LOG2E, Sizes, Stage, options, scoring, stage
from foveal.engines.tile.launches import Launch, compile_together
from foveal.engines.tile.parts import Task
from foveal.engines.tile.repair_backward import tile_attend_repair_kv, tile_attend_repair_q
from foveal.engines.tile.terms import BY_DISTANCE, FROM_TABLE, PER_KEY, PER_PAIR, LocalTerm
from foveal.patterns.dense import Dense
from foveal.tuning.tile import BACKWARD_KV, BACKWARD_Q

_RECORD_BYTES = 256 << 20
"""Memory for dS of the pairs that biases and tables are summed from, if one head fits in it."""


@dataclass(frozen=True)
class Saved:
    """What the backward reads: the forward's tensors [N, L, H, .], levels float32 [2, N, Hq, Lq].

    levels are lse and shift of every query, as `tile_attend_backward_shift` says.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    levels: Tensor

    @property
    def plane(self) -> int:
        return self.levels.stride(0)

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def groups(self) -> int:
        return self.q.shape[2] // self.k.shape[2]


def gradients(
    task: Task,
    terms: tuple[LocalTerm, ...],
    sizes: Sizes,
    tensors: tuple[Tensor, ...],
    sink: Tensor | None,
    do: Tensor,
    dlse: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, the sink and the values of each term; None where not `needed`.

    tensors: q, k, v, o [N, L, H, .] and base-2 lse [N, Hq, Lq].  Bitwise repeatable.
    """
    q, k, v, o, lse = tensors
    do = do if do.stride(-1) == 1 else do.contiguous()
    saved = Saved(q, k, v, do, lse.new_empty(2, *lse.shape))
    heads = q.shape[2]
    score = scoring(task, terms, heads)
    parts: list[_QueryPart | _KeyPart] = []
    if needed[0] or any(n and t.kind != PER_KEY for n, t in zip(needed[4:], terms, strict=True)):
        first = stage(BACKWARD_Q, task, terms, sizes, heads)
        parts.append(_QueryPart(first, task, saved, terms, score, needed[4:]))
    if any(needed[1:3]) or any(
        n and t.kind == PER_KEY for n, t in zip(needed[4:], terms, strict=True)
    ):
        second = stage(BACKWARD_KV, task, terms, sizes, heads)
        parts.append(_KeyPart(second, task, saved, terms, score, needed[4:]))
    shift = _shift(saved, o, lse, dlse)
    launches = [shift, *(launch for part in parts for launch in part.launches())]
    chosen = tuple((part.chosen.spec, part.chosen.config) for part in parts)
    compile_together(launches, chosen, q)
    shift()
    dq = dk = dv = d_sink = None
    d_terms: list[Tensor | None] = [None] * len(terms)
    for part in parts:
        part.run(d_terms)
        if isinstance(part, _QueryPart):
            dq = part.dq
        else:
            dk, dv = part.dk, part.dv
    if sink is not None and needed[3]:
        share = torch.exp2(sink.float()[:, None] * LOG2E - lse) * saved.levels[1]
        share = share.masked_fill(lse == -torch.inf, 0.0)
        d_sink = -share.sum((0, 2)).to(sink.dtype)
    return dq, dk, dv, d_sink, *d_terms


def _shift(saved: Saved, o: Tensor, lse: Tensor, dlse: Tensor) -> Launch:
    N, Lq, heads, value_dim = o.shape
    rows = 32
    arguments = (
        o, saved.do, lse, dlse, saved.levels, lse.numel(),
        o.stride()[:3], saved.do.stride()[:3], dlse.stride(), heads, Lq,
    )  # fmt: skip
    pad = max(16, 1 << max(value_dim - 1, 0).bit_length())
    options = {"DV": value_dim, "DV_PAD": pad, "ROWS": rows}
    return Launch(tile_attend_backward_shift, N * heads * -(-Lq // rows), arguments, options)


class _QueryPart:
    """dq, and the gradients of slopes, biases per pair and tables."""

    def __init__(
        self,
        chosen: Stage,
        task: Task,
        saved: Saved,
        terms: tuple[LocalTerm, ...],
        score: tuple[Any, ...],
        needed: tuple[bool, ...],
    ) -> None:
        self.chosen, self.saved, self.terms = chosen, saved, terms
        N, self.Lq, self.heads, _ = saved.q.shape
        self.matrices = N * self.heads if chosen.layout.q_tiles else 0
        wanted = {t.kind: i for i, t in enumerate(terms) if needed[i]}
        self.slopes = wanted.get(BY_DISTANCE)
        self.recorded = [i for kind, i in wanted.items() if kind in (PER_PAIR, FROM_TABLE)]
        self.dq = torch.empty_like(saved.q)
        self.share = None if self.slopes is None else saved.levels.new_empty(saved.levels.shape[1:])
        layout, k, v = chosen.layout, saved.k, saved.v
        programs = self.matrices * layout.q_tiles
        self.suspect = self.dq.new_empty(programs, dtype=torch.int32)
        self.strides = (
            layout.q_strides(saved.q), layout.q_strides(saved.do), layout.q_strides(self.dq),
            layout.q_grid,
        )  # fmt: skip
        keys = (k, layout.k_strides(k), v, layout.k_strides(v), layout.k_grid)
        self.rest = (keys, saved.heads, saved.groups, float(task.score.scale), score)
        self.repair = None if isinstance(task.pattern, Dense) else self._repair(programs)

    def launches(self) -> list[Launch]:
        """One of each kernel."""
        records: list[Any] = [None, 1, None, 1]
        for i in self.recorded:
            records[2 * i] = self.saved.levels
            records[2 * i + 1] = _entries(self.terms[i], self.saved)
        first = self._launch(tuple(records), 0, min(1, self.matrices))
        return [first] if self.repair is None else [first, self.repair]

    def run(self, d_terms: list[Tensor | None]) -> None:
        """Fills dq, and the gradients of the terms."""
        totals = {i: _Total(self.terms[i], self.saved) for i in self.recorded}
        bytes_each = 4 * self.Lq * sum(total.entries for total in totals.values())
        step = max(1, _RECORD_BYTES // max(bytes_each, 1)) if totals else max(self.matrices, 1)
        for matrix in range(0, self.matrices, step):
            matrices = min(step, self.matrices - matrix)
            records: list[Any] = [None, 1, None, 1]
            for i, total in totals.items():
                records[2 * i] = self.saved.levels.new_zeros(matrices, self.Lq, total.entries)
                records[2 * i + 1] = total.entries
            self._launch(tuple(records), matrix, matrices)()
            for i, total in totals.items():
                total.add(records[2 * i], matrix)
        if self.repair is not None:
            self.repair()
        for i, total in totals.items():
            d_terms[i] = total.gradient()
        if self.share is not None and self.slopes is not None:
            values = self.terms[self.slopes].values
            d_terms[self.slopes] = self.share.sum((0, 2)).to(values.dtype)

    def _launch(self, records: tuple[Any, ...], matrix: int, matrices: int) -> Launch:
        saved, chosen = self.saved, self.chosen
        tiles = chosen.layout.q_tiles
        arguments = (
            saved.q, saved.do, self.dq, saved.levels, saved.plane, self.share, self.suspect,
            *self.strides, *self.rest, records, matrix * tiles, chosen.layout.arguments,
        )  # fmt: skip
        settings = {"SPEC": chosen.spec, **chosen.options}
        return Launch(tile_attend_backward_q, matrices * tiles, arguments, settings)

    def _repair(self, programs: int) -> Launch:
        saved, chosen = self.saved, self.chosen
        arguments = (
            saved.q, saved.do, self.dq, saved.levels, saved.plane, self.suspect,
            *self.strides, *self.rest, chosen.layout.arguments,
        )  # fmt: skip
        settings = {"SPEC": chosen.spec, **options(4, 1)}
        return Launch(tile_attend_repair_q, programs, arguments, settings)


class _KeyPart:
    """dk and dv, and the gradient of values per key."""

    def __init__(
        self,
        chosen: Stage,
        task: Task,
        saved: Saved,
        terms: tuple[LocalTerm, ...],
        score: tuple[Any, ...],
        needed: tuple[bool, ...],
    ) -> None:
        self.chosen, self.terms = chosen, terms
        k, v, layout = saved.k, saved.v, chosen.layout
        self.dk, self.dv = torch.empty_like(k), torch.empty_like(v)
        N, Lk, kv_heads, _ = k.shape
        kinds = [i for i, t in enumerate(terms) if needed[i] and t.kind == PER_KEY]
        self.per_key = kinds[0] if kinds else None
        self.share = saved.levels.new_empty(N, saved.heads, Lk) if kinds else None
        programs = N * kv_heads * layout.k_tiles
        suspect = self.dk.new_empty(programs, dtype=torch.int32)
        keys = (k, layout.k_strides(k), v, layout.k_strides(v), layout.k_grid)
        inputs = (saved.q, saved.do, saved.levels, saved.plane)
        rest = (
            layout.q_strides(saved.q), layout.q_strides(saved.do),
            layout.k_strides(self.dk), layout.k_strides(self.dv), layout.q_grid,
            keys, saved.heads, saved.groups, float(task.score.scale), score, layout.arguments,
        )  # fmt: skip
        main = (*inputs, self.dk, self.dv, self.share, suspect, *rest)
        settings = {"SPEC": chosen.spec, **chosen.options}
        self._launches = [Launch(tile_attend_backward_kv, programs, main, settings)]
        if not isinstance(task.pattern, Dense):
            again = (*inputs, self.dk, self.dv, suspect, *rest)
            settings = {"SPEC": chosen.spec, **options(4, 1)}
            self._launches.append(Launch(tile_attend_repair_kv, programs, again, settings))

    def launches(self) -> list[Launch]:
        """One of each kernel."""
        return self._launches

    def run(self, d_terms: list[Tensor | None]) -> None:
        """Fills dk and dv, and the gradient of the term."""
        for each in self._launches:
            each()
        if self.per_key is not None and self.share is not None:
            values = self.terms[self.per_key].values
            grouped = self.share.unflatten(1, (values.shape[1], -1)).sum(2)
            d_terms[self.per_key] = grouped.sum_to_size(values.shape).to(values.dtype)


def _entries(term: LocalTerm, saved: Saved) -> int:
    """How many entries a query may meet: keys, or those of a table."""
    return saved.k.shape[1] if term.kind == PER_PAIR else int(term.values.shape[-1])


class _Total:
    """The gradient of a bias per pair or of a table, summed over slices of the batch x heads matrices."""

    def __init__(self, term: LocalTerm, saved: Saved) -> None:
        self.values = term.values
        self.pairs = term.kind == PER_PAIR
        self.entries = _entries(term, saved)
        self.heads = saved.heads
        self.sum = torch.zeros(self.values.shape, device=saved.q.device, dtype=torch.float32)

    def add(self, record: Tensor, matrix: int) -> None:
        """record [matrices, Lq, entries] of the matrices from `matrix` on."""
        parts = record if self.pairs else record.sum(1)
        for number, part in enumerate(parts, start=matrix):
            n, h = divmod(number, self.heads)
            if self.pairs:
                target = self.sum[n if len(self.sum) > 1 else 0]
                target = target[h if len(target) > 1 else 0]
            else:
                target = self.sum[h if len(self.sum) > 1 else 0]
            target += part.sum_to_size(target.shape)

    def gradient(self) -> Tensor:
        return self.sum.to(self.values.dtype)
