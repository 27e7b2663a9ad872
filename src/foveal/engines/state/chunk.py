"""The chunk form in products of matrices, on any device: time and memory are linear in the length.

With S the state before a chunk, G_i the sum of the log decays of the chunk up to token i,
A_ij = b_i sum_d k_id k_jd exp(G_id - G_jd) for i > j, P_ij = scale sum_d q_id k_jd exp(G_id - G_jd)
for i >= j:   Z = (I + A)^-1 (b V - b (exp(G) K) S),   O = scale (exp(G) Q) S + P Z,
S' = Diag(exp(G_C)) S + (exp(G_C - G) K)^T Z.  An additive rule has A = 0 and no second term in Z.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from foveal.engines.state.layout import Layout, layout
from foveal.engines.state.levels import decay_matrix, factors, pair_products
from foveal.engines.state.problem import ScanProblem
from foveal.rules.base import Parts, Recurrence, Rule

_CHUNK = 64
_SEGMENT = 2**18
"""Elements of the values that are worked on at a time: more than this leaves the caches."""


def refuses(problem: ScanProblem, rule: Rule) -> str | None:
    return None


def scan(
    problem: ScanProblem, rule: Rule, plain: Recurrence, initial: Parts | None
) -> tuple[Tensor, Parts]:
    """o [T, Hv, Dv] in the dtype of v and the final state."""
    linear, finish = rule.recurrence(plain, initial)
    o, memory = run(linear)
    o, state = finish(o, memory)
    return o.to(plain.v.dtype), state


def run(linear: Recurrence, chunk: int = _CHUNK) -> tuple[Tensor, Tensor]:
    """o [T, Hv, Dv] and the final state [N, Hv, Dk, Dv], both in the precision of the state."""
    count, length = len(linear.lengths), max(linear.lengths, default=0)
    width = max(count * linear.v[:1].numel(), 1)
    tokens = max(_SEGMENT // width // chunk, 1) * chunk
    if len(set(linear.lengths)) != 1 or length <= tokens:
        return _run(linear, chunk)
    state, outputs = linear.initial, []
    for piece in _pieces(linear, tokens):
        o, state = _run(dataclasses.replace(piece, initial=state), chunk)
        outputs.append(o.unflatten(0, (count, -1)))
    assert state is not None
    return torch.cat(outputs, dim=1).flatten(0, 1), state


def _pieces(linear: Recurrence, tokens: int) -> Iterator[Recurrence]:
    """The next `tokens` tokens of all sequences, which are equally long."""
    count, length = len(linear.lengths), linear.lengths[0]
    names = ("q", "k", "v", "log_decay", "write_gate")
    parts = {}
    for name in names:
        x = getattr(linear, name)
        if x is not None and x.dim() > 1:
            pieces = x.unflatten(0, (count, length)).split(tokens, dim=1)
            parts[name] = [piece.flatten(0, 1) for piece in pieces]
    for number, start in enumerate(range(0, length, tokens)):
        own = {name: pieces[number] for name, pieces in parts.items()}
        yield dataclasses.replace(linear, lengths=(min(tokens, length - start),) * count, **own)


def _run(linear: Recurrence, chunk: int) -> tuple[Tensor, Tensor]:
    dtype = linear.state_dtype
    cut = layout(linear.lengths, chunk)
    groups = linear.v.shape[1] // linear.q.shape[1]
    q, k, v = (cut.split(x.to(dtype)) for x in (linear.q, linear.k, linear.v))
    q = q * linear.scale
    q, k = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (q, k))
    initial = linear.initial
    if initial is None:
        initial = v.new_zeros(len(linear.lengths), v.shape[1], k.shape[-1], v.shape[-1])
    gate = None
    if linear.write_gate is not None:
        gate = cut.split(linear.write_gate.to(dtype)[..., None])
    log_decay = _gates(linear, cut, dtype)
    at = None if log_decay is None else factors(log_decay)

    k_since, k_until = (k, k) if at is None else (k * at.since, k * at.until)
    q_since = q if at is None else q * at.since
    if at is not None and linear.per_channel:
        q_pairs = pair_products(q, k, at)
        k_pairs = pair_products(k, k, at) if linear.delta else k
    else:
        between = None if log_decay is None else decay_matrix(log_decay)
        q_pairs = _within(q @ k.mT, between)
        k_pairs = _within(k @ k.mT, between) if linear.delta else k
    u = v if gate is None else v * gate
    if linear.delta:
        lower = k_pairs if gate is None else k_pairs * gate
        keys = k_since if gate is None else k_since * gate
        solved = torch.linalg.solve_triangular(
            lower, torch.cat([u, keys], dim=-1), upper=False, unitriangular=True
        )
        u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    kept = None
    if at is not None:
        kept = at.since[..., -1, :, None].expand(len(v), -1, -1, -1)  # [chunks, Hv, Dk or 1, 1]
    first = cut.sorted(initial.to(dtype))
    if linear.delta:
        before, u, last = _walk_delta(u, w, k_until, kept, first, cut)
    else:
        before, last = _walk(k_until.mT @ u, kept, first, cut)
    o = q_pairs @ u
    if len(before):
        o = torch.baddbmm(o.flatten(0, 1), q_since.flatten(0, 1), before.flatten(0, 1)).view_as(o)
    return cut.join(o), cut.unsorted(last)


def _gates(linear: Recurrence, cut: Layout, dtype: torch.dtype) -> Tensor | None:
    """log_decay [chunks, Hv, C, Dk or 1], of whole chunks with a fixed decay [1, Hv, C, 1]."""
    if linear.log_decay is None:
        return None
    log_decay = linear.log_decay.to(dtype)
    if log_decay.dim() == 1 and not any(length % cut.size for length in linear.lengths):
        return log_decay[None, :, None, None].expand(1, -1, cut.size, 1)
    if log_decay.dim() < 3:
        log_decay = log_decay.expand(linear.v.shape[:2])[..., None]
    return cut.split(log_decay)


def _within(products: Tensor, between: Tensor | None) -> Tensor:
    """Products of rows i and columns j with the decay between them, 0 above the diagonal."""
    return products.tril() if between is None else products * between


def _walk(added: Tensor, kept: Tensor | None, state: Tensor, cut: Layout) -> tuple[Tensor, Tensor]:
    """States before each chunk [chunks, Hv, Dk, Dv] and after the last: S' = kept S + added."""
    before, done = [], []
    for own, keep in zip(added.split(list(cut.counts)), _steps(kept, cut), strict=True):
        state, finished = state[: len(own)], state[len(own) :]
        done.append(finished)
        before.append(state)
        state = own + (state if keep is None else keep * state)
    done.append(state)
    return torch.cat(before) if before else added, torch.cat(done[::-1])


def _walk_delta(
    u: Tensor, w: Tensor, k_until: Tensor, kept: Tensor | None, state: Tensor, cut: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_walk`, and Z [chunks, Hv, C, Dv]: Z = u - w S, S' = kept S + k_until^T Z."""
    before, written, done = [], [], []
    steps = (_steps(x, cut) for x in (u, w, k_until.mT, kept))
    for own, reader, keys, keep in zip(*steps, strict=True):
        state, finished = state[: len(own)], state[len(own) :]
        done.append(finished)
        before.append(state)
        rows = own - reader @ state
        written.append(rows)
        state = keys @ rows + (state if keep is None else keep * state)
    done.append(state)
    z = torch.cat(written) if written else u
    return torch.cat(before) if before else state[:0], z, torch.cat(done[::-1])


def _steps(x: Tensor | None, cut: Layout) -> tuple[Tensor | None, ...]:
    """The chunks of each step; as views of one split, whose gradients are joined once."""
    return (None,) * len(cut.counts) if x is None else x.split(list(cut.counts))
