"""An edition of entmax attention against the definition in float64, by the rule of foveal.testing.bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

import foveal as fv
from foveal.testing.bounds import Verdict, check_near, error, neighbour

T = TypeVar("T")

NAMES = ("o", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Problem:
    """q, k, v, a pattern and alpha; documents are cut at `cut`."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: fv.Pattern
    alpha: float
    cut: Tensor | None = None

    def run(self, implementation: str | None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """o and the gradients of q, k, v for fixed cotangents."""
        leaves = [
            x.detach().to(x.dtype if dtype is None else dtype).requires_grad_()
            for x in (self.q, self.k, self.v)
        ]
        o = fv.attend(
            *leaves,
            self.pattern,
            fv.Entmax(self.alpha),
            cu_seqlens=self.cut,
            implementation=implementation,
        )
        found = torch.autograd.grad(o, leaves, self.cotangents(o.shape).to(o))
        return [o.detach(), *found]

    def cotangents(self, shape: torch.Size) -> Tensor:
        source = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=source, dtype=torch.float64)

    def terms(self) -> list[Tensor | None]:
        """dS = u (dP - shift) without its signs, and what is summed of it."""
        q, k, v = (x.detach().double() for x in (self.q, self.k, self.v))
        ones = dataclasses.replace(self, q=q, k=k, v=v.abs())
        # u / sum u is the map at which d o / d tau is taken: |dP| + |shift| is at most twice |do| |v|.
        size = float(
            ones.run("reference")[0].abs().amax() * self.cotangents(self.shape).abs().amax()
        )
        scale = q.shape[-1] ** -0.5
        return [
            None,
            torch.full((1,), 2 * size * scale * float(k.abs().amax()), dtype=torch.float64),
            torch.full((1,), 2 * size * scale * float(q.abs().amax()), dtype=torch.float64),
            None,
        ]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.q.shape[:-1], self.v.shape[-1]))

    def verdicts(self, implementation: str | None) -> list[Verdict]:
        def named(results: Iterable[T]) -> dict[str, T]:
            return dict(zip(NAMES, results, strict=True))

        exact = self.run("reference", torch.float64)

        def errors_at(number: int) -> dict[str, float]:
            near = self._near(number) if number else self
            there = near.run("reference", torch.float64) if number else exact
            return named(map(error, near.run("reference"), there))

        terms = {name: x for name, x in named(self.terms()).items() if x is not None}
        return check_near(named(self.run(implementation)), named(exact), errors_at, terms)

    def _near(self, number: int) -> Problem:
        source = torch.Generator().manual_seed(number)
        q, k, v = (neighbour(x, source) for x in (self.q, self.k, self.v))
        return dataclasses.replace(self, q=q, k=k, v=v)


def agree(problem: Problem, implementation: str | None) -> None:
    """Raises AssertionError with the verdicts unless all are ok."""
    found = problem.verdicts(implementation)
    assert all(verdict.ok for verdict in found), "; ".join(map(str, found))
