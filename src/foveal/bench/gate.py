"""The gate: what is wrong is never timed.

Output, lse and every gradient of a competitor are compared with the float64 `reference`, inside
the bound of `foveal.testing.bounds`.  Where all rows at once would not fit, the loss involves a
sample of query rows only: then the output is checked on those rows and the gradients of q, k and
v are checked whole, against the exact gradients of that loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import foveal as fv
from foveal.bench.baselines.base import Inputs, Prepared
from foveal.bench.cases import Case
from foveal.patterns import Extent, Pattern
from foveal.testing import bounds

_PAIRS = 2**22
"""Pairs of query and key, over all heads, that the reference evaluates at once."""


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


@dataclass(frozen=True)
class Gate:
    """Checks competitors on one case and one set of inputs; reference results are shared."""

    case: Case
    inputs: Inputs
    _truths: dict[str, _Truth] = field(default_factory=dict)

    def verdicts(self, prepared: Prepared, pattern: Pattern) -> list[bounds.Verdict]:
        """One verdict for the output, the lse and each gradient that the competitor offers."""
        if pattern.key not in self._truths:
            self._truths[pattern.key] = _Truth.of(self.case, pattern, self.inputs)
        truth = self._truths[pattern.key]
        found = self._evaluate(prepared, truth)
        with_lse = "lse" in found
        exact, plain = truth.exact[with_lse], truth.plain[with_lse]
        return [bounds.check(name, found[name], plain[name], exact[name]) for name in found]

    def _evaluate(self, prepared: Prepared, truth: _Truth) -> dict[str, Tensor]:
        leaves = prepared.leaves() if prepared.backward else prepared.inputs

        def run() -> tuple[Tensor, Tensor | None]:
            with torch.set_grad_enabled(prepared.backward):
                if prepared.with_lse is not None:
                    o, lse = prepared.with_lse(*leaves)
                    return truth.of_tokens(prepared.tokens(o)), lse.flatten(1, -2)[:, truth.rows]
                return truth.of_tokens(prepared.tokens(prepared.attend(*leaves))), None

        results = _results(run, leaves if prepared.backward else None, truth.weights)
        for name in ("dq", "dk", "dv"):
            if name in results:
                results[name] = prepared.tokens(results[name]).flatten(1, -3)
        return results


@dataclass(frozen=True)
class _Truth:
    """Exact and plain results of a pattern, on some rows, by whether the loss takes the lse."""

    rows: Tensor
    weights: tuple[Tensor, Tensor]
    exact: dict[bool, dict[str, Tensor]]
    plain: dict[bool, dict[str, Tensor]]

    @classmethod
    def of(cls, case: Case, pattern: Pattern, inputs: Inputs) -> _Truth:
        rows = _rows(case)
        source = torch.Generator().manual_seed(1)
        shape = (case.batch, len(rows), case.q_heads)
        weights = torch.randn(*shape, case.value_dim, generator=source)
        lse_weights = torch.randn(*shape, generator=source)
        device = inputs[0].device
        cotangents = (weights.to(device), lse_weights.to(device))
        sampled = SampledRows(pattern, case.extent, tuple(rows.tolist()))

        def evaluate(dtype: torch.dtype, with_lse: bool) -> dict[str, Tensor]:
            q, k, v = (t.detach().flatten(1, -3).to(dtype).requires_grad_() for t in inputs)

            def run() -> tuple[Tensor, Tensor | None]:
                o, lse = fv.attend(
                    q[:, rows],
                    k,
                    v,
                    sampled,
                    case.score,
                    return_lse=True,
                    implementation="reference",
                )
                return o, lse if with_lse else None

            return _results(run, (q, k, v), cotangents)

        both = (True, False)
        exact = {with_lse: evaluate(torch.float64, with_lse) for with_lse in both}
        plain = {with_lse: evaluate(case.dtype, with_lse) for with_lse in both}
        return cls(rows, cotangents, exact, plain)

    def of_tokens(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(1, -3)[:, self.rows]


def _results(
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


def _rows(case: Case) -> Tensor:
    """All query rows, or the first, the last and a random choice of those between."""
    wanted = max(_PAIRS // max(case.batch * case.tokens * case.q_heads, 1), 16)
    if wanted >= case.tokens:
        return torch.arange(case.tokens)
    source = torch.Generator().manual_seed(2)
    between = torch.randperm(case.tokens - 2, generator=source)[: wanted - 2] + 1
    return torch.cat([torch.tensor([0, case.tokens - 1]), between]).sort().values
