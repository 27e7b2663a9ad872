"""The chunk form on a CPU without gradients: a few heads at a time, in buffers that stay in the caches.

With G_i the running sum of the log decays of a chunk and m its value in the middle, queries and keys are
written once, q~ = scale exp(G - m) q and k~ = exp(m - G) k.  Then P = q~ k~^T at i >= j, and with
T_c = exp(m) S_c for the state S_c before chunk c:  o = q~ T_c + P z,
T_{c+1} = exp(G_C - m + m') (T_c + k~^T z), m' of the next chunk.  An additive rule writes z = b v; the
delta rule z = u - w T_c, where u and w solve (I + A) [u, w] = [b v, b k^], A = b k^ k~^T at i > j and
k^ = exp(G - m) k.  Chunks that decay too steeply for this are left to another implementation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.engines.tile.workers import Scratch, in_order
from foveal.rules.base import Parts, Recurrence

CHUNK = 64
LONG = 256
"""Tokens per sequence from which this pays."""
REACH = 16.0
"""Decay of a chunk, in its logarithm, that one factor may undo: it costs 3 of float32's 24 bits."""
_SEGMENT = 2**16
"""Elements of the keys that are worked on at a time."""

Run = Callable[[Recurrence], tuple[Tensor, Tensor]]


def scan_heads(linear: Recurrence, steep: Run) -> tuple[Tensor, Tensor]:
    """o [T, Hv, Dv] and the final state [N, Hv, Dk, Dv] in the precision of the state.

    `steep` runs what decays too steeply.
    """
    heads, count = linear.v.shape[1], len(linear.lengths)
    shape = count, heads, linear.k.shape[-1], linear.v.shape[-1]
    o = linear.v.new_empty(linear.v.shape, dtype=linear.state_dtype)
    state = linear.v.new_zeros(shape, dtype=linear.state_dtype)
    if linear.initial is not None:
        state.copy_(linear.initial)
    stops = torch.tensor(linear.lengths).cumsum(0).tolist()

    def work(item: tuple[int, slice], scratch: Scratch) -> None:
        number, own = item
        start, stop = stops[number] - linear.lengths[number], stops[number]
        part = _of_rows(_of_heads(linear, own), slice(start, stop))
        tokens = _tokens(part)
        gates = _gates_of(part)
        for first in range(0, stop - start, tokens):
            rows = slice(first, min(first + tokens, stop - start))
            out = o[start + rows.start : start + rows.stop, own]
            _segment(part, rows, gates, state[number, own], out, scratch, steep)

    in_order(_items(heads, count), work, each=1)
    return o, state


def scan_segments(
    plain: Recurrence, first: Parts, run: Callable[[Recurrence, Parts], tuple[Tensor, Parts]]
) -> tuple[Tensor, Parts]:
    """o [T, Hv, Dv] and the final states, of which `first` are the initial ones, by `run` for a segment."""
    heads, count = plain.v.shape[1], len(plain.lengths)
    o = plain.v.new_empty(plain.v.shape)
    states = tuple(part.clone() for part in first)
    stops = torch.tensor(plain.lengths).cumsum(0).tolist()

    def work(item: tuple[int, slice], scratch: Scratch) -> None:
        number, own = item
        part = _of_heads(plain, own)
        tokens = _tokens(part)
        start, stop = stops[number] - plain.lengths[number], stops[number]
        before = tuple(state[number : number + 1, own] for state in states)
        for begin in range(start, stop, tokens):
            rows = slice(begin, min(begin + tokens, stop))
            found, after = run(_of_rows(part, rows), before)
            o[rows, own] = found
            for state, new in zip(before, after, strict=True):
                state.copy_(new)

    in_order(_items(heads, count), work, each=1)
    return o, states


