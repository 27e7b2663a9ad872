"""The gate: what is wrong is never timed.

Output, lse and every gradient of a competitor are compared with the truth about the case, inside
the bound of `foveal.testing.bounds`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveal.bench.baselines.base import Competitor, Inputs, Prepared
from foveal.bench.cases import Case
from foveal.bench.truth import Truth, results_of
from foveal.testing import bounds


@dataclass(frozen=True)
class Gate:
    """Checks competitors on one case and one set of inputs; their truths are shared."""

    case: Case
    inputs: Inputs
    _truths: dict[str, Truth] = field(default_factory=dict)

    def verdicts(self, prepared: Prepared, competitor: Competitor) -> list[bounds.Verdict]:
        """One verdict for the output, the lse and each gradient that the competitor offers."""
        pattern = competitor.pattern(self.case)
        if pattern.key not in self._truths:
            self._truths[pattern.key] = Truth.of(self.case, pattern, self.inputs)
        truth = self._truths[pattern.key]
        return truth.verdicts(self._evaluate(prepared, truth))

    def _evaluate(self, prepared: Prepared, truth: Truth) -> dict[str, Tensor]:
        leaves = prepared.leaves() if prepared.backward else prepared.inputs

        def run() -> tuple[Tensor, Tensor | None]:
            with torch.set_grad_enabled(prepared.backward):
                if prepared.with_lse is not None:
                    o, lse = prepared.with_lse(*leaves)
                    return truth.of_tokens(prepared.tokens(o)), lse.flatten(1, -2)[:, truth.rows]
                return truth.of_tokens(prepared.tokens(prepared.attend(*leaves))), None

        results = results_of(run, leaves if prepared.backward else None, truth.weights)
        for name in ("dq", "dk", "dv"):
            if name in results:
                results[name] = prepared.tokens(results[name]).flatten(1, -3)
        return results
