"""Patterns that fall apart into independent sub-problems, solved one kind after another.

Dilation classes, residues, axes, pieces, documents: the tokens of each are gathered, stacked on the
batch axis and handed to an implementation that knows nothing of where they came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from foveal._kept import kept
from foveal._problem import Problem
from foveal._recent import Recent
from foveal.engines.tile.replay import Replay
from foveal.patterns.base import Extent, Part, Pattern
from foveal.scores.base import Geometry
from foveal.scores.bias import KeyBias
from foveal.scores.normal import NormalForm


@dataclass(frozen=True)
class Task:
    """What to compute: P sub-problems of one pattern, and where their tokens stand in the whole.

    `geometry` is that of the whole, where additive terms are evaluated.
    whole: every token of the problem, in its order, or terms that are given on the own tokens alone.
    """

    pattern: Pattern
    extent: Extent
    q_tokens: Tensor  # [P, Lq]
    k_tokens: Tensor  # [P, Lk]
    score: NormalForm
    geometry: Geometry
    with_lse: bool
    whole: bool = False


# o [N, Lq, Hq, Dv] and lse [N, Lq, Hq], if the task asks for it, of q, k, v with N = batch x P.
Solver = Callable[[Task, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def whole_task(
    problem: Problem, pattern: Pattern, score: NormalForm, geometry: Geometry, device: torch.device
) -> Task:
    """The problem as one task of one sub-problem."""
    extent = problem.extent
    q_tokens = torch.arange(extent.Lq, device=device)[None]
    k_tokens = torch.arange(extent.Lk, device=device)[None]
    return Task(pattern, extent, q_tokens, k_tokens, score, geometry, problem.return_lse)


def solve(
    task: Task, q: Tensor, k: Tensor, v: Tensor, solver: Solver
) -> tuple[Tensor, Tensor | None]:
    """Runs `solver` on every part of the task's pattern and puts the results in place."""
    static = not task.pattern.depends_on_data
    pattern, parts = (_kept_parts if static else _parts)(task.pattern, task.extent)
    if not parts:
        whole = Task(
            pattern,
            task.extent,
            task.q_tokens,
            task.k_tokens,
            task.score,
            task.geometry,
            task.with_lse,
        )
        return solver(whole, q, k, v)
    outputs, lses, order = [], [], []
    for part in parts:
        count = len(part.q_tokens)
        q_index, k_index = part.q_tokens.to(q.device), part.k_tokens.to(q.device)
        inner = Task(
            part.pattern,
            part.extent,
            task.q_tokens[:, q_index].flatten(0, 1),
            task.k_tokens[:, k_index].flatten(0, 1),
            task.score,
            task.geometry,
            task.with_lse,
        )
        q_part, k_part, v_part = (
            x[:, index].flatten(0, 1) for x, index in ((q, q_index), (k, k_index), (v, k_index))
        )
        o, lse = solve(inner, q_part, k_part, v_part, solver)
        outputs.append(o.unflatten(0, (-1, count)).flatten(1, 2))
        if lse is not None:
            lses.append(lse.unflatten(0, (-1, count)).flatten(1, 2))
        order.append(q_index.flatten())
    back = torch.argsort(torch.cat(order))
    lse = torch.cat(lses, dim=1)[:, back] if task.with_lse else None
    return torch.cat(outputs, dim=1)[:, back], lse


def _parts(pattern: Pattern, extent: Extent) -> tuple[Pattern, Sequence[Part] | None]:
    """The simplified pattern, and what it falls apart into."""
    pattern = pattern.simplify(extent)
    return pattern, pattern.parts(extent)


_kept_parts = kept(16)(_parts)


@dataclass(frozen=True)
class Share:
    """P sub-problems of one pattern among which no other falls apart further.

    q_tokens [P, Lq] and k_tokens [P, Lk] name their tokens in the problem; whole: all, in order.
    """

    pattern: Pattern
    extent: Extent
    q_tokens: Tensor
    k_tokens: Tensor
    whole: bool


