"""foveal as a competitor among the others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torch import Tensor

import foveal as fv
from foveal.bench.baselines.base import Competitor, Inputs, Prepared
from foveal.bench.requirements import OURS

if TYPE_CHECKING:
    from foveal.bench.cases import Case


class Foveal(Competitor):
    """`foveal.attend`, by the plan's choice."""

    name = OURS
    title = "foveal"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = fv.attend(q, k, v, case.pattern, case.score)
            return out

        def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = fv.attend(q, k, v, case.pattern, case.score, return_lse=True)
            return out, lse

        return Prepared(inputs, run, with_lse=with_lse)

    def plan(self, case: Case, inputs: Inputs) -> dict[str, Any]:
        """What `explain` answers, as JSON data."""
        answer = fv.explain(*inputs, case.pattern, case.score).as_dict()
        plan: dict[str, Any] = json.loads(json.dumps(answer))
        return plan