def _tokens(part: Recurrence) -> int:
    """Tokens of a segment."""
    return max(_SEGMENT // (part.k.shape[1] * part.k.shape[2]) // CHUNK, 1) * CHUNK


def _items(heads: int, count: int) -> list[tuple[int, slice]]:
    """Sequences and the heads of an item, so that there is work for every thread."""
    each = -(-heads // max(torch.get_num_threads() // max(count, 1), 1))
    parts = [slice(h, min(h + each, heads)) for h in range(0, heads, each)]
    return [(number, own) for number in range(count) for own in parts]


def _of_rows(part: Recurrence, rows: slice) -> Recurrence:
    """Some of the tokens, as one sequence."""
    own: dict[str, Any] = {name: getattr(part, name)[rows] for name in "qkv"}
    for name in ("log_decay", "write_gate", "log_momentum"):
        x = getattr(part, name)
        own[name] = x if x is None or x.dim() == 1 else x[rows]
    return dataclasses.replace(part, lengths=(rows.stop - rows.start,), **own)


def _of_heads(linear: Recurrence, own: slice) -> Recurrence:
    """Some of the value heads, each with its own q and k, without an initial state."""
    groups = linear.v.shape[1] // linear.q.shape[1]
    found: dict[str, Any] = {}
    for name in "qk":
        x = getattr(linear, name)
        heads = torch.arange(own.start, own.stop) // groups
        found[name] = x[:, own] if groups == 1 else x[:, heads]
    for name in ("v", "log_decay", "write_gate", "log_momentum"):
        x = getattr(linear, name)
        if x is not None:
            found[name] = x[own] if x.dim() == 1 else x[:, own]
    return dataclasses.replace(linear, initial=None, **found)


class _Factors(NamedTuple):
    """exp(G - m) and exp(m - G) [chunks, h, C, 1 or Dk], and m and G_C - m [chunks, h, 1 or Dk]."""

    near: Tensor
    far: Tensor
    middle: Tensor
    after: Tensor

    def part(self, chunks: slice) -> _Factors:
        return _Factors(*(x[chunks] for x in self))

    def ratio(self) -> Tensor:
        """What each chunk multiplies the state by [chunks, h, 1 or Dk, 1], with m' = 0 behind the last."""
        found = self.after.clone()
        found[:-1] += self.middle[1:]
        return found.exp_().unsqueeze(-1)


class _Gates(NamedTuple):
    """Write gates [chunks, h, C, 1], the factors of a decay per token, and which chunks are too steep."""

    write: Tensor | None
    factors: _Factors | None
    steep: list[bool]


def _gates_of(part: Recurrence) -> _Gates:
    """Of all tokens at once, where there is one number per token."""
    dtype = part.state_dtype
    write = None if part.write_gate is None else _numbers(part.write_gate, dtype)[..., None]
    if part.log_decay is None or part.log_decay.dim() == 3:
        return _Gates(write, None, [])
    log_decay = part.log_decay
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(len(part.v), -1)
    sums = _numbers(log_decay, dtype) @ _lower(dtype).mT
    least, most = sums.flatten(1).aminmax(dim=1)
    steep = ~((least >= -REACH) & (most <= REACH))
    middle = sums[..., CHUNK // 2, None]
    near = (sums - middle).exp_()
    factors = _Factors(
        near[..., None], near.reciprocal()[..., None], middle, sums[..., -1:] - middle
    )
    return _Gates(write, factors, steep.tolist())


def _numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[chunks, h, C] of x [L, h], zeros behind the last token."""
    length, heads = x.shape
    found = torch.zeros(heads, -(-length // CHUNK) * CHUNK, dtype=dtype)
    found[:, :length] = x.mT
    chunks: Tensor = found.unflatten(1, (-1, CHUNK)).transpose(0, 1).contiguous()
    return chunks


def _segment(
    part: Recurrence, rows: slice, gates: _Gates, state: Tensor, o: Tensor, scratch: Scratch,
    steep: Run,
) -> None:  # fmt: skip
    """Writes o [L, h, Dv] of the tokens in `rows` and brings the states [h, Dk, Dv] behind them."""
    buffers = _Buffers(rows.stop - rows.start, part.v.shape[1], part.state_dtype, scratch)
    chunks = slice(rows.start // CHUNK, -(-rows.stop // CHUNK))
    at, is_steep = None, False
    if gates.factors is not None:
        at, is_steep = gates.factors.part(chunks), any(gates.steep[chunks])
    elif part.log_decay is not None:
        at = _factors(part.log_decay[rows], buffers)
        is_steep = at is None
    if is_steep:
        _steeply(part, rows, state, o, steep)
        return
    gate = None if gates.write is None else gates.write[chunks]
    k = buffers.filled("k", part.k[rows], None if at is None else at.far)
    states = buffers.take("states", *state.shape[1:], more=1)
    if at is None:
        near = ratio = None
        states[0] = state
    else:
        near, ratio = at.near, at.ratio()
        torch.mul(state, at.middle[0].exp()[..., None], out=states[0])
    if part.delta:
        z = _written(part, rows, buffers, k, near, gate, states, ratio)
    else:
        z = buffers.filled("z", part.v[rows], gate)
        added = _product(k.mT, z, buffers.take("added", *state.shape[1:]))
        _walk(states, added, ratio)
    q = buffers.filled("q", part.q[rows], part.scale if near is None else near.mul_(part.scale))
    pairs = _product(q, k.mT, buffers.take("pairs", CHUNK, CHUNK)).tril_()
    found = _product(pairs, z, buffers.take("o", CHUNK, z.shape[-1]))
    found.flatten(0, 1).baddbmm_(q.flatten(0, 1), states[:-1].flatten(0, 1))
    buffers.empty_into(o, found)
    state.copy_(states[-1])


def _steeply(part: Recurrence, rows: slice, state: Tensor, o: Tensor, steep: Run) -> None:
    found, last = steep(dataclasses.replace(_of_rows(part, rows), initial=state[None]))
    o.copy_(found)
    state.copy_(last[0])


def _walk(states: Tensor, added: Tensor, ratio: Tensor | None) -> None:
    before, *behind = states.unbind()
    ratios = (None,) * len(behind) if ratio is None else ratio.unbind()
    for own, factor, state in zip(added.unbind(), ratios, behind, strict=True):
        torch.add(before, own, out=state)
        if factor is not None:
            state.mul_(factor)
        before = state


def _written(
    part: Recurrence, rows: slice, buffers: _Buffers, k: Tensor, near: Tensor | None,
    gate: Tensor | None, states: Tensor, ratio: Tensor | None,
) -> Tensor:  # fmt: skip
    """z of the delta rule; fills the states."""
    dv, dk = part.v.shape[-1], part.k.shape[-1]
    sides = buffers.take("sides", CHUNK, dv + dk)
    buffers.fill(sides[..., :dv], part.v[rows], gate)
    factor = gate if near is None else near if gate is None else near * gate
    buffers.fill(sides[..., dv:], part.k[rows], factor)
    lower = _product(sides[..., dv:], k.mT, buffers.take("lower", CHUNK, CHUNK))
    solved = torch.linalg.solve_triangular(
        lower.mT, sides.mT, upper=True, left=False, unitriangular=True
    ).mT
    z = buffers.take("z", CHUNK, dv)
    u, w = solved.split([dv, dk], dim=-1)
    before, *behind = states.unbind()
    ratios = (None,) * len(behind) if ratio is None else ratio.unbind()
    chunks = zip(u.unbind(), w.unbind(), k.mT.unbind(), z.unbind(), ratios, behind, strict=True)
    for own, reader, keys, rest, factor, state in chunks:
        torch.baddbmm(own, reader, before, alpha=-1, out=rest)
        torch.baddbmm(before, keys, rest, out=state)
        if factor is not None:
            state.mul_(factor)
        before = state
    return z


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b of [chunks, h, ., .], into `out`."""
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
    return out


class _Buffers:
    """Memory for the chunks of a segment, [chunks, h, C, D], with zeros behind its last token."""

    def __init__(self, length: int, heads: int, dtype: torch.dtype, scratch: Scratch) -> None:
        self._scratch, self._dtype, self._heads = scratch, dtype, heads
        self._whole, self._rest = divmod(length, CHUNK)
        self._chunks = self._whole + (self._rest > 0)

    def take(self, name: str, *shape: int, more: int = 0) -> Tensor:
        """[chunks + more, h, *shape], with anything inside."""
        return self._scratch.take(name, (self._chunks + more, self._heads, *shape), self._dtype)

    def filled(self, name: str, x: Tensor, factor: Tensor | float | None = None) -> Tensor:
        """[chunks, h, C, D] of x [L, h, D], times a factor of chunks or a number."""
        return self.fill(self.take(name, CHUNK, x.shape[-1]), x, factor)

    def fill(self, found: Tensor, x: Tensor, factor: Tensor | float | None) -> Tensor:
        for own, tokens in self._halves(found, x):
            if isinstance(factor, Tensor):
                torch.mul(tokens, self._like(own, factor), out=own)
            else:
                own.copy_(tokens)
                if factor is not None:
                    own.mul_(factor)
        if self._rest:
            found[self._whole, :, self._rest :] = 0
        return found

    def empty_into(self, x: Tensor, found: Tensor) -> None:
        """Writes chunks [chunks, h, C, D] to tokens [L, h, D]."""
        for own, tokens in self._halves(found, x):
            tokens.copy_(own)

    def _halves(self, chunks: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of the same tokens in chunks [n, h, C, D] and in x [L, h, D]: whole chunks, and the last."""
        split = self._whole * CHUNK
        found = []
        if self._whole:
            tokens = x[:split].unflatten(0, (self._whole, CHUNK)).transpose(1, 2)
            found.append((chunks[: self._whole], tokens))
        if self._rest:
            tokens = x[split:].transpose(0, 1)[None]
            found.append((chunks[self._whole :, :, : self._rest], tokens))
        return found

    def _like(self, own: Tensor, factor: Tensor) -> Tensor:
        whole = len(own) == self._whole and own.shape[2] == CHUNK
        return factor[: self._whole] if whole else factor[self._whole :, :, : self._rest]


def _factors(log_decay: Tensor, buffers: _Buffers) -> _Factors | None:
    """The factors of log_decay [L, h, Dk]; None where it is too steep."""
    gates = buffers.filled("gates", log_decay)
    sums = buffers.take("sums", *gates.shape[2:])
    _product(_lower(gates.dtype).expand(*gates.shape[:2], -1, -1), gates, sums)
    least, most = torch.aminmax(sums)
    if not (float(least) >= -REACH and float(most) <= REACH):
        return None
    middle, whole = sums[:, :, CHUNK // 2].clone(), sums[:, :, -1].clone()
    near = sums.sub_(middle.unsqueeze(2)).exp_()
    return _Factors(near, torch.reciprocal(near, out=gates), middle, whole.sub_(middle))


@functools.lru_cache(maxsize=2)
def _lower(dtype: torch.dtype) -> Tensor:
    """Ones at i >= j."""
    with torch.inference_mode(False):
        return torch.ones(CHUNK, CHUNK, dtype=dtype).tril_()
