"""The chunk form of a memory with momentum on a CPU without gradients, a segment of tokens at a time.

As `two_state`, with memory and momentum one below the other, X = [M; S].  Of a chunk, with the decays
between its tokens D^a and D^e from factors of its middle and G = D^a D^e:  U = u - w X (online) or
u - b K A (gradients at the memory A before the run),  o = scale ([c Q, f Q] X + (Q K^T G) U) and
X' = ([c_C, f_C; 0, e_C] X) + [G_C K, D^e_C K]^T U.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.engines.state.cpu import of_value_heads, rows_of
from foveal.engines.state.segments import (
    CHUNK,
    Buffers,
    Factors,
    chunks_of,
    factors_of_tokens,
    halved,
    numbers,
    segments,
)
from foveal.engines.tile.workers import Scratch, in_order
from foveal.rules.base import Parts, Recurrence

Run = Callable[[Recurrence, Parts], tuple[Tensor, Parts]]


def scan_two_states(plain: Recurrence, run: int, first: Parts, steep: Run) -> tuple[Tensor, Parts]:
    """o [T, Hv, Dv] and the final state of `TwoState(chunk=run)` from the state `first`.

    `steep` runs what decays too steeply, and the rest of a run that the state is in the middle of.
    """
    o = plain.v.new_empty(plain.v.shape)
    states = tuple(part.clone() for part in first)

    def work(whole: Recurrence, scratch: Scratch) -> None:
        start = 0
        for number, length in enumerate(whole.lengths):
            rows = slice(start, start + length)
            own = tuple(part[number : number + 1] for part in states)
            part = rows_of(whole, rows)
            _Sequence(part, run, own, o[rows], scratch, steep).scan(length)
            start += length

    in_order([plain], work)
    return o, states


class _Gates(NamedTuple):
    """Write gates [chunks, h, C, 1], the factors of both decays, and which chunks are too steep."""

    write: Tensor | None
    decay: Factors
    momentum: Factors | None
    steep: list[bool]


class _Decays(NamedTuple):
    """G [chunks, h, C, C] and its last row; D^e_C; c and f [chunks, h, C]; (c_C, f_C; 0, e_C)."""

    between: Tensor
    until: Tensor
    since: Tensor
    of_momentum: Tensor
    kept: Tensor


@dataclass(frozen=True)
class _Sequence:
    """One sequence, the parts of its state [1, h, ...] up to the next segment, and its o [L, h, Dv]."""

    part: Recurrence
    run: int
    state: Parts
    o: Tensor
    scratch: Scratch
    steep: Run
    buffers: dict[int, Buffers] = field(default_factory=dict)

    def _buffers(self, length: int) -> Buffers:
        if length not in self.buffers:
            heads, dtype = self.part.v.shape[1], self.part.state_dtype
            self.buffers[length] = Buffers(length, heads, dtype, self.scratch, self.size)
        return self.buffers[length]

    @property
    def size(self) -> int:
        return CHUNK if self.run == 1 else self.run

    def scan(self, length: int) -> None:
        begun = 0
        if self.run > 1 and length:
            place = int(self.state[3][0, 0])
            begun = min(-place % self.run, length)
        if begun:
            self._by_steep(slice(0, begun))
        part = rows_of(self.part, slice(begun, length))
        rest = _Sequence(part, self.run, self.state, self.o[begun:], self.scratch, self.steep)
        gates = rest._gates()
        width = part.v.shape[1] * part.k.shape[-1]
        for rows in segments(length - begun, width, self.size):
            rest._segment(rows, gates)

    def _gates(self) -> _Gates:
        part, dtype, length = self.part, self.part.state_dtype, len(self.part.v)
        write = part.write_gate
        gate = None if write is None else numbers(write, dtype, self.size)[..., None]
        log_decay = part.log_decay
        if log_decay is None:
            log_decay = part.v.new_zeros(part.v.shape[1], dtype=dtype)
        decay, steep = factors_of_tokens(log_decay, length, dtype, self.size)
        momentum = None
        if part.log_momentum is not None:
            momentum, too = factors_of_tokens(part.log_momentum, length, dtype, self.size)
            steep = [a or b for a, b in zip(steep, too, strict=True)]
        return _Gates(gate, decay, momentum, steep)

    def _segment(self, rows: slice, gates: _Gates) -> None:
        """Writes o of the tokens in `rows` and brings the state behind them."""
        part, size = self.part, self.size
        chunks = chunks_of(rows, size)
        if any(gates.steep[chunks]):
            parts = halved(rows, size)
            if len(parts) == 1:
                self._by_steep(rows)
            else:
                for own in parts:
                    self._segment(own, gates)
            return
        length, (heads, value_dim) = rows.stop - rows.start, part.v.shape[1:]
        buffers = self._buffers(length)
        gate = None if gates.write is None else gates.write[chunks]
        at = _decays(gates, chunks, length, buffers, size)
        q, k = (of_value_heads(x[rows], heads) for x in (part.q, part.k))
        dim = k.shape[-1]
        k = buffers.filled("k", k)
        gated = k if gate is None else torch.mul(k, gate, out=buffers.take("gated", size, dim))
        u = values = buffers.filled("v", part.v[rows], gate)
        reader = gated
        if self.run == 1:
            lower = buffers.take("pairs", size, size)
            buffers.product(buffers.flat(gated), buffers.turned(k), lower)
            lower[..., 1:, :] *= at.between[..., :-1, :]
            solve = buffers.flat(buffers.inverse(lower))
            wide = _side_by_side(gated, _shifted(at.since, 1.0), _shifted(at.of_momentum, 0.0),
                                 buffers.take("wide", size, 2 * dim))  # fmt: skip
            reader, u = buffers.take("reader", size, 2 * dim), buffers.take("u", size, value_dim)
            buffers.product(solve, buffers.flat(wide), reader)
            buffers.product(solve, buffers.flat(values), u)
        keys = _side_by_side(
            k, at.between[..., -1, :], at.until, buffers.take("keys", size, 2 * dim)
        )
        states = buffers.take("states", 2 * dim, value_dim, more=1)
        states[0, :, :dim], states[0, :, dim:] = self.state[0][0], self.state[1][0]
        _walk(states, u, reader, keys, at.kept, buffers)
        q = buffers.filled("q", q)
        pairs = buffers.take("pairs", size, size)
        buffers.product(buffers.flat(q), buffers.turned(k), pairs).mul_(at.between)
        reads = _side_by_side(q, at.since, at.of_momentum, buffers.take("wide", size, 2 * dim))
        found = buffers.take("v" if self.run == 1 else "reader", size, value_dim)
        buffers.product(buffers.flat(reads), states[:-1].flatten(0, 1), found)
        buffers.flat(found).baddbmm_(buffers.flat(pairs), buffers.flat(u))
        buffers.empty_into(self.o[rows], found, part.scale)
        self.state[0][0], self.state[1][0] = states[-1, :, :dim], states[-1, :, dim:]
        if self.run > 1:
            place = length % size
            self.state[2][0] = states[-2 if place else -1, :, :dim]
            self.state[3][0] = place

    def _by_steep(self, rows: slice) -> None:
        self.o[rows], after = self.steep(rows_of(self.part, rows), self.state)
        for own, new in zip(self.state, after, strict=True):
            own.copy_(new)


def _decays(gates: _Gates, chunks: slice, length: int, buffers: Buffers, size: int) -> _Decays:
    adding, rest = gates.decay.part(chunks), length % size
    far, since = adding.far, (adding.near * adding.first()).squeeze(-1)
    last = rest - 1
    if rest:
        # The memory must not run on behind the last token.
        far = far.clone()
        far[-1, :, rest:] = 0
    adds = torch.mul(adding.near, far.mT, out=buffers.take("adds", size, size)).tril_()
    if gates.momentum is None:
        until, lasting = torch.zeros_like(since), torch.zeros_like(since[..., -1])
        until[..., -1] = 1
        if rest:
            until[-1, :, -1] = 0
            until[-1, :, last] = 1
        return _Decays(adds, until, since, torch.zeros_like(since), _kept(since, lasting, lasting))
    own = gates.momentum.part(chunks)
    spread = torch.mul(own.near, own.far.mT, out=buffers.take("spread", size, size)).tril_()
    between = buffers.take("between", size, size)
    buffers.product(buffers.flat(adds), buffers.flat(spread), between)
    since_momentum = (own.near * own.first()).squeeze(-1)
    of_momentum = between[..., 0] * since_momentum[..., :1]
    kept = _kept(since, of_momentum[..., -1], since_momentum[..., -1])
    return _Decays(between, spread[..., -1, :], since, of_momentum, kept)


def _kept(since: Tensor, of_momentum: Tensor, lasting: Tensor) -> Tensor:
    """[chunks, h, 2, 2] of c_C, f_C and e_C."""
    rows = [since[..., -1], of_momentum, torch.zeros_like(lasting), lasting]
    kept: Tensor = torch.stack(rows, dim=-1).unflatten(-1, (2, 2))
    return kept


def _walk(
    states: Tensor, u: Tensor, reader: Tensor, keys: Tensor, kept: Tensor, buffers: Buffers
) -> None:
    """Fills the states [chunks + 1, h, 2 Dk, Dv] and makes `u` what is written."""
    before, *behind = buffers.steps(states)
    rows = reader.shape[-1]
    parts = (
        buffers.steps(u), buffers.steps(reader), buffers.turned_steps(keys), kept.unbind(), behind
    )  # fmt: skip
    for own, reads, writes, factors, state in zip(*parts, strict=True):
        own.baddbmm_(reads, before[:, :rows], alpha=-1)
        torch.bmm(factors, before.view(len(before), 2, -1), out=state.view(len(state), 2, -1))
        state.baddbmm_(writes, own)
        before = state


def _side_by_side(x: Tensor, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """[left x, right x] of x [chunks, h, C, D] with factors [chunks, h, C]."""
    width = x.shape[-1]
    torch.mul(x, left[..., None], out=out[..., :width])
    torch.mul(x, right[..., None], out=out[..., width:])
    return out


def _shifted(x: Tensor, first: float) -> Tensor:
    """x [..., C] one further on, `first` in the first place."""
    return torch.cat([torch.full_like(x[..., :1], first), x[..., :-1]], dim=-1)