@dataclass(frozen=True)
class Division:
    """A pattern as the shares that are solved one after another.

    keys_once: every key belongs to exactly one of them; every query does.
    replays: of the launches that solve it.
    """

    shares: tuple[Share, ...]
    keys_once: bool
    replays: Recent[Replay | int] = dataclasses.field(default_factory=lambda: Recent(32))

    def tasks(self, score: NormalForm, geometry: Geometry, with_lse: bool) -> tuple[Task, ...]:
        return tuple(
            Task(s.pattern, s.extent, s.q_tokens, s.k_tokens, score, geometry, with_lse, s.whole)
            for s in self.shares
        )


def divide(pattern: Pattern, extent: Extent, device: torch.device) -> Division:
    """The shares of a pattern, their tokens on the device."""
    q_tokens, k_tokens = torch.arange(extent.Lq)[None], torch.arange(extent.Lk)[None]
    shares = tuple(_shares(pattern, extent, q_tokens, k_tokens, True))
    seen = torch.cat([share.k_tokens.flatten() for share in shares])
    keys_once = bool((torch.bincount(seen, minlength=extent.Lk) == 1).all())
    placed = (
        dataclasses.replace(s, q_tokens=s.q_tokens.to(device), k_tokens=s.k_tokens.to(device))
        for s in shares
    )
    return Division(tuple(placed), keys_once)


def _shares(
    pattern: Pattern, extent: Extent, q_tokens: Tensor, k_tokens: Tensor, whole: bool
) -> Iterator[Share]:
    pattern = pattern.simplify(extent)
    parts = pattern.parts(extent)
    if not parts:
        yield Share(pattern, extent, q_tokens, k_tokens, whole)
        return
    for part in parts:
        q_own, k_own = part.q_tokens.to(q_tokens.device), part.k_tokens.to(k_tokens.device)
        inner = q_tokens[:, q_own].flatten(0, 1), k_tokens[:, k_own].flatten(0, 1)
        yield from _shares(part.pattern, part.extent, *inner, False)


