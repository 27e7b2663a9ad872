"""The chunk form of a memory with momentum, in products of matrices on any device.

With M and S the memory and the momentum before a chunk, D^a_ij and D^e_ij the products of the factors
after token j up to token i, G = D^a D^e, c_i and f_i the weights of M and S in the memory after token i,
and K U^T what is written:   M_i = c_i M + f_i S + sum_{j<=i} G_ij k_j u_j^T.
The online rule reads M_{i-1}, so that U solves (I + A) U = b (V - c_- K M - f_- K S) with
A_ij = b_i G_{i-1,j} k_i.k_j; gradients at an anchor need no solution, U = b (V - K A).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._capture import traced
from foveal.engines.state.cpu_two_state import scan_two_states
from foveal.engines.state.layout import Layout, layout
from foveal.engines.state.levels import decay_matrix
from foveal.engines.state.problem import ScanProblem
from foveal.engines.state.segments import CHUNK, LONG
from foveal.rules.base import Parts, Recurrence, Rule, Token
from foveal.rules.two_state import TwoState


def refuses(problem: ScanProblem, rule: Rule) -> str | None:
    return None


def scan(
    problem: ScanProblem, rule: Rule, plain: Recurrence, initial: Parts | None
) -> tuple[Tensor, Parts]:
    """o [T, Hv, Dv] in the dtype of v and the final state."""
    assert isinstance(rule, TwoState)
    dtype, count = plain.state_dtype, len(plain.lengths)
    heads, dims = plain.v.shape[1], (plain.k.shape[-1], plain.v.shape[-1])
    like = plain.v.new_zeros(0, dtype=dtype)
    first = rule.fresh(count, heads, *dims, like) if initial is None else initial
    first = tuple(part.to(dtype) for part in first)
    alone = not (problem.needs_grad or traced())
    if alone and plain.v.device.type == "cpu" and len(plain.v) >= LONG * count:
        return scan_two_states(
            plain, rule.chunk, first, lambda part, state: _scan(part, rule, state)
        )
    return _scan(plain, rule, first)


def _scan(plain: Recurrence, rule: TwoState, first: Parts) -> tuple[Tensor, Parts]:
    count, heads = len(plain.lengths), plain.v.shape[1]
    if set(plain.lengths) == {1}:
        state, o = rule.step(first, _token(plain))
        return o.to(plain.v.dtype), state
    places = [0] * count
    if rule.chunk > 1 and count:
        places = [int(place) for place in first[3][:, 0].tolist()]
    size = CHUNK if rule.chunk == 1 else rule.chunk
    whole = tuple(n + place for n, place in zip(plain.lengths, places, strict=True))
    cut = layout(whole, size)
    chunks = _chunks(plain, cut, places, online=rule.chunk == 1)
    o, last = _walk(chunks, cut, tuple(cut.sorted(part) for part in first[:3]), rule.chunk == 1)
    o = _behind(cut.join(o), plain.lengths, places).to(plain.v.dtype)
    state = tuple(cut.unsorted(part) for part in last)
    if rule.chunk == 1:
        return o, state[:2]
    ends = torch.tensor([n % rule.chunk for n in whole]).to(first[3])
    place = ends[:, None].expand(count, heads)
    anchor = torch.where((place == 0)[..., None, None], state[0], state[2])
    return o, (state[0], state[1], anchor, place)


def _token(plain: Recurrence) -> Token:
    """The only token of every sequence."""
    dtype, (count, heads) = plain.state_dtype, plain.v.shape[:2]
    groups = heads // plain.q.shape[1]
    q, k = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (plain.q, plain.k))

    def gate(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).expand(count, heads)[..., None]

    decay = gate(plain.log_decay)
    return Token(
        q * plain.scale,
        k,
        plain.v.to(dtype),
        q.new_zeros(count, heads, 1) if decay is None else decay,
        gate(plain.write_gate),
        gate(plain.log_momentum),
    )


class _Chunks(NamedTuple):
    """What the walk needs of all chunks, [chunks, Hv, C, .] in the order of the layout.

    pairs = (Q K^T) G; u and, to be multiplied with (M, S) or the anchor, `readers`; q_memory = c Q and
    q_momentum = f Q; keys for the memory G_C K and for the momentum D^e_C K; `kept` = (c_C, f_C, e_C).
    """

    pairs: Tensor
    u: Tensor
    readers: Tensor
    q_memory: Tensor
    q_momentum: Tensor
    memory_keys: Tensor
    momentum_keys: Tensor
    kept: Tensor


def _chunks(plain: Recurrence, cut: Layout, places: list[int], online: bool) -> _Chunks:
    dtype, (tokens, heads) = plain.state_dtype, plain.v.shape[:2]
    groups = heads // plain.q.shape[1]

    def pieces(x: Tensor) -> Tensor:
        return cut.split(_in_front(x.to(dtype), plain.lengths, places))

    q, k, v = (pieces(x) for x in (plain.q, plain.k, plain.v))
    q = q * plain.scale
    q, k = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (q, k))
    gate = v.new_ones(()) if plain.write_gate is None else pieces(plain.write_gate[..., None])
    # A chunk is longer than what it holds; the memory must not run on behind the last token.
    real = pieces(plain.v.new_ones(tokens, 1, 1))

    def factor(x: Tensor | None) -> Tensor:
        zeros = v.new_zeros(tokens, heads)
        return pieces((zeros if x is None else x.to(dtype).expand(tokens, heads))[..., None])

    decay = factor(plain.log_decay)
    adds = decay_matrix(decay) * real.mT
    since = decay.cumsum(-2).exp()
    if plain.log_momentum is None:
        following = F.pad(real[..., 1:, :], (0, 0, 0, 1))
        between, of_momentum = adds, torch.zeros_like(since)
        until, lasting = (real * (1 - following)).squeeze(-1), 1 - real.amax(-2, keepdim=True)
        lasting = lasting.expand_as(since[..., -1:, :])
    else:
        momentum = factor(plain.log_momentum)
        spread = decay_matrix(momentum)
        between, since_momentum = adds @ spread, momentum.cumsum(-2).exp()
        of_momentum = adds @ since_momentum
        until, lasting = spread[..., -1, :], since_momentum[..., -1:, :]
    u, keys = v * gate, k * gate
    readers = keys
    if online:
        before, after = _shifted(since, 1.0), _shifted(of_momentum, 0.0)
        lower = gate * _shifted(between, 0.0) * (k @ k.mT)
        solved = torch.linalg.solve_triangular(
            lower, torch.cat([u, before * keys, after * keys], -1), upper=False, unitriangular=True
        )
        u, readers = solved.split([v.shape[-1], 2 * k.shape[-1]], dim=-1)
    return _Chunks(
        (q @ k.mT) * between,
        u,
        readers,
        since * q,
        of_momentum * q,
        between[..., -1, :, None] * k,
        until[..., None] * k,
        torch.cat([since[..., -1:, :], of_momentum[..., -1:, :], lasting], dim=-1),
    )


def _walk(
    chunks: _Chunks, cut: Layout, first: tuple[Tensor, ...], online: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """o of all chunks, and memory, momentum and anchor behind the last one of each sequence."""
    memory, momentum = first[:2]
    anchor = first[0] if online else first[2]
    outputs, done = [], []
    steps = zip(*(x.split(list(cut.counts)) for x in chunks), strict=True) if cut.counts else ()
    for number, own in enumerate(map(_Chunks._make, steps)):
        now = len(own.u)
        done.append((memory[now:], momentum[now:], anchor[now:]))
        memory, momentum = memory[:now], momentum[:now]
        anchor = memory if number else anchor[:now]
        at = torch.cat([memory, momentum], dim=-2) if online else anchor
        u = own.u - own.readers @ at
        outputs.append(own.q_memory @ memory + own.q_momentum @ momentum + own.pairs @ u)
        c, f, e = own.kept.split(1, dim=-1)
        memory, momentum = (
            c * memory + f * momentum + own.memory_keys.mT @ u,
            e * momentum + own.momentum_keys.mT @ u,
        )
    done.append((memory, momentum, anchor))
    last = tuple(torch.cat(parts) for parts in zip(*done[::-1], strict=True))
    return torch.cat(outputs) if outputs else chunks.u, last


def _shifted(x: Tensor, first: float) -> Tensor:
    """Rows one further down, `first` in the first of them."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)


def _in_front(x: Tensor, lengths: tuple[int, ...], places: list[int]) -> Tensor:
    """x [T, ...] with as many zeros before each sequence as its run has tokens already."""
    if not any(places):
        return x
    parts = []
    for own, place in zip(x.split(list(lengths)), places, strict=True):
        parts += [own.new_zeros(place, *own.shape[1:]), own]
    return torch.cat(parts)


def _behind(x: Tensor, lengths: tuple[int, ...], places: list[int]) -> Tensor:
    """Without what `_in_front` put before the sequences."""
    if not any(places):
        return x
    sizes = [n for pair in zip(places, lengths, strict=True) for n in pair]
    return torch.cat(x.split(sizes)[1::2])
