"""The exponential weight, its scale, its cap and its sink."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveal._arguments import finite, tensors_or_none
from foveal._errors import ScoreError
from foveal.scores.base import Geometry, Score, check_scale


@dataclass(frozen=True, slots=True, eq=False)
class Softmax(Score):
    """w_ij = exp(s_ij - lse_i),  s_ij = c tanh(scale q_i.k_j / c),  lse_i = log(sum_j exp(s_ij) + exp(sink)).

    Options: scale, default D ** -0.5; soft_cap c > 0 in units of the score, default none; sink, one
    logit per query head [Hq], an extra term of the denominator with no value behind it, default none.
    Without soft_cap s_ij = scale q_i.k_j, without sink its term is 0.
    Paper: soft cap: Gemma 2 (2408.00118); sink logit: gpt-oss (2508.10925).
    """

    scale: float | None = None
    soft_cap: float | None = None
    sink: Tensor | None = None

    def __post_init__(self) -> None:
        check_scale(self.scale)
        tensors_or_none(sink=self.sink)
        if self.soft_cap is not None and not (finite(self.soft_cap) and self.soft_cap > 0):
            raise ScoreError("soft_cap", self.soft_cap, "a finite number above 0 is needed")

    @property
    def key(self) -> str:
        shown = [
            f"{name}={value}"
            for name, value in (("scale", self.scale), ("soft_cap", self.soft_cap))
            if value is not None
        ]
        if self.sink is not None:
            shown.append(f"sink[{len(self.sink)}]")
        return f"Softmax({', '.join(shown)})"

    def validate(self, geometry: Geometry) -> None:
        if self.sink is not None and tuple(self.sink.shape) != (geometry.q_heads,):
            raise ScoreError(
                "sink",
                list(self.sink.shape),
                f"one logit per query head, [{geometry.q_heads}], is needed",
            )
