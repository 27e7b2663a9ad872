"""The chunk form in products of matrices, on any device: time and memory are linear in the length.

With S the state before a chunk, G_i the sum of the log decays of the chunk up to token i,
A_ij = b_i sum_d k_id k_jd exp(G_id - G_jd) for i > j, P_ij = scale sum_d q_id k_jd exp(G_id - G_jd)
for i >= j:   Z = (I + A)^-1 (b V - b (exp(G) K) S),   O = scale (exp(G) Q) S + P Z,
S' = Diag(exp(G_C)) S + (exp(G_C - G) K)^T Z.  An additive rule has A = 0 and no second term in Z.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._capture import traced
from foveal.engines.state.cpu import scan_segments
from foveal.engines.state.layout import Layout, layout
from foveal.engines.state.levels import NOTHING, Faded, faded
from foveal.engines.state.problem import ScanProblem
from foveal.engines.state.segments import CHUNK, LONG
from foveal.rules.base import Parts, Recurrence, Rule, divided

_SEGMENT = 2**16
"""Elements of the values that are worked on at a time: more than this leaves the caches."""
_ALONE = 2**15
"""Elements of the values of a head from which additive rules take a CPU's heads one after the other."""


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


def run(linear: Recurrence, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """o [T, Hv, Dv] and the final state [N, Hv, Dk, Dv], both in the precision of the state."""
    if chunk == CHUNK and _on_cpu_alone(linear):
        return scan_segments(linear, lambda part: _run_divided(part, chunk))
    if linear.divisor is not None:
        return divided(linear, lambda wide: run(wide, chunk))
    heads = linear.v.shape[1]
    alone = heads > 1 and linear.v.numel() >= heads * _ALONE and linear.v.device.type == "cpu"
    if alone and not linear.delta:
        found = [run(one, chunk) for one in _heads(linear)]
        return torch.cat([o for o, _ in found], 1), torch.cat([state for _, state in found], 1)
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


def _on_cpu_alone(linear: Recurrence) -> bool:
    """Whether no gradients are asked for, on a CPU, of sequences that are long enough for `scan_segments`."""
    inputs = (linear.q, linear.k, linear.v, linear.log_decay, linear.write_gate, linear.initial)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return False
    if linear.v.device.type != "cpu" or traced():
        return False
    return len(linear.v) >= LONG * max(len(linear.lengths), 1)


def _heads(linear: Recurrence) -> Iterator[Recurrence]:
    """The recurrence of each value head: its chunks lie in memory as products want them."""
    heads = linear.v.shape[1]
    groups = heads // linear.q.shape[1]
    parts: dict[str, Any] = {}
    for name in ("q", "k", "v", "log_decay", "write_gate", "initial"):
        x = getattr(linear, name)
        if x is not None:
            parts[name] = x.split(1, dim=min(x.dim() - 1, 1))
    for name in ("q", "k"):
        parts[name] = tuple(part for part in parts[name] for _ in range(groups))
    for head in range(heads):
        yield dataclasses.replace(linear, **{name: part[head] for name, part in parts.items()})


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


def _run_divided(linear: Recurrence, chunk: int) -> tuple[Tensor, Tensor]:
    if linear.divisor is None:
        return _run(linear, chunk)
    return divided(linear, lambda wide: _run(wide, chunk))


def _run(linear: Recurrence, chunk: int) -> tuple[Tensor, Tensor]:
    dtype = linear.state_dtype
    cut = layout(linear.lengths, chunk)
    groups = linear.v.shape[1] // linear.q.shape[1]
    q, k, v = (cut.split(x.to(dtype)) for x in (linear.q, linear.k, linear.v))
    q, k = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (q, k))
    gate = None
    if linear.write_gate is not None:
        gate = cut.split(linear.write_gate.to(dtype)[..., None])
    initial = linear.initial
    if initial is None:
        initial = v.new_zeros(len(linear.lengths), v.shape[1], k.shape[-1], v.shape[-1])
    first = cut.sorted(initial.to(dtype))
    gates = _gates(linear, cut, dtype)
    at = faded(q, k, gates, linear.scale, linear.delta)
    if linear.delta:
        before, z, last = _walk_delta(at, k, v, gate, first, cut)
    else:
        z = v if gate is None else v * gate
        added = at.k_until.mT @ z
        even = cut.tokens is None and len(cut.counts) > 1
        if even and (gates is None or gates.shape[-1] == 1):
            before, last = _walk_at_once(added, gates, first, len(cut.counts))
        else:
            before, last = _walk(added, at.kept, first, cut)
    o = at.q_pairs @ z
    if len(before):
        o = torch.baddbmm(o.flatten(0, 1), at.q_since.flatten(0, 1), before.flatten(0, 1)).view_as(
            o
        )
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


def _walk_at_once(
    added: Tensor, gates: Tensor | None, state: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """As `_walk`, of equally long sequences with one decay per token: a product with all decays."""
    count, heads = state.shape[:2]
    whole = state.new_zeros(steps, count, heads, dtype=torch.float64)
    if gates is not None:
        gates = gates.double().clamp(min=NOTHING).sum((-2, -1))
        whole = whole + gates.unflatten(0, (-1, count if len(gates) > 1 else 1))
    sums = F.pad(whole.movedim(0, -1).cumsum(-1), (1, 0))
    shares = (sums[..., None] - sums[..., None, :]).tril().exp().tril().to(added.dtype)
    parts = torch.cat([state[None], added.unflatten(0, (steps, -1))]).flatten(3).movedim(0, -2)
    states = (shares @ parts).movedim(-2, 0).unflatten(-1, added.shape[-2:])
    return states[:-1].flatten(0, 1), states[-1]


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
    at: Faded, k: Tensor, v: Tensor, gate: Tensor | None, state: Tensor, cut: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_walk`, and Z [chunks, Hv, C, Dv] = u - w S, where u and w solve for the writes of a chunk."""
    assert at.k_pairs is not None
    size = k.shape[-2]
    eye = torch.eye(size, dtype=k.dtype, device=k.device).expand(at.k_pairs.shape)
    lower = at.k_pairs if gate is None else at.k_pairs * gate
    solve = torch.linalg.solve_triangular(lower.mT, eye, upper=True, unitriangular=True).mT
    solve = solve if gate is None else solve * gate.mT
    u, w = solve @ v, solve @ at.k_since
    before, written, done = [], [], []
    steps = (_steps(x, cut) for x in (u, w, at.k_until.mT, at.kept))
    for own, reader, keys, keep in zip(*steps, strict=True):
        state, finished = state[: len(own)], state[len(own) :]
        done.append(finished)
        before.append(state)
        rows = torch.baddbmm(own.flatten(0, 1), reader.flatten(0, 1), state.flatten(0, 1), alpha=-1)
        written.append(rows.view_as(own))
        state = state if keep is None else keep * state
        state = torch.baddbmm(state.flatten(0, 1), keys.flatten(0, 1), rows).view_as(state)
    done.append(state)
    z = torch.cat(written) if written else u
    return torch.cat(before) if before else state[:0], z, torch.cat(done[::-1])


def _steps(x: Tensor | None, cut: Layout) -> tuple[Tensor | None, ...]:
    """The chunks of each step; as views of one split, whose gradients are joined once."""
    return (None,) * len(cut.counts) if x is None else x.split(list(cut.counts))
