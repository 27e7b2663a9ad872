"""An implementation against the definition in float64: output, lse and every gradient."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from foveal._attend import attend
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Dense
from foveal.scores.base import Composed, Score
from foveal.scores.softmax import Softmax
from foveal.testing.bounds import Verdict, check_near, error, neighbour


def check_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Dense(),
    score: Score = Softmax(),
    *,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = True,
    implementation: str | None = None,
) -> list[Verdict]:
    """Verdicts on o, lse and the gradients of q, k, v and of every tensor of the score.

    Each result of `attend` is compared with the float64 `reference` on the same numbers, by the
    rule of `foveal.testing.bounds`; the plain computation of that rule is the `reference` in the
    dtype of q, at q, k, v and the tensors of the score and at fixed neighbours of them.
    Options: as for `attend`; return_lse False admits implementations without lse.
    Raises AssertionError that lists the verdicts when one of them is not ok.
    """
    problem = Agreement(q, k, v, pattern, score, cu_seqlens, return_lse)
    verdicts = problem.verdicts(problem.results(implementation))
    if not all(verdict.ok for verdict in verdicts):
        shapes = ", ".join(f"{n} {list(x.shape)}" for n, x in (("q", q), ("k", k), ("v", v)))
        lines = "\n  ".join(str(verdict) for verdict in verdicts)
        raise AssertionError(
            f"attend({shapes}, {q.dtype}, {pattern!r}, {score.key})"
            f" by {implementation or 'the plan'}\n  {lines}"
        )
    return verdicts


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A problem on which implementations are to agree; fields as the arguments of `check_attend`."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern
    score: Score
    cu_seqlens: Tensor | None = None
    return_lse: bool = True

    def verdicts(self, found: dict[str, Tensor]) -> list[Verdict]:
        """Judges the `results` of an implementation, by name."""
        exact = self._evaluate("reference", torch.float64)

        def errors_at(number: int) -> dict[str, float]:
            plain = self._evaluate("reference", near=number)
            there = self._evaluate("reference", torch.float64, near=number) if number else exact
            return {name: _finite_error(x, there[name]) for name, x in plain.items()}

        return check_near(found, exact, errors_at, self._terms(exact))

    def results(self, implementation: str | None) -> dict[str, Tensor]:
        """o, lse and gradients of an implementation, every tensor as it came, by name."""
        return self._evaluate(implementation)

    def _evaluate(
        self,
        implementation: str | None,
        dtype: torch.dtype | None = None,
        weights: dict[str, Tensor] | None = None,
        near: int = 0,
    ) -> dict[str, Tensor]:
        """Results by name; `dtype` None leaves every tensor as it came, `near` names a neighbour."""
        leaves = _Leaves(dtype, near)
        q, k, v = (leaves.add(f"d{name}", getattr(self, name)) for name in ("q", "k", "v"))
        found = attend(
            q,
            k,
            v,
            self.pattern,
            _with_leaves(self.score, leaves),
            cu_seqlens=self.cu_seqlens,
            return_lse=self.return_lse,  # type: ignore[call-overload]
            implementation=implementation,
        )
        outputs = dict(zip(("o", "lse"), found if self.return_lse else (found,), strict=False))
        weights = self._weights(outputs) if weights is None else weights
        gradients = torch.autograd.grad(
            list(outputs.values()),
            list(leaves.by_name.values()),
            [weights[name].to(x) for name, x in outputs.items()],
            allow_unused=True,
        )
        results = {name: x.detach() for name, x in outputs.items()}
        for (name, leaf), gradient in zip(leaves.by_name.items(), gradients, strict=True):
            results[name] = torch.zeros_like(leaf) if gradient is None else gradient
        return results

    def _weights(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same random cotangents in every call."""
        source = torch.Generator().manual_seed(0)
        return {
            name: torch.randn(x.shape, generator=source, dtype=torch.float64)
            for name, x in outputs.items()
        }

    def _terms(self, exact: dict[str, Tensor]) -> dict[str, Tensor]:
        """How large the terms are that the results sum: v and the cotangents without signs.

        dS = P (dP - delta + dlse), delta = sum(do o): one evaluation holds P dP alone, as its dlse
        is delta, the other the part of delta.  The slope 1 - t^2 of a soft cap cancels where the cap is
        reached: two more evaluations hold its term 1, with the weights of scores without the cap.
        """
        unsigned = dataclasses.replace(self, v=self.v.detach().abs(), return_lse=True)
        largest = {name: torch.zeros_like(x) for name, x in exact.items()}
        for score in {id(x): x for x in (self.score, _without_cap(self.score))}.values():
            problem = dataclasses.replace(unsigned, score=score)
            o = problem._evaluate("reference", torch.float64)["o"]
            do = self._weights(exact)["o"].abs().to(o)
            none = torch.zeros(o.shape[:-1], dtype=o.dtype, device=o.device)
            for dlse in (none, (do * o).sum(-1)):
                found = problem._evaluate("reference", torch.float64, {"o": do, "lse": dlse})
                largest = {name: x.maximum(found[name].abs()) for name, x in largest.items()}
        return largest


def _finite_error(plain: Tensor, exact: Tensor) -> float:
    """The error where both are finite: NaN and inf excuse nobody else's."""
    both = plain.isfinite() & exact.isfinite()
    return error(torch.where(both, plain.double(), 0.0), torch.where(both, exact, 0.0))


class _Leaves:
    """Tensors made into leaves of the graph, by name; `near` 0 as they are, else moved a little."""

    def __init__(self, dtype: torch.dtype | None, near: int) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._dtype = dtype
        self._source = torch.Generator().manual_seed(near) if near else None

    def add(self, name: str, x: Tensor) -> Tensor:
        x = x.detach()
        if self._source is not None:
            x = neighbour(x, self._source)
        leaf = (x if self._dtype is None else x.to(self._dtype)).requires_grad_()
        self.by_name[name if name not in self.by_name else f"{name}#{len(self.by_name)}"] = leaf
        return leaf


def _without_cap(score: Score) -> Score:
    """The score itself if it has no soft cap."""
    if isinstance(score, Composed):
        members = tuple(_without_cap(member) for member in score.members)
        same = all(a is b for a, b in zip(members, score.members, strict=True))
        return score if same else Composed(members)
    if isinstance(score, Softmax) and score.soft_cap is not None:
        return dataclasses.replace(score, soft_cap=None)
    return score


def _with_leaves(score: Score, leaves: _Leaves) -> Score:
    """The score with a leaf in place of each of its tensors."""
    if isinstance(score, Composed):
        return Composed(tuple(_with_leaves(member, leaves) for member in score.members))
    if not dataclasses.is_dataclass(score):
        return score
    replaced = {
        field.name: leaves.add(f"d{type(score).__name__}.{field.name}", tensor)
        for field in dataclasses.fields(score)
        if isinstance(tensor := getattr(score, field.name), Tensor)
    }
    return dataclasses.replace(score, **replaced)
