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
from foveal.engines.tile.launch import LOG2E, Sizes, Stage, scoring, stage
from foveal.engines.tile.parts import Task
from foveal.engines.tile.terms import BY_DISTANCE, FROM_TABLE, PER_KEY, PER_PAIR, LocalTerm
from foveal.tuning.tile import BACKWARD_KV, BACKWARD_Q

_RECORD_BYTES = 256 << 20
"""Memory for dS of the pairs that biases and tables are summed from, if one head fits in it."""


@dataclass(frozen=True)
class Saved:
    """What the backward reads: the forward's tensors [N, L, H, .], base-2 lse and shift float32
    [N, Hq, Lq]."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    lse: Tensor
    shift: Tensor

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
    saved = Saved(q, k, v, do, lse, _shift(o, do, lse, dlse))
    heads = q.shape[2]
    score = scoring(task, terms, heads)
    dq = dk = dv = d_sink = None
    d_terms: list[Tensor | None] = [None] * len(terms)
    if needed[0] or any(n and t.kind != PER_KEY for n, t in zip(needed[4:], terms, strict=True)):
        first = stage(BACKWARD_Q, task, terms, sizes, heads)
        dq = _query_gradients(first, task, saved, terms, score, needed[4:], d_terms)
    if any(needed[1:3]) or any(
        n and t.kind == PER_KEY for n, t in zip(needed[4:], terms, strict=True)
    ):
        second = stage(BACKWARD_KV, task, terms, sizes, heads)
        dk, dv = _key_gradients(second, task, saved, terms, score, needed[4:], d_terms)
    if sink is not None and needed[3]:
        share = torch.exp2(sink.float()[:, None] * LOG2E - lse) * saved.shift
        share = share.masked_fill(lse == -torch.inf, 0.0)
        d_sink = -share.sum((0, 2)).to(sink.dtype)
    return dq, dk, dv, d_sink, *d_terms


def _shift(o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor) -> Tensor:
    N, Lq, heads, value_dim = o.shape
    shift = torch.empty_like(lse)
    rows = 32
    programs = N * heads * -(-Lq // rows)
    if programs:
        tile_attend_backward_shift[(programs,)](
            o, do, lse, dlse, shift, o.stride()[:3], do.stride()[:3], dlse.stride(), heads, Lq,
            DV=value_dim, DV_PAD=max(16, 1 << max(value_dim - 1, 0).bit_length()), ROWS=rows,
        )  # fmt: skip
    return shift


def _query_gradients(
    chosen: Stage,
    task: Task,
    saved: Saved,
    terms: tuple[LocalTerm, ...],
    score: tuple[Any, ...],
    needed: tuple[bool, ...],
    d_terms: list[Tensor | None],
) -> Tensor:
    """dq; writes the gradients of slopes, biases per pair and tables to d_terms."""
    dq = torch.empty_like(saved.q)
    N, Lq, heads, _ = saved.q.shape
    layout = chosen.layout
    wanted = {t.kind: i for i, t in enumerate(terms) if needed[i]}
    share = torch.empty_like(saved.lse) if BY_DISTANCE in wanted else None
    recorded = [i for kind, i in wanted.items() if kind in (PER_PAIR, FROM_TABLE)]
    totals = {i: _Total(terms[i], saved) for i in recorded}
    entries = sum(total.entries for total in totals.values())
    step = max(1, _RECORD_BYTES // max(4 * Lq * entries, 1)) if recorded else max(N * heads, 1)
    for matrix in range(0, N * heads if layout.q_tiles else 0, step):
        matrices = min(step, N * heads - matrix)
        records: list[Any] = [None, 1, None, 1]
        for i, total in totals.items():
            records[2 * i] = saved.lse.new_zeros(matrices, Lq, total.entries)
            records[2 * i + 1] = total.entries
        _launch_q(chosen, task, saved, dq, share, score, tuple(records), matrix, matrices)
        for i, total in totals.items():
            total.add(records[2 * i], matrix)
    for i, total in totals.items():
        d_terms[i] = total.gradient()
    if share is not None:
        index = wanted[BY_DISTANCE]
        d_terms[index] = share.sum((0, 2)).to(terms[index].values.dtype)
    return dq


def _launch_q(
    chosen: Stage,
    task: Task,
    saved: Saved,
    dq: Tensor,
    share: Tensor | None,
    score: tuple[Any, ...],
    records: tuple[Any, ...],
    matrix: int,
    matrices: int,
) -> None:
    layout, k, v = chosen.layout, saved.k, saved.v
    keys = (k, layout.k_strides(k), v, layout.k_strides(v), layout.k_grid)
    tile_attend_backward_q[(matrices * layout.q_tiles,)](
        saved.q, saved.do, dq, saved.lse, saved.shift, share,
        layout.q_strides(saved.q), layout.q_strides(saved.do), layout.q_strides(dq), layout.q_grid,
        keys, saved.heads, saved.groups, float(task.score.scale), score, records,
        matrix * layout.q_tiles, layout.arguments, SPEC=chosen.spec,
        **chosen.options,
    )  # fmt: skip


def _key_gradients(
    chosen: Stage,
    task: Task,
    saved: Saved,
    terms: tuple[LocalTerm, ...],
    score: tuple[Any, ...],
    needed: tuple[bool, ...],
    d_terms: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """dk and dv; writes the gradient of values per key to d_terms."""
    k, v, layout = saved.k, saved.v, chosen.layout
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    N, Lk, kv_heads, _ = k.shape
    per_key = next((i for i, t in enumerate(terms) if needed[i] and t.kind == PER_KEY), None)
    share = None if per_key is None else saved.lse.new_empty(N, saved.heads, Lk)
    programs = N * kv_heads * layout.k_tiles
    if programs:
        keys = (k, layout.k_strides(k), v, layout.k_strides(v), layout.k_grid)
        tile_attend_backward_kv[(programs,)](
            saved.q, saved.do, saved.lse, saved.shift, dk, dv, share,
            layout.q_strides(saved.q), layout.q_strides(saved.do),
            layout.k_strides(dk), layout.k_strides(dv), layout.q_grid,
            keys, saved.heads, saved.groups, float(task.score.scale), score, layout.arguments,
            SPEC=chosen.spec, **chosen.options,
        )  # fmt: skip
    if per_key is not None and share is not None:
        values = terms[per_key].values
        grouped = share.unflatten(1, (values.shape[1], -1)).sum(2)
        d_terms[per_key] = grouped.sum_to_size(values.shape).to(values.dtype)
    return dk, dv


class _Total:
    """The gradient of a bias per pair or of a table, summed over slices of the batch x heads matrices."""

    def __init__(self, term: LocalTerm, saved: Saved) -> None:
        self.values = term.values
        self.pairs = term.kind == PER_PAIR
        self.entries = saved.k.shape[1] if self.pairs else term.values.shape[-1]
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
