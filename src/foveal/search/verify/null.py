"""Results that need no work.  A task that would accept one of them cannot tell a kernel from nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from foveal._errors import TaskError
from foveal.search.task import HIDDEN, Case
from foveal.search.verify.runner import Call
from foveal.search.verify.truth import Truth

CLEAR = 5.0
"""How many times over what is allowed the error of a do-nothing result must be."""


def nothings(
    call: Call, exact: Sequence[Tensor], other: Sequence[Tensor]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Do-nothing results by name; `other` are the right results of other inputs."""
    yield "zeros", [torch.zeros_like(x) for x in exact]
    yield "ones", [torch.ones_like(x) for x in exact]
    yield "the mean of the right result", [torch.full_like(x, float(x.mean())) for x in exact]
    yield "the result of other inputs", list(other)
    for number, x in enumerate(call.inputs):
        if x.is_floating_point() and x.numel():
            mean = float(x.double().mean())
            yield f"the mean of input {number}", [torch.full_like(y, mean) for y in exact]
            if all(x.shape == y.shape for y in exact):
                yield f"input {number} itself", [x.double() for _ in exact]
    for axis in range(min((x.dim() for x in exact), default=0)):
        if all(x.shape[axis] > 1 for x in exact):
            yield (
                f"means along axis {axis}",
                [x.mean(axis, keepdim=True).expand_as(x).contiguous() for x in exact],
            )


def admit(truth: Truth, cases: Sequence[Case], seed: int) -> list[str]:
    """What was tried, one line each.  Raises TaskError for a task that a do-nothing result passes."""
    tried = []
    for case in cases:
        if case.role == HIDDEN:
            continue
        call, second = truth.call(case, seed), truth.call(case, seed + 1)
        exact = truth.exact(call)
        if any(not x.dtype.is_floating_point or not x.numel() for x in exact):
            continue
        if not all(bool(x.isfinite().any()) for x in exact):
            raise TaskError(
                f"{case.name}: the reference returns no finite number for normal inputs"
            )
        for name, found in nothings(call, exact, truth.exact(second)):
            excess = truth.excess(call, [x.to(_own(case)) for x in found])
            tried.append(f"{case.name}: {name} misses what is allowed {excess:.3g} times")
            if excess < CLEAR:
                raise TaskError(
                    f"{case.name}: {name} would pass: its error is {excess:.3g} times what is allowed, "
                    f"{CLEAR:g} times are needed to tell a kernel from nothing"
                )
    return tried


def _own(case: Case) -> torch.dtype:
    floating = [each.dtype for each in case.inputs if each.floating]
    found = getattr(torch, floating[0]) if floating else torch.float32
    assert isinstance(found, torch.dtype)
    return found
