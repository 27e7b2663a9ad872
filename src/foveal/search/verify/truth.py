"""What the right results of a task are, and how exact the reference itself is in the type of a case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveal.search.isolate.channel import dtype_of
from foveal.search.isolate.confine import Limits
from foveal.search.isolate.process import Nursery
from foveal.search.task import Case, Task
from foveal.search.verify import styles
from foveal.search.verify.runner import Call, Outline, Runner
from foveal.testing import bounds

_NEAR = 1e-3
_FAR = 100.0
"""An error so many times over what is allowed is not looked at twice."""
_FEW = 64


@dataclass(frozen=True)
class Mistake:
    """How far a result is from the right one: the worst `error / allowed` and a sentence."""

    excess: float
    sentence: str

    @property
    def ok(self) -> bool:
        return self.excess <= 1.0


class Truth:
    """The reference of a task, in a confined process of its own that no candidate is near to."""

    def __init__(self, task: Task, nursery: Nursery, seconds: float = 60.0) -> None:
        self.task = task
        process = nursery.start(limits_of(task), memory_of(task))
        self.runner = Runner(
            process, task.reference, threads=task.threads, device=task.device, seconds=seconds
        )
        self._state = tuple(self.runner.state()) if task.reference["kind"] == "model" else ()
        self._outlines: dict[tuple[str, bool], Outline] = {}

    def call(self, case: Case, seed: int, style: str = styles.NORMAL) -> Call:
        """Fresh inputs of a style; those that are not floating, or that the task makes itself, from it."""
        own = self.task.own_inputs or any(not each.floating for each in case.inputs)
        made = self.runner.draw(case, seed) if own else None
        inputs = []
        floating = [number for number, each in enumerate(case.inputs) if each.floating]
        only = floating[seed % len(floating)] if style in styles.IN_ONE_INPUT and floating else None
        for number, each in enumerate(case.inputs):
            own_style = style if only in (None, number) else styles.NORMAL
            if made is not None and (self.task.own_inputs or not each.floating):
                inputs.append(made[number])
            else:
                dtype = dtype_of(each.dtype)
                inputs.append(styles.draw(own_style, each.shape, seed * 31 + number, dtype))
        return Call(case, tuple(inputs), self._moved_state(seed))

    def with_gradients(self, call: Call, seed: int) -> Call:
        """The same call, asking for gradients of every floating input."""
        leaves = tuple(i for i, x in enumerate(call.inputs) if x.is_floating_point())
        outline = self.outline(call)
        weights = [
            styles.draw(styles.NORMAL, shape, seed + 7 * i, dtype_of(dtype))
            for i, (shape, dtype) in enumerate(outline)
        ]
        return replace(call, leaves=leaves, cotangents=tuple(weights))

    def outline(self, call: Call) -> Outline:
        key = (call.case.name, bool(call.leaves))
        if key not in self._outlines:
            self._outlines[key] = self.runner.outline(call)
        return self._outlines[key]

    def compulsory(self, call: Call) -> float:
        """Bytes of inputs and outputs, each counted once."""
        own = sum(x.numel() * x.element_size() for x in call.inputs)
        return float(own + sum(math.prod(s) * dtype_of(d).itemsize for s, d in self.outline(call)))

    def exact(self, call: Call) -> list[Tensor]:
        """Results in float64."""
        return self.runner.run(call.in_float64(), self.outline(call))

    def plain(self, call: Call) -> list[Tensor]:
        """Results in the type of the case."""
        return self.runner.run(call, self.outline(call))

    def judge(self, call: Call, found: Sequence[Tensor]) -> Mistake:
        """The worst of all outputs, by the bound of `foveal.testing`.

        The error of the reference in its own type is taken at the input and, while a result is near to what
        is allowed, at neighbours of it.  A result that is NaN or infinite must be so in the same places;
        where the reference itself overflows nothing is asked.
        """
        exact, plain = self.exact(call), self.plain(call)
        errors = [_error(p, e) for p, e in zip(plain, exact, strict=True)]
        worst = self._worst(found, plain, exact, errors)
        if worst.ok or (worst.excess > _FAR and min(x.numel() for x in exact) > _FEW):
            return worst
        for number in range(1, bounds.INPUTS):
            near = self._neighbour(call, number)
            there, about = self.exact(near), self.plain(near)
            new = [_error(p, e) for p, e in zip(about, there, strict=True)]
            errors = [tuple(map(max, a, b)) for a, b in zip(errors, new, strict=True)]  # type: ignore[misc]
            worst = self._worst(found, plain, exact, errors)
            if worst.ok:
                break
        return worst

    def excess(self, call: Call, found: Sequence[Tensor]) -> float:
        """The largest error of a result over what is allowed at this input."""
        exact, plain = self.exact(call), self.plain(call)
        errors = [_error(p, e) for p, e in zip(plain, exact, strict=True)]
        return self._worst(found, plain, exact, errors).excess

    def allowed(self, call: Call) -> list[float]:
        """The largest error of every output that is allowed at an input."""
        exact, plain = self.exact(call), self.plain(call)
        factor = self.task.tolerance / 2
        return [
            bounds.check("", p, factor * bounds.error(p, e), e).allowed
            for p, e in zip(plain, exact, strict=True)
        ]

    def _worst(
        self,
        found: Sequence[Tensor],
        plain: Sequence[Tensor],
        exact: Sequence[Tensor],
        errors: Sequence[tuple[float, float]],
    ) -> Mistake:
        factor = self.task.tolerance / 2
        worst = Mistake(0.0, "")
        for number, (got, about, right) in enumerate(zip(found, plain, exact, strict=True)):
            name = f"output {number}"
            if not got.dtype.is_floating_point:
                same = torch.equal(got.double(), right.double())
                mistake = Mistake(0.0 if same else math.inf, f"{name}: whole numbers differ")
            else:
                mistake = _compare(name, got, about, right, factor, errors[number])
            worst = max(worst, mistake, key=lambda each: each.excess)
        return worst

    def _neighbour(self, call: Call, number: int) -> Call:
        source = torch.Generator().manual_seed(number)
        moved = [
            x * (1 + _NEAR * torch.randn(x.shape, generator=source, dtype=torch.float64)).to(x)
            if x.is_floating_point()
            else x
            for x in call.inputs
        ]
        return replace(call, inputs=tuple(moved))

    def _moved_state(self, seed: int) -> tuple[tuple[str, Tensor], ...]:
        """Parameters moved away from their first values, which often let a part of a model vanish.

        Those that are all positive stay so: they may be variances.  Buffers such as masks stay as they are.
        """
        source = torch.Generator().manual_seed(seed)
        found = []
        for name, x, learned in self._state:
            if not x.is_floating_point() or not learned:
                found.append((name, x))
                continue
            noise = torch.randn(x.shape, generator=source, dtype=torch.float64).to(x)
            moved = x * torch.exp(0.2 * noise) if bool((x > 0).all()) else x + 0.1 * noise
            found.append((name, moved))
        return tuple(found)

    def close(self) -> None:
        self.runner.close()


def limits_of(task: Task) -> Limits:
    """What a process of a task may use."""
    device = task.device != "cpu"
    programs = device or bool(task.reference.get("environment"))
    return Limits(
        threads=64 + 4 * task.threads,
        programs=programs,
        device=device,
        files=1024 if device else 64,
        file_size=(256 if programs else 16) << 20,
        memory=(16 << 30) if device else (2 << 30) + 16 * 8 * max(c.numbers for c in task.cases),
    )


def memory_of(task: Task) -> int:
    """Bytes of memory to share with a process of a task; untouched pages cost nothing."""
    return (256 << 20) + 64 * 8 * max(case.numbers for case in task.cases)


def _error(plain: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest error and the norm of the error, where both are finite."""
    if not plain.dtype.is_floating_point:
        return 0.0, 0.0
    both = plain.isfinite() & exact.isfinite()
    difference = torch.where(both, plain.double() - exact, 0.0)
    if not difference.numel():
        return 0.0, 0.0
    return float(difference.abs().max()), float(difference.norm())


def _compare(
    name: str,
    got: Tensor,
    plain: Tensor,
    exact: Tensor,
    factor: float,
    errors: tuple[float, float],
) -> Mistake:
    overflow = ~plain.isfinite() & exact.isfinite()
    right = torch.where(overflow, 0.0, exact)
    got = torch.where(overflow, 0.0, got)
    largest = bounds.check(name, got, factor * errors[0], right)
    finite = right.isfinite() & got.isfinite()
    distance = float(torch.where(finite, got.double() - right, 0.0).norm())
    size = float(torch.where(finite, right, 0.0).norm())
    norm = 2 * factor * errors[1] + _band(got) * size
    by_largest = _excess(largest.error, largest.allowed)
    by_norm = _excess(distance, norm)
    if by_largest >= by_norm:
        return Mistake(by_largest, str(largest))
    sentence = f"{name}: error of norm {distance:.3g} > {norm:.3g} allowed"
    return Mistake(by_norm, sentence)


def _band(x: Tensor) -> float:
    roundings = 64 if x.dtype == torch.float64 else 1
    return roundings * torch.finfo(x.dtype).eps


def _excess(error: float, allowed: float) -> float:
    if error == 0.0:
        return 0.0
    return error / allowed if allowed else math.inf