class Kernels(Protocol):
    """An implementation that gives its gradients itself, in the layout of a task: N = batch x P."""

    @property
    def LSE_UNIT(self) -> float:
        """lse = LSE_UNIT x the statistic that the forward keeps for the backward."""

    def forward(self, task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """o [N, Lq, Hq, Dv] and the statistic [N, Hq, Lq] of q [N, Lq, Hq, D], k and v [N, Lk, Hkv, .]."""

    def backward(
        self,
        task: Task,
        tensors: tuple[Tensor, ...],
        do: Tensor,
        dlse: Tensor,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the parameters of the score, where `needed`.

        tensors: q, k, v, o and the statistic; dlse [N, Hq, Lq] is the gradient of the natural lse.
        """


def local_bias(score: NormalForm, needed: Sequence[bool]) -> bool:
    """Whether all that the score adds is one bias per key, and none of its tensors needs a gradient."""
    return len(score.terms) == 1 and isinstance(score.terms[0], KeyBias) and not any(needed)


def with_local_bias(task: Task, batch: int) -> Task:
    """The task with the bias of its own keys, taken as keys are: by a launch that can be repeated."""
    bias = task.score.terms[0].parameter
    (own,) = take((bias.detach().expand(batch, -1, -1),), task.k_tokens)
    score = dataclasses.replace(task.score, terms=(KeyBias(own),))
    return dataclasses.replace(task, score=score, whole=True)


def run_forward(
    kernels: Kernels, tasks: tuple[Task, ...], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and the statistic [B, Hq, Lq]."""
    if tasks[0].whole:
        return kernels.forward(tasks[0], q, k, v)
    o = q.new_empty(*q.shape[:3], v.shape[3])
    statistic = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    for task in tasks:
        (q_own,) = take((q,), task.q_tokens)
        k_own, v_own = take((k, v), task.k_tokens)
        if local_bias(task.score, ()):
            task = with_local_bias(task, len(q))
        put((o, statistic), task.q_tokens, kernels.forward(task, q_own, k_own, v_own))
    return o, statistic


def run_backward(
    kernels: Kernels,
    tasks: tuple[Task, ...],
    keys_once: bool,
    tensors: tuple[Tensor, ...],
    do: Tensor,
    dlse: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients as of `Kernels.backward`, of tensors on all tokens."""
    if tasks[0].whole:
        return kernels.backward(tasks[0], tensors, do, dlse, needed)
    q, k, v, o, statistic = tensors
    found: list[Tensor | None] = [None] * len(needed)
    if needed[0]:
        found[0] = torch.empty_like(q, memory_format=torch.contiguous_format)
    for index, x in ((1, k), (2, v)):
        if needed[index]:
            make = torch.empty_like if keys_once else torch.zeros_like
            found[index] = make(x, memory_format=torch.contiguous_format)
    for task in tasks:
        q_own, do_own, o_own, own, d_own = take((q, do, o, statistic, dlse), task.q_tokens)
        k_own, v_own = take((k, v), task.k_tokens)
        if local_bias(task.score, needed[3:]):
            task = with_local_bias(task, len(q))
        parts = kernels.backward(task, (q_own, k_own, v_own, o_own, own), do_own, d_own, needed)
        _keep_own(found, parts, task, keys_once)
    return tuple(found)


def _keep_own(
    found: list[Tensor | None], parts: tuple[Tensor | None, ...], task: Task, keys_once: bool
) -> None:
    """Puts the gradients of a task in their places; those of parameters are summed."""
    if found[0] is not None and parts[0] is not None:
        put((found[0],), task.q_tokens, (parts[0],))
    pairs = zip(found[1:3], parts[1:3], strict=True)
    keys = [(total, part) for total, part in pairs if total is not None and part is not None]
    if keys and keys_once:
        put([total for total, _ in keys], task.k_tokens, [part for _, part in keys])
    elif keys:
        for total, part in keys:
            add(total, task.k_tokens, part)
    for index, gradient in enumerate(parts[3:], start=3):
        before = found[index]
        if gradient is not None:
            found[index] = gradient if before is None else before + gradient


def take(tensors: Sequence[Tensor], tokens: Tensor) -> list[Tensor]:
    """Of each x [B, tokens, H, D], [B P, L, H, D] at tokens [P, L]; of x [B, H, tokens], [B P, H, L]."""
    if tensors[0].is_cuda:
        from foveal.engines.tile import gather

        return gather.take(tensors, tokens)
    return [
        _taken(x, tokens)
        if x.dim() == 4
        else _taken(x.transpose(1, 2), tokens).transpose(1, 2).contiguous()
        for x in tensors
    ]


def _taken(x: Tensor, tokens: Tensor) -> Tensor:
    """[B P, L, ...] of x [B, tokens, ...] at tokens [P, L]"""
    taken: Tensor = x.index_select(1, tokens.flatten()).unflatten(1, tokens.shape)
    return taken.flatten(0, 1)


def put(wholes: Sequence[Tensor], tokens: Tensor, own: Sequence[Tensor]) -> None:
    """The reverse of `take`: writes tensors `own` to the tokens of `wholes`."""
    if own[0].is_cuda:
        from foveal.engines.tile import gather

        gather.put(wholes, tokens, own)
        return
    for whole, part in zip(wholes, own, strict=True):
        if part.dim() == 3:
            whole, part = whole.transpose(1, 2), part.transpose(1, 2)
        whole.index_copy_(1, tokens.flatten(), part.unflatten(0, (-1, len(tokens))).flatten(1, 2))


def add(total: Tensor, tokens: Tensor, own: Tensor) -> None:
    """total[:, tokens] += own [B P, L, ...], in a fixed order even where a token occurs twice."""
    own = own.unflatten(0, (-1, len(tokens))).flatten(1, 2)
    every = torch.arange(len(total), device=total.device)[:, None]
    total.index_put_((every, tokens.flatten()[None]), own, accumulate=True)
