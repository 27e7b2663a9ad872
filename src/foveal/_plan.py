"""Which implementation runs a problem, why the others do not, and what is kept between calls."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from foveal._capture import capturing
from foveal._errors import (
    DeviceError,
    DtypeError,
    PatternError,
    RefusedError,
    ScoreError,
    UnknownNameError,
)
from foveal._families import TILE_IMPLEMENTATIONS, family
from foveal._kept import lasting
from foveal._packing import document_ends
from foveal._problem import Problem, describe
from foveal._recent import Recent
from foveal.engines.tile.parts import Division, Kernels, divide
from foveal.engines.tile.recorded import KernelRun, RepeatedRun, Run
from foveal.patterns.base import Pattern
from foveal.patterns.blocks import Blocks
from foveal.patterns.documents import pack
from foveal.scores.base import Form, Geometry, Score
from foveal.scores.normal import NormalForm

__all__ = ["TILE_IMPLEMENTATIONS", "Plan", "Prepared", "choose", "decide", "prepare"]

# Of the tile engine, those that give their gradients themselves; PyTorch differentiates the others.
KERNELS = ("hopper", "triton")


@dataclass(frozen=True)
class Plan:
    """What will run: `implementation`, the simplified `pattern`, and a sentence per refusal."""

    implementation: str
    pattern: Pattern
    refusals: tuple[tuple[str, str], ...]


def choose(
    problem: Problem, pattern: Pattern, score: Form, implementation: str | None = None
) -> Plan:
    """The first implementation that does not refuse; a named one runs or raises RefusedError."""
    pattern = pattern.simplify(problem.extent)
    implementations = family(score.engine).implementations
    if implementation is not None:
        if implementation not in implementations:
            raise UnknownNameError("implementation", implementation, tuple(implementations))
        reason = implementations[implementation].refuses(problem, pattern, score)
        if reason is not None:
            raise RefusedError(implementation, reason)
        return Plan(implementation, pattern, ())
    refusals: list[tuple[str, str]] = []
    for name, module in implementations.items():
        reason = module.refuses(problem, pattern, score)
        if reason is None and hasattr(module, "caveat"):
            reason = module.caveat(problem, pattern, score)
        if reason is None:
            return Plan(name, pattern, tuple(refusals))
        refusals.append((name, reason))
    raise RefusedError(*refusals[-1])


def decide(
    problem: Problem,
    device: torch.device,
    pattern: Pattern,
    score: Score,
    cu_seqlens: Tensor | None,
    implementation: str | None,
) -> tuple[Plan, Form, Geometry]:
    """Checks a call and chooses what runs it."""
    if not isinstance(pattern, Pattern):
        raise PatternError("pattern", type(pattern), "a pattern such as fv.Causal() is needed")
    if not isinstance(score, Score):
        raise ScoreError("score", type(score), "a score such as fv.Softmax() is needed")
    if cu_seqlens is not None:
        pattern = pack(pattern, cu_seqlens, problem.extent)
    else:
        pattern.validate(problem.extent)
    pattern.validate_lists(problem.batch, problem.q_heads, problem.kv_heads)
    geometry = Geometry(pattern, problem.extent, problem.batch, problem.q_heads, problem.kv_heads)
    form = family(score.engine).form(score, problem.head_dim, geometry)
    _check_parameters(form, device)
    return choose(problem, pattern, form, implementation), form, geometry


def _check_parameters(form: Form, device: torch.device) -> None:
    """Raises DtypeError or DeviceError for a parameter that cannot be computed with."""
    for name, tensor in zip(form.names, form.parameters, strict=False):
        if not tensor.is_floating_point():
            raise DtypeError(name, tensor.dtype, "a floating dtype is needed")
        if tensor.device != device:
            raise DeviceError(name, tensor.device, f"the device of q, {device}, is needed")


@dataclass(frozen=True)
class Prepared:
    """What is found once per kind of call; it holds no tensor that a call or a score holds.

    `engine` is the family that runs it; `plain` is the form of a score without tensors; `division` is there
    for those in KERNELS.
    """

    problem: Problem
    plan: Plan
    engine: str
    geometry: Geometry
    plain: Form | None
    division: Division | None

    @property
    def module(self) -> ModuleType:
        """What runs it."""
        return family(self.engine).implementations[self.plan.implementation]

    def form(self, score: Score) -> Form:
        if self.plain is not None:
            return self.plain
        return family(score.engine).collect(score, self.problem.head_dim)

    def run(self, form: Form) -> Run:
        """The call without its tensors, as one step of autograd."""
        return self._plain_run if form is self.plain else self._run(form)

    @functools.cached_property
    def _plain_run(self) -> Run:
        assert self.plain is not None
        return self._run(self.plain)

    def _run(self, form: Form) -> Run:
        name, module = self.plan.implementation, self.module
        if self.division is None:
            return RepeatedRun(name, module, self.problem, self.plan.pattern, form, self.geometry)
        kernels, with_lse = cast(Kernels, module), self.problem.return_lse
        plain = cast(NormalForm, form)
        return KernelRun(name, kernels, self.division, plain, self.geometry, with_lse)


# Lists found from data live as long as their entry: fewer of them, each with the writes it has seen.
_STATIC: Recent[Prepared] = Recent(128)
_LISTED: Recent[tuple[tuple[int, ...], Prepared]] = Recent(8)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    score: Score,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    implementation: str | None,
) -> Prepared:
    """Everything that is decided before a kernel runs, found once per kind of call."""
    call = q, k, v, pattern, score, cu_seqlens, return_lse, implementation
    if not isinstance(pattern, Pattern) or not isinstance(score, Score):
        return _prepare(*call)
    ends = None if cu_seqlens is None else document_ends(cu_seqlens)
    key = (
        *(pattern, ends, _kind(score), return_lse, implementation),
        *(q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device),
    )
    if pattern.depends_on_data:
        return _prepare_listed(key, call)
    kept = _STATIC.get(key)
    if kept is None:
        kept = _prepare(*call)
        _STATIC.put(key, kept)
    return kept


def _prepare_listed(key: Hashable, call: _Call) -> Prepared:
    """As kept, if the lists were not written to since; a graph under capture takes them as they are."""
    kept = _LISTED.get(key)
    writes = _writes(call[3])
    if kept is not None and (kept[0] == writes or capturing(call[0])):
        return kept[1]
    prepared = _prepare(*call)
    if writes is not None:
        _LISTED.put(key, (writes, prepared))
    return prepared


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    score: Score,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    implementation: str | None,
) -> Prepared:
    problem = describe(q, k, v, return_lse)
    plan, form, geometry = decide(problem, q.device, pattern, score, cu_seqlens, implementation)
    division = None
    if form.engine == "tile" and plan.implementation in KERNELS:
        # It is kept, and may serve a training call next; lists of torch.func's are its own.
        listed = plan.pattern.depends_on_data
        with torch.inference_mode(False) if listed else lasting():
            division = divide(plan.pattern, problem.extent, q.device)
    plain = None if form.parameters else form
    return Prepared(problem, plan, form.engine, geometry, plain, division)


_Call = tuple[Tensor, Tensor, Tensor, Pattern, Score, Tensor | None, bool, str | None]


def _writes(pattern: Pattern) -> tuple[int, ...] | None:
    """Counts the writes to the lists of a pattern; None where they are not counted."""
    if not pattern.depends_on_data:
        return ()
    if isinstance(pattern, Blocks):
        indices = pattern.selection.indices
        return None if indices.is_inference() else (indices._version,)
    counts: tuple[int, ...] = ()
    for member in getattr(pattern, "members", ()):
        own = _writes(member)
        if own is None:
            return None
        counts += own
    return counts or None


def _kind(value: object) -> Hashable:
    """What a plan may depend on in a score: all but the values in its tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, tuple):
        return tuple(_kind(member) for member in value)
    if isinstance(value, Score):
        fields = getattr(type(value), "__match_args__", None)
        if fields is not None:
            return type(value), *(_kind(getattr(value, name)) for name in fields)
    return value
