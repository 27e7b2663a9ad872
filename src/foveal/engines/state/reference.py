"""The definition, written for reading: one token after the other.  Any device, differentiable."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from foveal.engines.state.problem import ScanProblem
from foveal.rules.base import Parts, Recurrence, Rule, Token


def refuses(problem: ScanProblem, rule: Rule) -> str | None:
    return None


def scan(
    problem: ScanProblem, rule: Rule, plain: Recurrence, initial: Parts | None
) -> tuple[Tensor, Parts]:
    """o [T, Hv, Dv] in the dtype of v and the final state, all arithmetic in that of the state."""
    return scan_in(problem.state_dtype, rule, plain, initial)


def scan_in(
    dtype: torch.dtype, rule: Rule, plain: Recurrence, initial: Parts | None
) -> tuple[Tensor, Parts]:
    """As `scan` with all arithmetic in `dtype`."""
    groups = plain.v.shape[1] // plain.q.shape[1]
    q = (plain.q.to(dtype) * plain.scale).repeat_interleave(groups, dim=1)
    k = plain.k.to(dtype).repeat_interleave(groups, dim=1)
    v = plain.v.to(dtype)
    heads, value_dim = v.shape[1:]
    log_decay = _per_token(plain.log_decay, v).to(dtype)
    gate = None if plain.write_gate is None else plain.write_gate.to(dtype)[..., None]
    first = rule.fresh(len(plain.lengths), heads, q.shape[-1], value_dim, v)
    if initial is not None:
        first = tuple(part.to(dtype) for part in initial)

    # One split for all tokens: the gradient of a slice is as large as the whole.
    none = (None,) * len(v)
    gates = none if gate is None else gate.split(1)
    momenta: tuple[Tensor | None, ...] = none
    if plain.log_momentum is not None:
        momenta = _per_token(plain.log_momentum, v).to(dtype).split(1)
    tokens_of = (x.split(1) for x in (q, k, v, log_decay))
    parts = zip(*tokens_of, gates, momenta, strict=True)
    tokens = itertools.starmap(Token, parts)
    outputs: list[Tensor] = []
    finals: list[Parts] = []
    for number, length in enumerate(plain.lengths):
        state = tuple(part[number : number + 1] for part in first)
        for token in itertools.islice(tokens, length):
            state, o = rule.step(state, token)
            outputs.append(o)
        finals.append(state)
    o = torch.cat(outputs) if outputs else v
    if not finals:
        return o.to(plain.v.dtype), first
    return o.to(plain.v.dtype), tuple(torch.cat(parts) for parts in zip(*finals, strict=True))


def _per_token(log_decay: Tensor | None, v: Tensor) -> Tensor:
    """[T, Hv, 1 or Dk]"""
    if log_decay is None:
        return v.new_zeros(*v.shape[:2], 1)
    if log_decay.dim() == 3:
        return log_decay
    return log_decay.expand(v.shape[:2])[..., None]
