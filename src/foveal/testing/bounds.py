"""When a result counts as correct: no error bound by taste, only by what the precision allows.

The rule.  With `exact` a float64 computation, `plain` the same computation in the precision under test and
eps one rounding in the dtype of the result,

    max |got - exact|  <=  2 E + eps T,    E = max |plain - exact| over `INPUTS` inputs,
                                           T = max(|exact|, |terms|).

Why several inputs.  Rounding errors of two correct computations are two draws from one distribution, so at
a single input the plain one may be small by luck: where a result is one number (a slope, the sink of a
head) and errors are normal, |X| > 2 |Y| happens in 30 % of all cases.  The error E of the plain computation
is therefore its largest over the input itself and fixed neighbours of it, further apart than a rounding
and too near to change how large the errors are.  For one number and n inputs a correct computation is
refused with probability

    p(n) = integral over x > 0 of sqrt(2 / pi) exp(-x^2 / 2) erf(x / sqrt(8))^n,

0.3 for n = 1, 8e-3 for 8, 2e-4 for 32, 1.5e-5 for `INPUTS` = 64; for results of many numbers it is far less.
What is allowed grows slowly with n, as the largest of n draws does: 64 draws reach 2.4 standard deviations.

Why terms.  A result that cancels may be 0 in exact arithmetic *and* in the plain one at every input: the
gradient of q where a query sees one key is P (dP - delta) with P = 1 and dP = delta.  A computation that sums
dP and delta in two orders differs by a rounding of the terms, not of their difference.  `terms` are
the same sums without signs, and eps T is one rounding of the largest of them; nothing is granted
for what the sum does after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

INPUTS = 64
"""Inputs at which the error of a plain computation is taken: p(64) = 1.5e-5, see above."""
_DOUBLE_BAND = 64
"""Roundings granted to a float64 result, which has no wider arithmetic to be compared with."""


@dataclass(frozen=True)
class Verdict:
    """A comparison: the largest error, the largest that was allowed, and whether it fits."""

    name: str
    ok: bool
    error: float
    allowed: float

    def __str__(self) -> str:
        sign = "<=" if self.ok else ">"
        return f"{self.name}: error {self.error:.3g} {sign} {self.allowed:.3g} allowed"


def check(
    name: str, got: Tensor, plain: Tensor | float, exact: Tensor, terms: Tensor | None = None
) -> Verdict:
    """Whether `got` is as good as its precision allows, by the rule above.

    `plain` is the plain result, or its error E where that was taken at several inputs (`error`);
    `terms` are sums of the same terms without their signs, for results that cancel.
    Equal infinities have no error; a NaN on one side only has an infinite one.

    Shapes: all equal.  A float64 result has no wider arithmetic: it gets 64 roundings.
    """
    exact = exact.detach().double()
    if not exact.numel():
        return Verdict(name, got.shape == exact.shape, 0.0, 0.0)
    roundings = _DOUBLE_BAND if got.dtype == torch.float64 else 1
    size = max(_size(exact), 0.0 if terms is None else _size(terms))
    band = roundings * torch.finfo(got.dtype).eps * size
    distance = error(got, exact)
    allowed = 2 * (error(plain, exact) if isinstance(plain, Tensor) else plain) + band
    return Verdict(name, distance <= allowed, distance, allowed)


def check_near(
    found: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    errors_at: Callable[[int], Mapping[str, float]],
    terms: Mapping[str, Tensor] | None = None,
) -> list[Verdict]:
    """Verdicts on results by name, E taken at as many inputs as a result needs, `INPUTS` at most.

    `errors_at(n)` gives the errors of the plain results at neighbour n of the inputs, n = 0 being the inputs
    themselves (`neighbour`).  More inputs could only allow more, so it ends as soon as all results are within
    what is allowed, and the verdicts are those of all `INPUTS`.

    Raises ValueError where the names of results differ.
    """
    errors = dict.fromkeys(exact, 0.0)
    verdicts: list[Verdict] = []
    for number in range(INPUTS):
        near = errors_at(number)
        if not found.keys() == exact.keys() == near.keys():
            raise ValueError(
                f"found: got {list(found)}; exact are {list(exact)}, plain {list(near)}"
            )
        errors = {name: max(worst, near[name]) for name, worst in errors.items()}
        verdicts = [
            check(name, found[name], errors[name], exact[name], (terms or {}).get(name))
            for name in exact
        ]
        if all(verdict.ok for verdict in verdicts):
            break
    return verdicts


def error(got: Tensor, exact: Tensor) -> float:
    """max |got - exact|, 0 for equal infinities, inf where one side only is NaN."""
    got = got.detach().to(exact.device, torch.float64)
    if got.shape != exact.shape:
        raise ValueError(f"got: got {list(got.shape)}; the shape {list(exact.shape)} is needed")
    if not got.numel():
        return 0.0
    same = (got == exact) | (got.isnan() & exact.isnan())
    distance = torch.where(same, 0.0, (got - exact).abs())
    return float(torch.where(distance.isnan(), torch.inf, distance).amax())


def neighbour(x: Tensor, source: torch.Generator) -> Tensor:
    """A neighbour of x: further away than a rounding, too near to change how large errors are."""
    step = max(32 * torch.finfo(x.dtype).eps, 2.0**-10)
    return x * (1 + step * torch.randn(x.shape, generator=source)).to(x)


def _size(x: Tensor) -> float:
    return float(torch.where(x.isfinite(), x.abs(), 0.0).amax())
