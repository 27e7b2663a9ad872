"""When a result counts as correct: no error bound by taste, only by what the precision allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    name: str, got: Tensor, plain: Tensor, exact: Tensor, terms: Tensor | None = None
) -> Verdict:
    """Whether `got` is as good as its precision allows.

    max |got - exact| <= 2 max |plain - exact| + eps max |exact|,  where `exact` is a float64
    computation, `plain` the same computation in the precision under test, and eps one rounding in
    the dtype of `got`.  Equal infinities have no error; a NaN on one side only has an infinite one.

    `terms` are sums of the same terms without their signs, for results that cancel: the gradient of
    q is exactly 0 where a query sees one key, and no precision gets there by subtracting; the
    rounding is then that of the largest term, eps max(|exact|, |terms|).

    Shapes: all equal.  A float64 result has no wider arithmetic: it gets 64 roundings.
    """
    exact = exact.detach().double()
    if not exact.numel():
        return Verdict(name, got.shape == exact.shape, 0.0, 0.0)
    roundings = _DOUBLE_BAND if got.dtype == torch.float64 else 1
    size = max(_size(exact), 0.0 if terms is None else _size(terms))
    band = roundings * torch.finfo(got.dtype).eps * size
    error = float(_distance(got, exact).amax())
    allowed = 2 * float(_distance(plain, exact).amax()) + band
    return Verdict(name, error <= allowed, error, allowed)


def _size(x: Tensor) -> float:
    return float(torch.where(x.isfinite(), x.abs(), 0.0).amax())


def _distance(got: Tensor, exact: Tensor) -> Tensor:
    got = got.detach().to(exact.device, torch.float64)
    if got.shape != exact.shape:
        raise ValueError(f"got: got {list(got.shape)}; the shape {list(exact.shape)} is needed")
    same = (got == exact) | (got.isnan() & exact.isnan())
    distance = torch.where(same, 0.0, (got - exact).abs())
    return torch.where(distance.isnan(), torch.inf, distance)
