"""foveal as a competitor among the others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import foveal as fv
from foveal._errors import RefusedError
from foveal.bench.baselines.base import Competitor, Inputs, Prepared
from foveal.bench.cases import score_on
from foveal.bench.requirements import OURS

if TYPE_CHECKING:
    from foveal._explain import Explanation
    from foveal.bench.cases import Case


class Foveal(Competitor):
    """`foveal.attend`, by the plan's choice or, where one is named, by that implementation."""

    name = OURS
    title = "foveal"

    def __init__(self, implementation: str | None = None) -> None:
        self.implementation = implementation
        if implementation is not None:
            self.name = f"{OURS}-{implementation}"  # type: ignore[misc]
            self.title = f"foveal, {implementation}"  # type: ignore[misc]

    def explained(self, case: Case, device: torch.device) -> Explanation:
        """What `explain` answers about the case; raises RefusedError."""
        shapes = (
            (case.batch, *case.grid, case.q_heads, case.head_dim),
            (case.batch, *case.grid, case.kv_heads, case.head_dim),
            (case.batch, *case.grid, case.kv_heads, case.value_dim),
        )
        q, k, v = (torch.empty(shape, dtype=case.dtype, device="meta") for shape in shapes)
        return fv.explain(
            q,
            k,
            v,
            case.pattern,
            score_on(case.score, torch.device("meta")),
            implementation=self.implementation,
            device=device.type,
        )

    def refuses(self, case: Case, device: torch.device) -> str | None:
        try:
            self.explained(case, device)
        except RefusedError as error:
            return error.reason
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        named = self.implementation

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = fv.attend(q, k, v, case.pattern, case.score, implementation=named)
            return out

        def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = fv.attend(
                q, k, v, case.pattern, case.score, return_lse=True, implementation=named
            )
            return out, lse

        # PyTorch's fused attention keeps its lse to itself.
        return Prepared(inputs, run, with_lse=None if named == "sdpa" else with_lse)

    def plan(self, case: Case, device: torch.device) -> dict[str, Any]:
        """What `explain` answers, as JSON data."""
        plan: dict[str, Any] = json.loads(json.dumps(self.explained(case, device).as_dict()))
        return plan
