"""An edition of entmax attention against the definition in float64, by the rule of foveal.testing.bounds."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import foveal as fv
from foveal.testing.bounds import INPUTS, Verdict, check, error, neighbour

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
        """Neighbours are visited until every result is within what is allowed."""
        got = self.run(implementation)
        exact = self.run("reference", torch.float64)
        errors = [0.0] * len(exact)
        terms = self.terms()
        found: list[Verdict] = []
        for number in range(INPUTS):
            near = self if number == 0 else self._near(number)
            there = exact if number == 0 else near.run("reference", torch.float64)
            plain = near.run("reference")
            errors = [max(e, error(x, y)) for e, x, y in zip(errors, plain, there, strict=True)]
            found = [check(*each) for each in zip(NAMES, got, errors, exact, terms, strict=True)]
            if all(verdict.ok for verdict in found):
                break
        return found

    def _near(self, number: int) -> Problem:
        source = torch.Generator().manual_seed(number)
        q, k, v = (neighbour(x, source) for x in (self.q, self.k, self.v))
        return dataclasses.replace(self, q=q, k=k, v=v)


def agree(problem: Problem, implementation: str | None) -> None:
    """Raises AssertionError with the verdicts unless all are ok."""
    found = problem.verdicts(implementation)
    assert all(verdict.ok for verdict in found), "; ".join(map(str, found))
