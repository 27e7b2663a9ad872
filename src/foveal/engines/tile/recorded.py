"""A call as one step of autograd: for kernels that give their gradients themselves, and for transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from foveal._capture import capturing
from foveal._errors import RefusedError
from foveal._kept import kept
from foveal._problem import Problem
from foveal._recent import Recent
from foveal.engines.common.current import on
from foveal.engines.tile.parts import (
    Division,
    Kernels,
    Task,
    local_bias,
    run_backward,
    run_forward,
)
from foveal.engines.tile.replay import Replay, Results, replayed
from foveal.patterns.base import Pattern
from foveal.scores.base import Form, Geometry
from foveal.scores.normal import NormalForm
from foveal.tuning import tile as tuning


class Run(Protocol):
    """A call without its tensors: what autograd, transforms and operators need to know of it."""

    @property
    def name(self) -> str:
        """Of the implementation."""

    @property
    def lse_unit(self) -> float:
        """lse = lse_unit x the statistic that the forward keeps for the backward."""

    @property
    def with_lse(self) -> bool:
        """Whether gradients flow through the statistic."""

    @property
    def one_by_one(self) -> bool:
        """Whether entries of a vmap run one after another: their tensors belong to one batch."""

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """o [B, Lq, Hq, Dv] and the statistic [B, Hq, Lq] of q, k, v and the score's parameters."""

    def backward(
        self,
        tensors: Sequence[Tensor],
        results: tuple[Tensor, Tensor],
        d_results: tuple[Tensor, Tensor],
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors of the forward, at least where `needed`."""


@dataclass(frozen=True)
class KernelRun:
    """Kernels on the shares of a pattern."""

    name: str
    kernels: Kernels
    division: Division
    form: NormalForm
    geometry: Geometry
    with_lse: bool

    @property
    def lse_unit(self) -> float:
        return self.kernels.LSE_UNIT

    @property
    def one_by_one(self) -> bool:
        return bool(self.form.parameters) or self.geometry.pattern.depends_on_data

    @functools.cached_property
    def _plain_tasks(self) -> tuple[Task, ...]:
        return self.division.tasks(self.form, self.geometry, self.with_lse)

    def _tasks(self, parameters: Sequence[Tensor]) -> tuple[Task, ...]:
        if not parameters:
            return self._plain_tasks
        form = self.form.with_parameters(parameters)
        return self.division.tasks(form, self.geometry, self.with_lse)

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        o, statistic = self._launched("forward", tensors, (), lambda: self._forward(tensors))
        assert o is not None
        assert statistic is not None
        return o, statistic

    def backward(
        self,
        tensors: Sequence[Tensor],
        results: tuple[Tensor, Tensor],
        d_results: tuple[Tensor, Tensor],
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        do, dlse = d_results
        if self.with_lse and self.lse_unit != 1.0:
            # Here, as what is repeated may launch only.
            dlse = dlse / self.lse_unit
        every = (*tensors, *results, do, dlse)
        # The second decides on launches too.
        kind = (tuple(needed), torch.are_deterministic_algorithms_enabled())
        return self._launched(
            kind, every, needed, lambda: self._backward(tensors, results, (do, dlse), needed)
        )

    def _launched(
        self,
        kind: Hashable,
        tensors: Sequence[Tensor],
        needed: Sequence[bool],
        compute: Callable[[], Results],
    ) -> Results:
        device = tensors[0].device
        if device.type != "cuda" or tuning.measuring():
            return compute()
        with on(device):
            if self._computes(needed) or self._makes_lists(tensors[0]):
                return compute()
            return replayed(self.division.replays, kind, tensors, compute)

    def _computes(self, needed: Sequence[bool]) -> bool:
        """Whether there is more to do than launches, of a backward with what is `needed` or of a forward, ():
        sums over what several shares see, tensors of the score."""
        if self.division.shares[0].whole:
            return False
        if any(needed[1:3]) and not self.division.keys_once:
            return True
        return bool(self.form.parameters) and not local_bias(self.form, needed[3:])

    def _makes_lists(self, x: Tensor) -> bool:
        """Whether a graph under capture makes lists of its own, from data that may change."""
        return self.geometry.pattern.depends_on_data and capturing(x)

    def _kernels(self, x: Tensor, needed: Sequence[bool]) -> Kernels:
        repeats = x.device.type == "cuda" and self._computes(needed) and not tuning.measuring()
        if not repeats or self._makes_lists(x):
            return self.kernels
        return _Repeating(self.kernels, self.division.replays)

    def _forward(self, tensors: Sequence[Tensor]) -> Results:
        q, k, v, *parameters = tensors
        tasks = self._tasks(parameters)
        return run_forward(self._kernels(q, ()), tasks, _flat(q), _flat(k), _flat(v))

    def _backward(
        self,
        tensors: Sequence[Tensor],
        results: tuple[Tensor, Tensor],
        d_results: tuple[Tensor, Tensor],
        needed: Sequence[bool],
    ) -> Results:
        q, k, v, *parameters = tensors
        found = run_backward(
            self._kernels(q, needed),
            self._tasks(parameters),
            self.division.keys_once,
            (_flat(q), _flat(k), _flat(v), *results),
            *d_results,
            tuple(needed),
        )
        return tuple(
            d if d is None or d.shape == x.shape else d.view(x.shape)
            for d, x in zip(found, tensors, strict=True)
        )


@dataclass(frozen=True)
class _Repeating:
    """Kernels whose own launches are repeated; the tokens of a task tell it from others."""

    kernels: Kernels
    replays: Recent[Replay | int]

    @property
    def LSE_UNIT(self) -> float:
        return self.kernels.LSE_UNIT

    def forward(self, task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, statistic = replayed(
            self.replays,
            ("forward", id(task.q_tokens)),
            (q, k, v, *task.score.parameters),
            lambda: self.kernels.forward(task, q, k, v),
        )
        assert o is not None
        assert statistic is not None
        return o, statistic

    def backward(
        self,
        task: Task,
        tensors: tuple[Tensor, ...],
        do: Tensor,
        dlse: Tensor,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return replayed(
            self.replays,
            (needed, deterministic, id(task.q_tokens)),
            (*tensors, do, dlse, *task.score.parameters),
            lambda: self.kernels.backward(task, tensors, do, dlse, needed),
        )


@dataclass(frozen=True)
class RepeatedRun:
    """An implementation in PyTorch's own operations, which the backward runs once more."""

    name: str
    module: ModuleType
    problem: Problem
    pattern: Pattern
    form: Form
    geometry: Geometry

    lse_unit = 1.0
    one_by_one = True

    @property
    def with_lse(self) -> bool:
        return self.problem.return_lse

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            o, lse = self._results(tensors)
        # No view may leave a step of autograd: it could not be written to in place.
        return o.contiguous(), lse.contiguous()

    def backward(
        self,
        tensors: Sequence[Tensor],
        results: tuple[Tensor, Tensor],
        d_results: tuple[Tensor, Tensor],
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(n) for x, n in zip(tensors, needed, strict=True)]
            again = self._results(leaves)
        pairs = [(y, d) for y, d in zip(again, d_results, strict=True) if y.requires_grad]
        wanted = [x for x in leaves if x.requires_grad]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True
            )
        )
        return tuple(next(found) if x.requires_grad else None for x in leaves)

    def _results(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v, *parameters = tensors
        form = self.form.with_parameters(parameters)
        flat = (_flat(x) for x in (q, k, v))
        o, lse = self.module.attend(self.problem, self.pattern, form, self.geometry, *flat)
        if lse is None or not self.with_lse:
            lse = q.new_zeros(*o.shape[:-1], dtype=self.problem.lse_dtype)
        return o, lse.to(self.problem.lse_dtype).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[B, L, H, D] of [B, *grid, H, D]"""
    return x if x.dim() == 4 else x.flatten(1, -3)


def record(run: Run, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """o and the statistic of a run, of q, k, v and the parameters of its score; differentiable."""
    if transforming():
        return Transformed.apply(run, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return Recorded.apply(run, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    return run.forward(tensors)


def transforming() -> bool:
    """Whether torch.func looks at the call."""
    return bool(torch._C._are_functorch_transforms_active())


def mapped(x: Tensor) -> bool:
    """Whether torch.func.vmap gives x one entry at a time."""
    functions = torch._C._functorch
    while functions.is_functorch_wrapped_tensor(x):
        if functions.is_batchedtensor(x):
            return True
        x = functions.get_unwrapped(x)
    return False


class Recorded(torch.autograd.Function):
    """The step of a plain call."""

    @staticmethod
    def forward(ctx: Any, run: Run, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        results = run.forward(tensors)
        _keep(ctx, run, tensors, results)
        return results

    @staticmethod
    def backward(
        ctx: Any, do: Tensor | None, d_statistic: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return None, *_backward(ctx, do, d_statistic)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        raise _no_forward_mode(ctx)


class Transformed(torch.autograd.Function):
    """The same for torch.func; a plain call would pay for what it asks."""

    @staticmethod
    def forward(run: Run, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run.forward(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _keep(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def backward(
        ctx: Any, do: Tensor | None, d_statistic: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return None, *_backward(ctx, do, d_statistic)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        raise _no_forward_mode(ctx)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], run: Run, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        def apply(*own: Tensor) -> tuple[Tensor, ...]:
            return Transformed.apply(run, *own)  # type: ignore[no-any-return, no-untyped-call]

        return _mapped(apply, run, info.batch_size, in_dims[1:], tensors), (0, 0)


class _Gradients(torch.autograd.Function):
    """The backward where its own graph is asked for: torch.func asks always, second derivatives do too."""

    @staticmethod
    def forward(run: Run, needed: tuple[bool, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        o, statistic, do, d_statistic, *inputs = tensors
        found = run.backward(inputs, (o, statistic), (do, d_statistic), needed)
        return tuple(
            torch.zeros_like(x) if d is None else d for d, x in zip(found, inputs, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0].name

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return _Gradients.backward(ctx)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RefusedError(
            ctx.name, "it has no second derivative; 'reference' has, where vmap maps no v"
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], run: Run, needed: tuple[bool, ...], *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def apply(*own: Tensor) -> tuple[Tensor, ...]:
            return _Gradients.apply(run, needed, *own)  # type: ignore[no-any-return, no-untyped-call]

        results = _mapped(apply, run, info.batch_size, in_dims[2:], tensors)
        return results, (0,) * len(results)


def _keep(ctx: Any, run: Run, tensors: tuple[Tensor, ...], results: tuple[Tensor, Tensor]) -> None:
    ctx.run = run
    ctx.save_for_backward(*results, *tensors)
    ctx.set_materialize_grads(False)
    if not run.with_lse:
        ctx.mark_non_differentiable(results[1])


def _backward(ctx: Any, do: Tensor | None, d_statistic: Tensor | None) -> tuple[Tensor | None, ...]:
    o, statistic, *tensors = ctx.saved_tensors
    needed = tuple(ctx.needs_input_grad[1:])
    do = torch.zeros_like(o) if do is None else do
    if d_statistic is None:
        d_statistic = _zero(statistic).expand(statistic.shape)
    if torch.is_grad_enabled():
        found = _Gradients.apply(ctx.run, needed, o, statistic, do, d_statistic, *tensors)  # type: ignore[no-untyped-call]
    else:
        found = ctx.run.backward(tensors, (o, statistic), (do, d_statistic), needed)
    return tuple(d if n else None for d, n in zip(found, needed, strict=True))


def _no_forward_mode(ctx: Any) -> RefusedError:
    return RefusedError(
        ctx.run.name, "it has no forward-mode derivative; 'reference' has, where vmap maps no v"
    )


def _zero(like: Tensor) -> Tensor:
    if capturing(like):
        return like.new_zeros(())  # the graph keeps its own
    return _kept_zero(like.dtype, like.device)


@kept(16)
def _kept_zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _mapped(
    apply: Callable[..., tuple[Tensor, ...]],
    run: Run,
    count: int,
    in_dims: tuple[int | None, ...],
    tensors: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Results [count, ...] of tensors that hold `count` entries on the axes in_dims (None: one for all)."""
    entries = [
        x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]
    if not run.one_by_one:
        folded = apply(*(x.flatten(0, 1) for x in entries))
        return tuple(x.unflatten(0, (count, -1)) for x in folded)
    each = [apply(*(x[entry] for x in entries)) for entry in range(count)]
    return tuple(torch.stack(results) for results in zip(*each, strict=True))
