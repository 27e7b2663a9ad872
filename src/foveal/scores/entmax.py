"""Weights that are exactly zero for all but the best keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveal._arguments import finite
from foveal._errors import ScoreError
from foveal.scores.base import Additive, Geometry, Score, check_scale


@dataclass(frozen=True, slots=True, eq=False)
class Entmax(Score):
    """p_ij = [(alpha - 1) s_ij - tau_i]_+ ^ (1 / (alpha - 1)), with tau_i such that sum_j p_ij = 1.

    s_ij = scale q_i.k_j.  Sparse attention without a selector: keys below the threshold tau_i have weight 0,
    exactly, and tiles without a key above it are skipped, forward and backward.
    Options: alpha in (1, 2], a number or one per query head [Hq] (a tensor gets its gradient and runs
    on "reference"); 2 is sparsemax, 1.5 the usual choice; scale, default D ** -0.5.
    Cost: forward 4 D FLOPs per visible pair for tau, then 4 (D + Dv) per pair of a block of queries and a
    key that one of them needs; backward 14 D on those.
    Limits: a sum with other scores and return_lse are refused (there is no lse; results of parts of the
    keys cannot be merged).  A value that is not finite may reach every query of the tile that sees it.
    Equals: softmax in the limit alpha -> 1; at alpha = 2 the projection of s on the simplex.
    Paper: alpha-entmax: Peters et al. (1905.05702); gradient of alpha: Correia et al. (1909.00015);
    tiles and backward: AdaSplash (2502.12082).
    """

    engine: ClassVar[str] = "entmax"
    alpha: float | Tensor = 1.5
    scale: float | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, Tensor) or (finite(self.alpha) and 1 < self.alpha <= 2)
        if not number:
            raise ScoreError("alpha", self.alpha, "a number in (1, 2] is needed")
        check_scale(self.scale)

    @property
    def key(self) -> str:
        alpha = f"[{len(self.alpha)}]" if isinstance(self.alpha, Tensor) else f"{self.alpha}"
        scale = "" if self.scale is None else f", scale={self.scale}"
        return f"Entmax({alpha}{scale})"

    def validate(self, geometry: Geometry) -> None:
        """Raises ScoreError when alpha does not fit the problem."""
        if isinstance(self.alpha, Tensor) and tuple(self.alpha.shape) != (geometry.q_heads,):
            raise ScoreError(
                "alpha",
                list(self.alpha.shape),
                f"a number or one per query head, [{geometry.q_heads}], is needed",
            )


@dataclass(frozen=True)
class EntmaxForm:
    """What the engine sees: a number alpha, or a tensor [Hq]."""

    engine: ClassVar[str] = "entmax"
    scale: float
    alpha: float | Tensor

    # What the tile engine's walks ask of a score.
    soft_cap: ClassVar[None] = None
    sink: ClassVar[None] = None
    terms: ClassVar[tuple[Additive, ...]] = ()
    plain: ClassVar[bool] = False

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.alpha,) if isinstance(self.alpha, Tensor) else ()

    @property
    def names(self) -> tuple[str, ...]:
        return ("alpha",)

    def with_parameters(self, parameters: Sequence[Tensor]) -> EntmaxForm:
        """The same with another tensor."""
        return EntmaxForm(self.scale, parameters[0]) if parameters else self

    def pair_flops(self, head_dim: int, value_dim: int) -> int:
        return 6 * head_dim + 4 * value_dim


def entmax_form(score: Score, head_dim: int, geometry: Geometry) -> EntmaxForm:
    """Checks a score against a problem and gives its form."""
    form = collect_entmax(score, head_dim)
    assert isinstance(score, Entmax)
    score.validate(geometry)
    return form


def collect_entmax(score: Score, head_dim: int) -> EntmaxForm:
    """The form of a score whose like `entmax_form` has checked."""
    if not isinstance(score, Entmax):
        raise ScoreError("score", score.key, "Entmax alone is needed")
    return EntmaxForm(head_dim**-0.5 if score.scale is None else score.scale, score.alpha)
