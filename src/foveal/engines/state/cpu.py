"""The chunk form on a CPU without gradients: a segment of tokens at a time, all its heads together.

With G_i, m and the factors of `segments`, queries and keys are written once, q~ = exp(G - m) q and
k~ = exp(m - G) k.  Then P = q~ k~^T at i >= j, and with T_c = exp(m) S_c for the state S_c before chunk c:
o = scale (q~ T_c + P z), T_{c+1} = exp(G_C - m + m') (T_c + k~^T z), m' of the next chunk.  An additive
rule writes z = b v; the delta rule z = u - w T_c, where u and w solve (I + A) [u, w] = [b v, b k^],
A = b k^ k~^T at i > j and k^ = exp(G - m) k.  Chunks that decay too steeply for this are left to another
implementation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.engines.state.segments import (
    CHUNK,
    Buffers,
    Factors,
    chunks_of,
    factors_of_channels,
    factors_of_tokens,
    halved,
    numbers,
    segments,
)
from foveal.engines.tile.workers import Scratch, in_order
from foveal.rules.base import Recurrence

Run = Callable[[Recurrence], tuple[Tensor, Tensor]]


def scan_segments(linear: Recurrence, steep: Run) -> tuple[Tensor, Tensor]:
    """o [T, Hv, Dv] and the final state [N, Hv, Dk, Dv] in the precision of the state.

    With a divisor the state has one more column.  `steep` runs what decays too steeply.
    """
    heads, count = linear.v.shape[1], len(linear.lengths)
    columns = linear.v.shape[-1] + (linear.divisor is not None)
    o = linear.v.new_empty(linear.v.shape, dtype=linear.state_dtype)
    state = o.new_zeros(count, heads, linear.k.shape[-1], columns)
    if linear.initial is not None:
        state.copy_(linear.initial)

    def work(whole: Recurrence, scratch: Scratch) -> None:
        start = 0
        for number, length in enumerate(whole.lengths):
            rows = slice(start, start + length)
            part = rows_of(whole, rows)
            one = _Sequence(part, _gates_of(part), state[number], o[rows], scratch, steep)
            for own in segments(length, heads * linear.k.shape[-1]):
                one.segment(own)
            start += length

    in_order([linear], work)
    return o, state


def rows_of(part: Recurrence, rows: slice) -> Recurrence:
    """Some of the tokens, as one sequence without an initial state."""
    own: dict[str, Any] = {name: getattr(part, name)[rows] for name in "qkv"}
    for name in ("log_decay", "write_gate", "log_momentum"):
        x = getattr(part, name)
        own[name] = x if x is None or x.dim() == 1 else x[rows]
    if part.divisor is not None and isinstance(part.divisor.floor, Tensor):
        own["divisor"] = part.divisor._replace(floor=part.divisor.floor[rows])
    return dataclasses.replace(part, lengths=(rows.stop - rows.start,), initial=None, **own)


def of_value_heads(x: Tensor, heads: int) -> Tensor:
    """q or k [L, H, Dk] of the `heads` value heads."""
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


class _Gates(NamedTuple):
    """Write gates [chunks, h, C, 1], least divisors [chunks, h, C], the factors of a decay per token, which
    chunks are too steep, and what makes b k^ [chunks, h, C, 1] of k~, of k^ with a decay per channel."""

    write: Tensor | None
    floor: Tensor | float
    factors: Factors | None
    steep: list[bool]
    reader: Tensor | None


def _gates_of(part: Recurrence) -> _Gates:
    """Of all tokens at once, where there is one number per token."""
    dtype = part.state_dtype
    write = None if part.write_gate is None else numbers(part.write_gate, dtype)[..., None]
    floor = 0.0 if part.divisor is None else part.divisor.floor
    if isinstance(floor, Tensor):
        floor = numbers(floor, dtype)
    if part.log_decay is None or part.log_decay.dim() == 3:
        return _Gates(write, floor, None, [], write)
    factors, steep = factors_of_tokens(part.log_decay, len(part.v), dtype)
    reader = factors.near.square()
    if write is not None:
        reader *= write
    return _Gates(write, floor, factors, steep, reader)


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """One sequence, its state [h, Dk, Dv] up to the next segment, and its o [L, h, Dv]."""

    part: Recurrence
    gates: _Gates
    state: Tensor
    o: Tensor
    scratch: Scratch
    steep: Run
    buffers: dict[int, Buffers] = dataclasses.field(default_factory=dict)

    def _buffers(self, length: int) -> Buffers:
        if length not in self.buffers:
            part = self.part
            self.buffers[length] = Buffers(length, part.v.shape[1], part.state_dtype, self.scratch)
        return self.buffers[length]

    def segment(self, rows: slice) -> None:
        """Writes o of the tokens in `rows` and brings the state behind them."""
        part, state = self.part, self.state
        buffers = self._buffers(rows.stop - rows.start)
        chunks = chunks_of(rows)
        at, is_steep = None, False
        if self.gates.factors is not None:
            at, is_steep = self.gates.factors.part(chunks), any(self.gates.steep[chunks])
        elif part.log_decay is not None:
            at = factors_of_channels(part.log_decay[rows], buffers)
            is_steep = at is None
        if is_steep:
            self._steep_segment(rows)
            return
        gate = None if self.gates.write is None else self.gates.write[chunks]
        q, k = (of_value_heads(x[rows], part.v.shape[1]) for x in (part.q, part.k))
        states = buffers.take("states", *state.shape[1:], more=1)
        ratio = None
        if at is None:
            states[0] = state
        else:
            ratio = at.ratio()
            torch.mul(state, at.first[0], out=states[0])
        z = self._values(rows, buffers, gate)
        if part.delta:
            keys, reader = self._keys(k, at, chunks, buffers)
            z = _replaced(z, reader, keys, states, ratio, buffers)
        else:
            keys = buffers.filled("k", k, None if at is None else at.far)
            added = buffers.take("added", *state.shape[1:])
            buffers.product(buffers.turned(keys), buffers.flat(z), added)
            _walk(states, added, ratio, buffers)
        self._read(rows, buffers.filled("q", q, None if at is None else at.near), keys, z, buffers)
        state.copy_(states[-1])

    def _keys(
        self, k: Tensor, at: Factors | None, chunks: slice, buffers: Buffers
    ) -> tuple[Tensor, Tensor]:
        """k~ and b k^ [chunks, h, C, Dk] of k [L, h, Dk]."""
        gate = None if self.gates.reader is None else self.gates.reader[chunks]
        if at is not None and at.near.shape[-1] > 1:
            reader = buffers.filled("q", k)
            keys = torch.mul(reader, at.far, out=buffers.take("k", *reader.shape[2:]))
            reader.mul_(at.near)
            return keys, reader if gate is None else reader.mul_(gate)
        keys = buffers.filled("k", k, None if at is None else at.far)
        if gate is None:
            return keys, keys
        return keys, torch.mul(keys, gate, out=buffers.take("q", *keys.shape[2:]))

    def _read(self, rows: slice, q: Tensor, keys: Tensor, z: Tensor, buffers: Buffers) -> None:
        """Writes o of q~, k~, z and the states before the chunks."""
        pairs = buffers.take("pairs", CHUNK, CHUNK)
        buffers.product(buffers.flat(q), buffers.turned(keys), pairs).tril_()
        found = buffers.take("added", *z.shape[2:])
        flat, factor = buffers.flat(found), self.part.scale
        torch.baddbmm(flat, buffers.flat(pairs), buffers.flat(z), beta=0, alpha=factor, out=flat)
        before = buffers.take("states", *self.state.shape[1:], more=1)[:-1].flatten(0, 1)
        flat.baddbmm_(buffers.flat(q), before, alpha=factor)
        self._write(rows, buffers, found)

    def _steep_segment(self, rows: slice) -> None:
        parts = halved(rows)
        if len(parts) > 1:
            for own in parts:
                self.segment(own)
            return
        initial = self.state[None]
        found, last = self.steep(dataclasses.replace(rows_of(self.part, rows), initial=initial))
        self.o[rows] = found
        self.state.copy_(last[0])

    def _values(self, rows: slice, buffers: Buffers, gate: Tensor | None) -> Tensor:
        """b v [chunks, h, C, Dv], with a divisor and a column of b."""
        v = self.part.v[rows]
        if self.part.divisor is None:
            return buffers.filled("v", v, gate)
        wide = buffers.take("v", CHUNK, v.shape[-1] + 1)
        buffers.fill(wide[..., :-1], v, gate)
        wide[..., -1:] = 1.0 if gate is None else gate
        return wide

    def _write(self, rows: slice, buffers: Buffers, found: Tensor) -> None:
        divisor, floor = self.part.divisor, self.gates.floor
        if divisor is None:
            buffers.empty_into(self.o[rows], found)
            return
        if isinstance(floor, Tensor):
            floor = floor[chunks_of(rows)]
        by = divisor._replace(floor=floor).of(found[..., -1:]).reciprocal()
        buffers.empty_into(self.o[rows], found[..., :-1], by)


def _walk(states: Tensor, added: Tensor, ratio: Tensor | None, buffers: Buffers) -> None:
    """T_{c+1} = ratio (T_c + added)"""
    before, *behind = buffers.steps(states)
    if ratio is None:
        for own, state in zip(buffers.steps(added), behind, strict=True):
            torch.add(before, own, out=state)
            before = state
        return
    added.mul_(ratio)
    for own, factor, state in zip(buffers.steps(added), ratio.unbind(), behind, strict=True):
        torch.addcmul(own, before, factor, out=state)
        before = state


def _replaced(
    v: Tensor, reader: Tensor, keys: Tensor, states: Tensor, ratio: Tensor | None, buffers: Buffers
) -> Tensor:
    """z of the delta rule, of b v, b k^ and k~; fills the states."""
    lower = buffers.take("pairs", CHUNK, CHUNK)
    buffers.product(buffers.flat(reader), buffers.turned(keys), lower)
    solve = buffers.inverse(lower)
    z = buffers.take("z", *v.shape[2:])
    ratios: tuple[Tensor | None, ...] = (None,) * len(z)
    if ratio is not None:
        keys = torch.mul(keys, ratio.mT, out=buffers.take("added", *keys.shape[2:]))
        ratios = ratio.unbind()
    before, *behind = buffers.steps(states)
    parts = (
        *map(buffers.steps, (v, reader, solve, z)), buffers.turned_steps(keys), ratios, behind
    )  # fmt: skip
    for own, reads, solves, rows, writes, factor, state in zip(*parts, strict=True):
        torch.bmm(solves, own.baddbmm_(reads, before, alpha=-1), out=rows)
        if factor is None:
            torch.baddbmm(before, writes, rows, out=state)
        else:
            torch.mul(before, factor, out=state).baddbmm_(writes, rows)
        before = state
    return z
