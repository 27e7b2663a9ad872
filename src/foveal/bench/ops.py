"""Systems that are an operator and not a pattern with a score, as cases of a run.

There is no second computation to compare such an operator with in general.  The gate asks instead that
every identity of the system holds, in float64 on fresh inputs, and that the operator on the inputs of
the case stays as near to itself in float64 as the same operator in the same precision on the CPU does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.bench.baselines.base import Competitor, Inputs, Prepared
from foveal.bench.requirements import OURS
from foveal.systems import System
from foveal.testing import bounds


@dataclass(frozen=True)
class OpCase:
    """The operator of a system at one of its reference shapes.

    `call` is the operator as a function of tensors of the `shapes`.
    """

    name: str
    system: System
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Tensor]
    dtype: torch.dtype = torch.float32
    backward: bool = True
    against: tuple[str, ...] | None = ()

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Tensors from a standard normal distribution, the same in every run on such a device."""
        source = torch.Generator(device).manual_seed(seed)
        return tuple(
            torch.randn(shape, generator=source, device=device).to(self.dtype)
            for shape in self.shapes
        )

    def describe(self) -> dict[str, Any]:
        """The case as JSON data."""
        return {
            "name": self.name,
            "system": self.system.name,
            "shapes": [list(shape) for shape in self.shapes],
            "dtype": str(self.dtype).removeprefix("torch."),
            "backward": self.backward,
        }

    def key(self, device: torch.device, threads: int) -> str:
        """The identity of a measurement across runs: the problem, and what it runs on."""
        values = " ".join(f"{name}={value}" for name, value in self.describe().items())
        return f"{values} device={device.type} threads={threads}"


class Operator(Competitor):
    """The operator of the catalogue: `case.call`, with nothing made before."""

    name = OURS
    title = "foveal"


@dataclass(frozen=True)
class OpGate:
    """Checks an operator on one set of inputs."""

    case: OpCase
    inputs: Inputs

    def verdicts(self, prepared: Prepared, competitor: Competitor) -> list[bounds.Verdict]:
        """One verdict for each identity, the output and each gradient."""
        found = [self._identity(number) for number in range(len(self.case.system.identities))]
        got = self._evaluate(self.inputs)
        here = [x.cpu() for x in self.inputs]
        plain, exact = self._evaluate(here), self._evaluate([x.double() for x in here])
        return found + [bounds.check(name, got[name], plain[name], exact[name]) for name in exact]

    def _identity(self, number: int) -> bounds.Verdict:
        """The worst pair of an identity."""
        identity = self.case.system.identities[number]
        verdicts = [
            bounds.check(f"{identity.name}, {what}", left, right, right)
            for what, left, right in identity.pairs(torch.Generator().manual_seed(number))
        ]
        return max(verdicts, key=lambda v: v.error / v.allowed if v.allowed else float(not v.ok))

    def _evaluate(self, inputs: Any) -> dict[str, Tensor]:
        leaves = tuple(x.detach().requires_grad_(self.case.backward) for x in inputs)
        with torch.set_grad_enabled(self.case.backward):
            out = self.case.call(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results = {"o": out.detach()}
        if self.case.backward:
            loss = (out * weight.to(out)).sum()
            gradients = torch.autograd.grad(loss, leaves)
            results |= {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}
        return results


def op_cases(system: System, most: int | None) -> tuple[OpCase, ...]:
    """The reference shapes of a system; beyond `most` elements of a tensor on fewer heads."""
    return tuple(_case(system, shape, most) for shape in system.reference_shapes)


def _case(system: System, shape: Mapping[str, Any], most: int | None) -> OpCase:
    grid, heads, dim = tuple(shape["grid"]), int(shape["heads"]), int(shape["head_dim"])
    timed = heads if most is None else max(min(heads, most // (math.prod(grid) * dim)), 1)
    options = dict(shape.get("options", {}))
    tokens = (1, *grid, timed, dim)
    share = f"{timed} of its {heads}" if timed < heads else f"{heads}"
    name = f"{system.name} on {'x'.join(str(n) for n in grid)}, {share} heads"
    if system.operands is not None:
        own = system.operands({**shape, "heads": timed})
        return OpCase(name, system, own, lambda *tensors: system.op(*tensors, **options))
    if system.name not in _PER_AXIS:
        shapes = (tokens,) * _INPUTS.get(system.name, 3)
        return OpCase(name, system, shapes, lambda *tensors: system.op(*tensors, **options))
    axes = tuple((1, n, timed, dim) for n in grid)

    def call(*tensors: Tensor) -> Tensor:
        rank = len(grid)
        out: Tensor = system.op(tensors[:rank], tensors[rank:-1], tensors[-1], **options)
        return out

    return OpCase(name, system, (*axes, *axes, tokens), call)


_PER_AXIS = ("ifactformer",)
"""Operators that take a query and a key per axis of the grid."""

_INPUTS = {"soft": 2, "ponet": 5}
"""How many tensors an operator takes where these are not q, k and v."""
