"""The state engine's verbs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from foveal._arguments import finite, need_tensors
from foveal._autocast import in_own_dtypes
from foveal._capture import as_one
from foveal._errors import RuleError, ShapeError
from foveal._host import on_host
from foveal._operators_verbs import Body, as_operator
from foveal._scan_plan import choose_scan
from foveal.engines.state.problem import describe_scan
from foveal.rules.additive import Additive
from foveal.rules.base import Parts, Recurrence, Rule

State = Tensor | tuple[Tensor, ...]
"""[N, Hv, Dk, Dv] in float32 (float64 for float64 inputs), or the parts that the rule lists."""


@overload
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule = ...,
    *,
    log_decay: Tensor | None = ...,
    write_gate: Tensor | None = ...,
    log_momentum: Tensor | None = ...,
    scale: float | None = ...,
    initial_state: State | None = ...,
    return_state: Literal[False] = ...,
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    implementation: str | None = ...,
) -> Tensor: ...
@overload
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule = ...,
    *,
    log_decay: Tensor | None = ...,
    write_gate: Tensor | None = ...,
    log_momentum: Tensor | None = ...,
    scale: float | None = ...,
    initial_state: State | None = ...,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    implementation: str | None = ...,
) -> tuple[Tensor, State]: ...
@on_host
@in_own_dtypes
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule = Additive(),
    *,
    log_decay: Tensor | None = None,
    write_gate: Tensor | None = None,
    log_momentum: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    """o_t = scale S_t^T q_t with a state S that `rule` changes with every token.

    Shapes: q and k [B, L, H, Dk], v [B, L, Hv, Dv]; H divides Hv and value head h reads with head
    h // (Hv / H).  log_decay, the natural log (at most 0) of the factor on the state: [Hv] fixed,
    [B, L, Hv] per token, or [B, L, Hv, Dk] per channel; write_gate [B, L, Hv], the factor on what is
    written; log_momentum [Hv] or [B, L, Hv], for `TwoState` only.
    Returns o [B, L, Hv, Dv] in the dtype of v and, with `return_state`, the final state [N, Hv, Dk, Dv]
    in float32 (float64 for float64 inputs), a tuple where the rule has more parts.
    Options: scale None is Dk^-1/2; initial_state like the final one, zeros by default; cu_seqlens
    int32 [N + 1], with B = 1, packs N sequences one behind the other, else N = B; reverse walks from
    the last token to the first; implementation names one of "triton", "chunk", "reference", which then
    runs or raises RefusedError; None lets the plan choose.
    Gradients flow to q, k, v, all gates and the initial state, from o and the final state.
    Cost: about 4 (C + Dk) Dv + 4 C Dk FLOPs per token and head in chunks of C tokens.
    Limits: log_decay must be finite; a gate of 0 and one of -60 may follow each other.  Raises a
    subclass of foveal.errors.FovealError on bad input.
    Transforms: one operator under torch.compile, under torch.export and for fake tensors, for sizes that
    stay open; its backward runs the forward again.  On a CPU torch.func reads through the chunk form.
    Autocast stops here: the call computes in the dtypes of its tensors.
    Equals: any cut of a sequence in two calls that pass the state; `scan_step` token by token.
    """
    if scale is not None and not finite(scale):
        raise RuleError("scale", scale, "a finite number is needed")
    initial = parts_of(initial_state)
    scale = None if scale is None else float(scale)
    options = (scale, initial, cu_seqlens, reverse, implementation)
    run = partial(as_operator, "scan") if as_one(q) else _scan
    o, *parts = run(q, k, v, rule, log_decay, write_gate, log_momentum, *options)
    return (o, _state(tuple(parts))) if return_state else o


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    log_momentum: Tensor | None,
    scale: float | None,
    initial: Parts | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    implementation: str | None,
) -> tuple[Tensor, ...]:
    """o and the parts of the final state."""
    problem = describe_scan(q, k, v, rule, log_decay, write_gate, initial, cu_seqlens, log_momentum)
    plan = choose_scan(problem, rule, implementation)
    plain = Recurrence(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        _flat(log_decay),
        None if write_gate is None else write_gate.flatten(0, 1),
        None,
        q.shape[-1] ** -0.5 if scale is None else scale,
        False,
        problem.lengths,
        _flat(log_momentum),
    )
    if reverse:
        plain, initial = _turned(plain), _flipped(initial)
    o, state = plan.module.scan(problem, rule, plain, initial)
    if reverse:
        o, state = o.flip(0), tuple(part.flip(0) for part in state)
    return o.unflatten(0, (problem.batch, problem.length)), *state


def _outline(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    log_momentum: Tensor | None,
    scale: float | None,
    initial: Parts | None,
    cu_seqlens: Tensor | None,
    *options: object,
) -> tuple[Tensor, ...]:
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shapes = rule.part_shapes(q.shape[3], v.shape[3]).values()
    state = (v.new_empty((count, v.shape[2], *shape), dtype=dtype) for shape in shapes)
    return v.new_empty(v.shape), *state


OPERATOR = Body(_scan, _outline)


def scan_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    state: State | None,
    *,
    log_decay: Tensor | None = None,
    write_gate: Tensor | None = None,
    log_momentum: Tensor | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, State]:
    """`scan` of one token: o [B, 1, Hv, Dv] and the state after it.

    Shapes: q and k [B, 1, H, Dk], v [B, 1, Hv, Dv], state as `scan` returns it or None for a fresh
    one; gates as for `scan`, of one token.
    Cost: reads and writes the state once, 8 Dk Dv bytes per value head in float32.
    Equals: `scan` on a sequence of one token.
    """
    need_tensors(q=q)
    if q.dim() == 4 and q.shape[1] != 1:
        raise ShapeError("q", list(q.shape), "one token, [B, 1, H, Dk], is needed")
    return scan(
        q,
        k,
        v,
        rule,
        log_decay=log_decay,
        write_gate=write_gate,
        log_momentum=log_momentum,
        scale=scale,
        initial_state=state,
        return_state=True,
        implementation=implementation,
    )


def parts_of(state: State | None) -> Parts | None:
    """The parts of a state as a tuple."""
    if state is None:
        return None
    parts = tuple(state) if isinstance(state, Sequence) else (state,)
    for part in parts:
        need_tensors(initial_state=part)
    return parts


def _state(parts: Parts) -> State:
    return parts[0] if len(parts) == 1 else parts


def _flat(gate: Tensor | None) -> Tensor | None:
    """Tokens of all sequences one behind the other; a gate [Hv] stays."""
    return gate if gate is None or gate.dim() == 1 else gate.flatten(0, 1)


def _turned(plain: Recurrence) -> Recurrence:
    """The tokens in reverse order, and with them the sequences."""

    def flip(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dim() == 1 else x.flip(0)

    return dataclasses.replace(
        plain,
        q=plain.q.flip(0),
        k=plain.k.flip(0),
        v=plain.v.flip(0),
        log_decay=flip(plain.log_decay),
        write_gate=flip(plain.write_gate),
        lengths=plain.lengths[::-1],
        log_momentum=flip(plain.log_momentum),
    )


def _flipped(initial: Parts | None) -> Parts | None:
    return None if initial is None else tuple(part.flip(0) for part in initial)
