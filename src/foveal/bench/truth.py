"""What the right results of a case are, and how exact a plain computation of them is.

Exact is the float64 `reference`.  Plain is the reference in the precision of the case, with the
textbook backward from the stored lse.  Where all rows at once would not fit, the loss involves a
sample of query rows only: then the output is known on those rows, and the gradients of q, k and v
are known whole, as the gradients of that loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import foveal as fv
from foveal.bench.baselines.base import Inputs
from foveal.bench.cases import Case
from foveal.patterns import Extent, Pattern
from foveal.scores import Score
from foveal.scores.base import Geometry
from foveal.scores.normal import normal_form
from foveal.testing import bounds

_PAIRS = 2**22
"""Pairs of query and key, over all heads, that the reference evaluates at once."""


@dataclass(frozen=True)
class Truth:
    """What is right about a pattern, on some rows, and how exact the plain computation is."""

    rows: Tensor
    weights: tuple[Tensor, Tensor]
    _problem: _Sampled
    _known: dict[bool, _Known] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, pattern: Pattern, inputs: Inputs) -> Truth:
        rows = _sample(case)
        source = torch.Generator().manual_seed(1)
        shape = (case.batch, len(rows), case.q_heads)
        weights = torch.randn(*shape, case.value_dim, generator=source)
        lse_weights = torch.randn(*shape, generator=source)
        device = inputs[0].device
        sampled = SampledRows(pattern, case.extent, tuple(rows.tolist()))
        tokens = [tensor.detach().flatten(1, -3) for tensor in inputs]
        problem = _Sampled(tokens[0][:, rows], tokens[1], tokens[2], sampled, case.score)
        return cls(rows, (weights.to(device), lse_weights.to(device)), problem)

    def verdicts(self, found: dict[str, Tensor]) -> list[bounds.Verdict]:
        """Judges the results of a competitor; the loss took its lse if that is among them.

        The plain computation is made at the inputs and at neighbours of them until every result is
        within what is allowed: more of them could only allow more.
        """
        with_lse = "lse" in found
        if with_lse not in self._known:
            self._known[with_lse] = _Known(self._problem, self.weights, with_lse)
        known = self._known[with_lse]
        exact = dict(known.exact)
        if "dq" in found:
            whole = torch.zeros_like(found["dq"], dtype=exact["dq"].dtype)
            exact["dq"] = whole.index_copy(1, self.rows.to(whole.device), exact["dq"])
        while True:
            verdicts = [
                bounds.check(name, found[name], known.errors[name], exact[name]) for name in found
            ]
            settled = all(verdict.ok or verdict.error == torch.inf for verdict in verdicts)
            if settled or known.visited == bounds.INPUTS:
                return verdicts
            known.visit()

    def of_tokens(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(1, -3)[:, self.rows]


@dataclass(frozen=True)
class SampledRows(Pattern):
    """Some queries of a problem, against all of its keys: the i-th query is query rows[i]."""

    pattern: Pattern
    extent: Extent
    rows: tuple[int, ...]

    @property
    def depends_on_data(self) -> bool:
        return self.pattern.depends_on_data

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        rows = torch.tensor(self.rows, device=q_pos.device)
        chosen = rows[q_pos - (extent.Lk - extent.Lq)] + (self.extent.Lk - self.extent.Lq)
        return self.pattern.allows(chosen, k_pos, self.extent)


class _Known:
    """Exact results of a problem, and the error of the plain computation at `visited` inputs."""

    def __init__(self, problem: _Sampled, weights: tuple[Tensor, Tensor], with_lse: bool) -> None:
        self._problem, self._weights, self._with_lse = problem, weights, with_lse
        self.exact = problem.exact(*weights, with_lse)
        self.errors = dict.fromkeys(self.exact, 0.0)
        self.visited = 0
        self.visit()

    def visit(self) -> None:
        problem = self._problem.near(self.visited)
        exact = problem.exact(*self._weights, self._with_lse) if self.visited else self.exact
        for name, plain in problem.plain(*self._weights, self._with_lse).items():
            self.errors[name] = max(self.errors[name], bounds.error(plain, exact[name]))
        self.visited += 1


@dataclass(frozen=True)
class _Sampled:
    """Some queries q [B, R, Hq, D] against all keys, and the two computations that judge others."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern
    score: Score

    def near(self, number: int) -> _Sampled:
        """The problem itself for 0, else a neighbour of it."""
        if number == 0:
            return self
        source = torch.Generator().manual_seed(number)
        q, k, v = (bounds.neighbour(x, source) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)

    def exact(self, do: Tensor, dlse: Tensor, with_lse: bool) -> dict[str, Tensor]:
        """The float64 reference, differentiated by autograd."""
        leaves = self._leaves(torch.float64)

        def run() -> tuple[Tensor, Tensor | None]:
            o, lse = self._attend(leaves)
            return o, lse if with_lse else None

        return results_of(run, leaves, (do, dlse))

    def plain(self, do: Tensor, dlse: Tensor, with_lse: bool) -> dict[str, Tensor]:
        """The reference in the precision of the case, and the textbook backward from its o and lse.

        P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - rowsum(dO O) + dlse): what every fused
        implementation computes.  The rounding of the stored lse is part of that.
        """
        leaves = self._leaves(self.q.dtype)
        with torch.no_grad():
            o, lse = self._attend(leaves)
        do, dlse = do.to(o.dtype), dlse * with_lse
        shift = dlse - (do * o).sum(-1).to(lse.dtype)
        seen = torch.where(lse == -torch.inf, 0.0, lse).transpose(1, 2)[..., None]
        weights = torch.exp(self._scores(*leaves[:2]) - seen)
        groups = self.q.shape[2] // self.k.shape[2]
        values = leaves[2].repeat_interleave(groups, 2).transpose(1, 2)
        loss = (weights.to(o.dtype) @ values * do.transpose(1, 2)).sum()
        loss = loss + (weights.sum(-1) * shift.transpose(1, 2)).sum()
        gradients = torch.autograd.grad(loss, leaves)
        results = {"o": o, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
        return results | ({"lse": lse} if with_lse else {})

    def _attend(self, leaves: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v = leaves
        return fv.attend(
            q, k, v, self.pattern, self.score, return_lse=True, implementation="reference"
        )

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores of all pairs [B, Hq, R, Lk], -inf where hidden."""
        extent = Extent((q.shape[1],), (k.shape[1],))
        geometry = Geometry(self.pattern, extent, q.shape[0], q.shape[2], k.shape[2])
        form = normal_form(self.score, q.shape[3], geometry)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * form.scale
        if form.soft_cap is not None:
            scores = form.soft_cap * torch.tanh(scores / form.soft_cap)
        q_tokens, k_tokens = torch.arange(extent.Lq)[None], torch.arange(extent.Lk)[None]
        for term in form.terms:
            values = term.values(term.parameter, q_tokens, k_tokens, geometry)
            scores = scores + values.squeeze(1).to(scores.dtype)
        visible = self.pattern.allows(
            extent.q_positions()[:, None], extent.k_positions()[None], extent
        ).to(q.device)
        if visible.dim() == 4 and visible.shape[1] not in (1, q.shape[2]):
            visible = visible.repeat_interleave(q.shape[2] // visible.shape[1], dim=1)
        return scores.masked_fill(~visible, -torch.inf)

    def _leaves(self, dtype: torch.dtype) -> Inputs:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        return q, k, v


def results_of(
    run: Callable[[], tuple[Tensor, Tensor | None]],
    leaves: Inputs | None,
    weights: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """Output, lse where there is one, and the gradients of a weighted sum of both."""
    o, lse = run()
    results = {"o": o.detach()}
    loss = (o * weights[0].to(o.dtype)).sum()
    if lse is not None:
        results["lse"] = lse.detach()
        loss = loss + (lse * weights[1].to(lse.dtype)).sum()
    if leaves is not None:
        gradients = torch.autograd.grad(loss, leaves)
        results |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return results


def _sample(case: Case) -> Tensor:
    """All query rows, or the first, the last and a random choice of those between."""
    wanted = max(_PAIRS // max(case.batch * case.tokens * case.q_heads, 1), 16)
    if wanted >= case.tokens:
        return torch.arange(case.tokens)
    source = torch.Generator().manual_seed(2)
    between = torch.randperm(case.tokens - 2, generator=source)[: wanted - 2] + 1
    return torch.cat([torch.tensor([0, case.tokens - 1]), between]).sort().values
