"""Scores that fit a line around each query instead of a constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveal._arguments import finite, need_tensors
from foveal._errors import ScoreError
from foveal.scores.base import Geometry, Score, check_scale

RidgeGrad = Literal["exact", "detached"]


@dataclass(frozen=True, slots=True, eq=False)
class LocalLinear(Score):
    """o_i = sum_j p_ij (1 - r_i.c_ij) v_j, the value at q_i of a line fitted to the visible (k_j, v_j).

    p = softmax(scale q.k), m_i = sum_j p_ij k_j, c_ij = k_j - m_i, and r_i solves
    (sum_j p_ij c_ij c_ij^T + ridge I) r_i = m_i - q_i: a ridge regression per query, whose slope is
    shrunk by `ridge` times the sum of its weights.  The weights of v add to 1 and no denominator can vanish.
    Options: ridge > 0 in units of k squared, a number or one per query head [Hq] (a tensor gets its
    gradient); scale, default D ** -0.5.  The tiled implementations solve by conjugate gradients per tile
    of queries and stop where the remaining residual can move no output by more than `tolerance`
    standard deviations of its visible values (default: half a rounding of the dtype of q), or
    after `max_iterations`; `foveal.probe.solve.solve_report` says what was reached.  ridge_grad "detached"
    takes the absolute penalty, ridge times the sum of weights, for a constant in the backward, as
    the authors' code does; "exact" is the derivative of the forward.
    Cost: 2 (4 D + Dv) + 6 D per iteration FLOPs per visible pair, where softmax needs 2 (D + Dv).
    Limits: a sum with other scores is refused.  A row that sees NaN or inf in k is NaN, in v in that column.
    Equals: softmax attention for ridge -> inf; v_j = W k_j + b gives W q_i + b for ridge -> 0 where a row
    sees more than D keys in general position; Parallax with the r that solves the system.
    Paper: Local Linear Attention (2510.01450).
    """

    engine: ClassVar[str] = "local_linear"
    ridge: float | Tensor = 1.0
    max_iterations: int = 256
    tolerance: float | None = None
    ridge_grad: RidgeGrad = "exact"
    scale: float | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.ridge, Tensor) or (finite(self.ridge) and self.ridge > 0)
        if not number:
            raise ScoreError("ridge", self.ridge, "a finite number above 0 is needed")
        if self.max_iterations < 1:
            raise ScoreError("max_iterations", self.max_iterations, "at least 1 is needed")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise ScoreError("tolerance", self.tolerance, "a finite number of at least 0 is needed")
        if self.ridge_grad not in ("exact", "detached"):
            raise ScoreError("ridge_grad", self.ridge_grad, '"exact" or "detached" is needed')
        check_scale(self.scale)

    @property
    def key(self) -> str:
        ridge = f"[{len(self.ridge)}]" if isinstance(self.ridge, Tensor) else f"={self.ridge}"
        return f"LocalLinear(ridge{ridge})"

    def validate(self, geometry: Geometry) -> None:
        """Raises ScoreError when the ridge does not fit the problem."""
        if isinstance(self.ridge, Tensor) and tuple(self.ridge.shape) != (geometry.q_heads,):
            raise ScoreError(
                "ridge",
                list(self.ridge.shape),
                f"a number or one per query head, [{geometry.q_heads}], is needed",
            )


@dataclass(frozen=True, slots=True, eq=False)
class Parallax(Score):
    """o_i = sum_j p_ij (1 - r_i.c_ij) v_j with r given: a softmax with a first-order correction.

    p = softmax(scale q.k), c_ij = k_j - sum_j p_ij k_j.
    Shapes: r [B, *grid, Hq, D] as q.
    Options: scale, default D ** -0.5.
    Cost: 2 (3 D + Dv) FLOPs per visible pair, where softmax needs 2 (D + Dv).
    Limits: as of LocalLinear.
    Equals: softmax attention for r = 0; LocalLinear for the r of its system.
    Paper: Parallax (2605.29157).
    """

    engine: ClassVar[str] = "local_linear"
    r: Tensor
    scale: float | None = None

    def __post_init__(self) -> None:
        need_tensors(r=self.r)
        check_scale(self.scale)

    @property
    def key(self) -> str:
        return "Parallax(r)"

    def validate(self, geometry: Geometry) -> None:
        """Raises ScoreError when r does not fit the problem."""
        grid, heads = geometry.extent.q_grid, geometry.q_heads
        shape = tuple(self.r.shape)
        if shape[:-1] != (geometry.batch, *grid, heads):
            raise ScoreError("r", list(shape), "the shape of q is needed")


@dataclass(frozen=True)
class LocalForm:
    """What the engine sees of either score: a ridge to solve with, or r.

    ridge is a number or a tensor [Hq]; r [B, *grid, Hq, D]; exactly one of the two is there.
    """

    engine: ClassVar[str] = "local_linear"
    scale: float
    ridge: float | Tensor | None = None
    r: Tensor | None = None
    max_iterations: int = 1
    tolerance: float | None = None
    detached: bool = False

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensor of the score, if there is one."""
        return tuple(x for x in (self.ridge, self.r) if isinstance(x, Tensor))

    @property
    def names(self) -> tuple[str, ...]:
        return ("ridge",) if self.r is None else ("r",)

    def with_parameters(self, parameters: Sequence[Tensor]) -> LocalForm:
        """The same with another tensor."""
        if not parameters:
            return self
        ridge, r = (parameters[0], None) if self.r is None else (None, parameters[0])
        rest = self.max_iterations, self.tolerance, self.detached
        return LocalForm(self.scale, ridge, r, *rest)

    def residual_limit(self, dtype: torch.dtype) -> float:
        """The tolerance, by default half a rounding."""
        return torch.finfo(dtype).eps / 2 if self.tolerance is None else self.tolerance

    def ridge_per_head(self, heads: int, like: Tensor) -> Tensor:
        """[heads] in the dtype and on the device of `like`"""
        assert self.ridge is not None
        if isinstance(self.ridge, Tensor):
            return self.ridge.to(like)
        return torch.full((heads,), self.ridge, dtype=like.dtype, device=like.device)

    def pair_flops(self, head_dim: int, value_dim: int) -> int:
        """Forward, without the iterations of a solve."""
        output = 4 * head_dim + 2 * value_dim
        return output + (4 * head_dim if self.r is None else 2 * head_dim)


def local_form(score: Score, head_dim: int, geometry: Geometry) -> LocalForm:
    """The form of a score that fits the problem; raises ScoreError otherwise."""
    assert isinstance(score, LocalLinear | Parallax)
    score.validate(geometry)
    if isinstance(score, Parallax) and score.r.shape[-1] != head_dim:
        raise ScoreError("r", list(score.r.shape), f"the head_dim of q, {head_dim}, is needed")
    return collect_local(score, head_dim)


def collect_local(score: Score, head_dim: int) -> LocalForm:
    """The form of a score whose like `local_form` has checked."""
    assert isinstance(score, LocalLinear | Parallax)
    scale = head_dim**-0.5 if score.scale is None else score.scale
    if isinstance(score, Parallax):
        return LocalForm(scale, r=score.r)
    detached = score.ridge_grad == "detached"
    return LocalForm(scale, score.ridge, None, score.max_iterations, score.tolerance, detached)
