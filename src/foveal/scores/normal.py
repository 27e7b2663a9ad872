"""The one form in which engines see a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveal._errors import ScoreError
from foveal.scores.base import Additive, Composed, Geometry, Score
from foveal.scores.softmax import Softmax


@dataclass(frozen=True)
class NormalForm:
    """softmax(cap(scale q.k) + terms), with a sink in the denominator."""

    engine: ClassVar[str] = "tile"
    scale: float
    soft_cap: float | None
    sink: Tensor | None
    terms: tuple[Additive, ...]

    @property
    def plain(self) -> bool:
        """Nothing but a scale."""
        return self.soft_cap is None and self.sink is None and not self.terms

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors of the terms, then the sink if there is one."""
        sink = () if self.sink is None else (self.sink,)
        return (*(term.parameter for term in self.terms), *sink)

    @property
    def names(self) -> tuple[str, ...]:
        """What errors call the parameters."""
        sink = () if self.sink is None else ("sink",)
        return (*(term.argument for term in self.terms), *sink)

    def pair_flops(self, head_dim: int, value_dim: int) -> int:
        return 2 * (head_dim + value_dim)

    def with_parameters(self, parameters: Sequence[Tensor]) -> NormalForm:
        """The same with other tensors, in the order of `parameters`."""
        terms = tuple(type(term)(x) for term, x in zip(self.terms, parameters, strict=False))  # type: ignore[call-arg]
        sink = None if self.sink is None else parameters[len(terms)]
        return NormalForm(self.scale, self.soft_cap, sink, terms)


def normal_form(score: Score, head_dim: int, geometry: Geometry) -> NormalForm:
    """Collects the members of a score and checks that they fit together and fit the problem."""
    members = score.members if isinstance(score, Composed) else (score,)
    softmaxes = [member for member in members if isinstance(member, Softmax)]
    terms = [member for member in members if isinstance(member, Additive)]
    if len(softmaxes) > 1:
        raise ScoreError("score", score.key, "at most one Softmax is needed in a sum")
    if len(softmaxes) + len(terms) < len(members):
        raise ScoreError("score", score.key, "a sum of Softmax and additive terms is needed")
    for softmax in softmaxes:
        softmax.validate(geometry)
    for term in terms:
        term.validate(geometry)
    return collect(score, head_dim)


def collect(score: Score, head_dim: int) -> NormalForm:
    """The normal form of a score whose like `normal_form` has checked."""
    members = score.members if isinstance(score, Composed) else (score,)
    softmax = next((member for member in members if isinstance(member, Softmax)), Softmax())
    terms = tuple(member for member in members if isinstance(member, Additive))
    scale = head_dim**-0.5 if softmax.scale is None else softmax.scale
    return NormalForm(scale, softmax.soft_cap, softmax.sink, terms)
