"""The chunk form of a memory with momentum on a CPU without gradients, a segment of tokens at a time.

As `two_state`, with memory and momentum one below the other, X = [M; S].  Of a chunk, with the decays
between its tokens D^a and D^e from factors of its middle and G = D^a D^e:
U = (I + A)^-1 b (V - [c_- K, f_- K] X), c_- and f_- of the token before (online), or
U = b (V - K A), gradients at the memory A before the run;  o = scale ([c Q, f Q] X + (Q K^T G) U)  and
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
    """Of all chunks: write gates [chunks, h, C, 1], which chunks are too steep, and the decays."""

    write: Tensor | None
    steep: list[bool]
    decays: _Decays


class _Decays(NamedTuple):
    """Of chunks: D^a and D^e; D^e_C; c and f [chunks, h, C]; both of the token before; (c_C, f_C; 0, e_C)."""

    memory: _Pair
    momentum: _Pair | None
    until: Tensor
    since: Tensor
    of_momentum: Tensor
    before: Tensor
    of_momentum_before: Tensor
    kept: Tensor

    def part(self, chunks: slice) -> _Decays:
        momentum = None if self.momentum is None else self.momentum.part(chunks)
        return _Decays(self.memory.part(chunks), momentum, *(x[chunks] for x in self[2:]))


class _Pair(NamedTuple):
    """exp(G - m) and exp(m - G) [chunks, h, C, 1], whose products are the decays between tokens."""

    near: Tensor
    far: Tensor

    def part(self, chunks: slice) -> _Pair:
        return _Pair(self.near[chunks], self.far[chunks])


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
        return _Gates(gate, steep, _decays(decay, momentum, length % self.size))

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
        at = gates.decays.part(chunks)
        between = _between(at, buffers, size)
        q, k = (of_value_heads(x[rows], heads) for x in (part.q, part.k))
        dim = k.shape[-1]
        k = buffers.filled("k", k)
        gated = k if gate is None else torch.mul(k, gate, out=buffers.take("gated", size, dim))
        u = values = buffers.filled("v", part.v[rows], gate)
        reader, solve = gated, None
        if self.run == 1:
            lower = buffers.take("pairs", size, size)
            buffers.product(buffers.flat(gated), buffers.turned(k), lower)
            lower[..., 1:, :] *= between[..., :-1, :]
            solve = buffers.inverse(lower)
            wide = buffers.take("wide", size, 2 * dim)
            reader = _side_by_side(gated, at.before, at.of_momentum_before, wide)
            u = buffers.take("u", size, value_dim)
        keys = _side_by_side(k, between[..., -1, :], at.until, buffers.take("keys", size, 2 * dim))
        states = buffers.take("states", 2 * dim, value_dim, more=1)
        states[0, :, :dim], states[0, :, dim:] = self.state[0][0], self.state[1][0]
        _walk(states, values, reader, solve, u, keys, at.kept, buffers)
        q = buffers.filled("q", q)
        pairs = buffers.take("pairs", size, size)
        buffers.product(buffers.flat(q), buffers.turned(k), pairs).mul_(between)
        reads = _side_by_side(q, at.since, at.of_momentum, buffers.take("wide", size, 2 * dim))
        found = buffers.take("v" if self.run == 1 else "reader", size, value_dim)
        flat, factor = buffers.flat(found), part.scale
        torch.baddbmm(
            flat, buffers.flat(reads), states[:-1].flatten(0, 1), beta=0, alpha=factor, out=flat
        )
        flat.baddbmm_(buffers.flat(pairs), buffers.flat(u), alpha=factor)
        buffers.empty_into(self.o[rows], found)
        self.state[0][0], self.state[1][0] = states[-1, :, :dim], states[-1, :, dim:]
        if self.run > 1:
            place = length % size
            self.state[2][0] = states[-2 if place else -1, :, :dim]
            self.state[3][0] = place

    def _by_steep(self, rows: slice) -> None:
        self.o[rows], after = self.steep(rows_of(self.part, rows), self.state)
        for own, new in zip(self.state, after, strict=True):
            own.copy_(new)


def _decays(decay: Factors, momentum: Factors | None, rest: int) -> _Decays:
    """Of all chunks; `rest`: tokens of the last one, if that is not whole."""
    since = (decay.near * decay.first).squeeze(-1)
    far = decay.far
    if rest:
        # The memory must not run on behind the last token.
        far = far.clone()
        far[-1, :, rest:] = 0
    memory = _Pair(decay.near, far)
    if momentum is None:
        own, of_momentum = None, torch.zeros_like(since)
        until, lasting = torch.zeros_like(since), torch.zeros_like(since[..., -1])
        until[..., -1] = 1
        if rest:
            until[-1, :, -1] = 0
            until[-1, :, rest - 1] = 1
    else:
        own = _Pair(momentum.near, momentum.far)
        since_momentum = (momentum.near * momentum.first).squeeze(-1)
        sums = (far * own.near).squeeze(-1).cumsum(-1) * decay.near.squeeze(-1)
        of_momentum = sums * own.far[:, :, 0] * since_momentum[..., :1]
        until, lasting = (own.near[..., -1:, :] * own.far).squeeze(-1), since_momentum[..., -1]
    kept = _kept(since, of_momentum[..., -1], lasting)
    before, of_momentum_before = _shifted(since, 1.0), _shifted(of_momentum, 0.0)
    return _Decays(memory, own, until, since, of_momentum, before, of_momentum_before, kept)


def _between(at: _Decays, buffers: Buffers, size: int) -> Tensor:
    """G = D^a D^e [chunks, h, C, C].

    A product where one half of the tokens meets itself; from a token j of the first half to a token i of
    the second G_ij = exp(a_i - e_j) sum_l exp(e_l - a_l), the sums of l from j and up to i.
    """
    (near, far), between = at.memory, buffers.take("between", size, size)
    if at.momentum is None:
        return torch.mul(near, far.mT, out=between).tril_()
    own = at.momentum
    parts = 2 if size % 2 == 0 else 1
    half = size // parts
    adds, spread, products = (
        buffers.take(name, parts, half, half) for name in ("adds", "spread", "products")
    )
    for found, pair in ((adds, at.memory), (spread, own)):
        i, j = (x.unflatten(2, (parts, half)) for x in pair)
        torch.mul(i, j.mT, out=found).tril_()
    torch.bmm(*(x.view(-1, half, half) for x in (adds, spread)), out=products.view(-1, half, half))
    if parts == 1:
        return products.squeeze(2)
    between[..., :half, :half] = products[:, :, 0]
    between[..., half:, half:] = products[:, :, 1]
    between[..., :half, half:] = 0
    weights = (far * own.near).squeeze(-1)
    before = weights[..., :half].flip(-1).cumsum(-1).flip(-1)
    behind = weights[..., half:].cumsum(-1)
    below = between[..., half:, :half]
    torch.add(behind[..., None], before[..., None, :], out=below)
    below.mul_(near[:, :, half:]).mul_(own.far[:, :, :half].mT)
    return between


def _kept(since: Tensor, of_momentum: Tensor, lasting: Tensor) -> Tensor:
    """[chunks, h, 2, 2] of c_C, f_C and e_C."""
    rows = [since[..., -1], of_momentum, torch.zeros_like(lasting), lasting]
    kept: Tensor = torch.stack(rows, dim=-1).unflatten(-1, (2, 2))
    return kept


def _walk(
    states: Tensor, values: Tensor, reader: Tensor, solve: Tensor | None, u: Tensor, keys: Tensor,
    kept: Tensor, buffers: Buffers,
) -> None:  # fmt: skip
    """Fills the states [chunks + 1, h, 2 Dk, Dv] and `u`, which is `values` where nothing is solved."""
    read = states[:-1, :, : reader.shape[-1]].unbind()
    pairs = states.unflatten(2, (2, -1)).flatten(3).unbind()
    solves = (None,) * len(values) if solve is None else buffers.steps(solve)
    before = pairs[0]
    steps = (
        *map(buffers.steps, (values, u, reader)), solves, buffers.turned_steps(keys), kept.unbind(), read,
        pairs[1:], buffers.steps(states)[1:],
    )  # fmt: skip
    for own, rows, reads, solved, writes, factors, memory, behind, state in zip(
        *steps, strict=True
    ):
        own.baddbmm_(reads, memory, alpha=-1)
        if solved is not None:
            torch.bmm(solved, own, out=rows)
        torch.bmm(factors, before, out=behind)
        state.baddbmm_(writes, rows)
        before = behind


def _side_by_side(x: Tensor, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """[left x, right x] of x [chunks, h, C, D] with factors [chunks, h, C]."""
    width = x.shape[-1]
    torch.mul(x, left[..., None], out=out[..., :width])
    torch.mul(x, right[..., None], out=out[..., width:])
    return out


def _shifted(x: Tensor, first: float) -> Tensor:
    """x [..., C] one further on, `first` in the first place."""
    return torch.cat([torch.full_like(x[..., :1], first), x[..., :-1]], dim=-1)
