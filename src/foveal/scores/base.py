"""What a score is: how a visible pair counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from torch import Tensor

from foveal._arguments import finite, need_tensors
from foveal._errors import ScoreError
from foveal.patterns.base import Extent, Pattern

F = TypeVar("F", bound="Form")


@dataclass(frozen=True)
class Geometry:
    """Where a score is evaluated: the pattern as the caller wrote it, on its extent."""

    pattern: Pattern
    extent: Extent
    batch: int
    q_heads: int
    kv_heads: int


class Score:
    """How a visible pair of query and key counts.

    Scores compose with `+`; whatever the order of writing, a pair counts as
    softmax(soft_cap(scale * q.k) + all additive terms).
    """

    __slots__ = ()

    # The family of engines that computes it.
    engine: ClassVar[str] = "tile"

    def __add__(self, other: Score) -> Composed:
        if not isinstance(other, Score):
            return NotImplemented
        return Composed((*_members(self), *_members(other)))

    @property
    def key(self) -> str:
        """A written identity of the kind of score; tensors are named, not compared."""
        return repr(self)


@dataclass(frozen=True, slots=True)
class Composed(Score):
    """Several scores at once; written `a + b`."""

    members: tuple[Score, ...]

    @property
    def key(self) -> str:
        return " + ".join(member.key for member in self.members)


def check_scale(scale: object) -> None:
    """Raises ScoreError unless the scale is a finite number or left out."""
    if scale is not None and not finite(scale):
        raise ScoreError("scale", scale, "a finite number is needed; multiply q by a learned one")


def _members(score: Score) -> tuple[Score, ...]:
    return score.members if isinstance(score, Composed) else (score,)


class Additive(Score):
    """A term added to the scaled (and capped) product of a pair."""

    __slots__ = ()

    # What the errors call the parameter.
    argument: ClassVar[str]

    def __post_init__(self) -> None:
        need_tensors(**{self.argument: self.parameter})

    @property
    def parameter(self) -> Tensor:
        """The tensor that the values are made from, and that receives the gradient."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        return f"{type(self).__name__}({'x'.join(str(n) for n in self.parameter.shape)})"

    def validate(self, geometry: Geometry) -> None:
        """Raises ScoreError when the term does not fit the problem."""
        raise NotImplementedError

    def values(self, parameter: Tensor, q_tokens: Tensor, k_tokens: Tensor, at: Geometry) -> Tensor:
        """Values of pairs, differentiable in `parameter`.

        Shapes: q_tokens [P, q], k_tokens [P, k] int64 indices of tokens (P independent sub-problems);
        returns what broadcasts to [B, P, Hq, q, k].
        """
        raise NotImplementedError


class Form(Protocol):
    """A score as the implementations of its family see it."""

    @property
    def engine(self) -> str:
        """The family."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors of the score."""

    @property
    def names(self) -> tuple[str, ...]:
        """What errors call the parameters."""

    def with_parameters(self: F, parameters: Sequence[Tensor]) -> F:
        """The same with other tensors, in the order of `parameters`."""

    def pair_flops(self, head_dim: int, value_dim: int) -> int:
        """FLOPs of the forward per visible pair and query head."""
