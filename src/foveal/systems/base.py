"""What an entry of the catalogue is: a named system, and the identities that it must satisfy."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from foveal._arguments import need_tensors
from foveal._errors import FovealError, PatternError, UnknownNameError
from foveal._options import check_values
from foveal._problem import Problem
from foveal.patterns.base import Extent, Pattern
from foveal.scores.base import Geometry, Score
from foveal.scores.normal import normal_form

Compose = Callable[..., tuple[Pattern, Score]]
"""compose(grid, *, option=default, ...): the pattern and the score on a grid of keys."""


class Draw:
    """Fresh random inputs in float64, all from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def integer(self, least: int, most: int) -> int:
        """A whole number, least <= n <= most."""
        return int(torch.randint(least, most + 1, (), generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def permutation(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self.generator)

    def qkv(
        self, grid: tuple[int, ...], heads: int = 2, kv_heads: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [2, *grid, heads, 3], k [2, *grid, kv_heads, 3], v [2, *grid, kv_heads, 4]"""
        kv_heads = heads if kv_heads is None else kv_heads
        return (
            self.normal(2, *grid, heads, 3),
            self.normal(2, *grid, kv_heads, 3),
            self.normal(2, *grid, kv_heads, 4),
        )


@dataclass(frozen=True)
class Claim:
    """Two functions of the same inputs that must agree, values and gradients."""

    inputs: tuple[Tensor, ...]
    left: Callable[..., Tensor]
    right: Callable[..., Tensor]


@dataclass(frozen=True)
class Identity:
    """An equation that a system satisfies, executable: `draw` makes a claim from fresh inputs."""

    name: str
    statement: str
    draw: Callable[[Draw], Claim] = field(repr=False)

    def pairs(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Tensors that must agree: ("output", left, right), then one gradient per input."""
        draw = Draw(generator)
        claim = self.draw(draw)
        inputs = tuple(x.detach().requires_grad_() for x in claim.inputs)
        left, right = claim.left(*inputs), claim.right(*inputs)
        yield "output", left.detach(), right.detach()
        weight = draw.normal(*left.shape)
        gradients = (
            torch.autograd.grad(side, inputs, weight, materialize_grads=True)
            for side in (left, right)
        )
        for number, (a, b) in enumerate(zip(*gradients, strict=True)):
            yield f"gradient of input {number}", a, b


@dataclass(frozen=True)
class System:
    """A paper's operator under its name.

    op(q, k, v, *, option=default, ...) is the operator as a function of tensors, with the paper's
    options; `layer` an nn.Module where the paper has one; `compose` the pattern and score behind
    `op` where it is a composition of the two.  `kind` is "operator" or "model" (a whole network
    whose distinctive layer is offered); `engine` the machine that runs it, "tile" or "torch" (plain
    products).  `operands` gives the shapes of the tensors of `op` for a reference shape where they are not
    q, k and v.  `reference_shapes` are dicts {"grid", "heads", "kv_heads", "head_dim"}, and "options"
    where the paper's shape goes with options of its own.
    """

    name: str
    title: str
    year: int
    paper: str
    kind: str
    summary: str
    op: Callable[..., Any] = field(repr=False)
    identities: tuple[Identity, ...] = field(repr=False)
    reference_shapes: tuple[Mapping[str, Any], ...] = field(repr=False)
    compose: Compose | None = field(default=None, repr=False)
    layer: type[nn.Module] | None = field(default=None, repr=False)
    family: str = "locality"
    engine: str = "tile"
    operands: Callable[[Mapping[str, Any]], tuple[tuple[int, ...], ...]] | None = field(
        default=None, repr=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        """Entries of the catalogue travel by name: their functions could not."""
        from foveal.systems import system, systems

        if any(entry is self for entry in systems(self.family)):
            return system, (self.name,)
        return super().__reduce__()  # type: ignore[return-value]

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Options of `op` and what they are when left out."""
        parameters = inspect.signature(self.op).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return MappingProxyType({name: options[name] for name in options if name not in _COMMON})

    def check(self, **options: Any) -> None:
        """Raises UnknownNameError for an option that `op` does not have, OptionError for a value that it
        cannot take; those of a composition are judged by its pattern and score.  Nothing is computed."""
        for name in options:
            if name not in self.defaults:
                raise UnknownNameError(f"option of {self.name}", name, tuple(self.defaults))
        if self.compose is None:
            check_values(self.op, options)

    def pattern(self, grid: tuple[int, ...], **options: Any) -> Pattern:
        """Which pairs take part on a grid of keys; PatternError where nothing is selected."""
        return self._composed(grid, options)[0]

    def score(self, grid: tuple[int, ...], **options: Any) -> Score:
        """How a pair counts on a grid of keys; PatternError where nothing is selected."""
        return self._composed(grid, options)[1]

    def supports(
        self,
        shape: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **options: Any,
    ) -> dict[str, str | None]:
        """Every implementation by name, with None or the sentence by which it refuses.

        `shape` is a dict like those of `reference_shapes`, by default the first of them.
        """
        if self.compose is None:
            return {"torch": None}
        from foveal._plan import TILE_IMPLEMENTATIONS

        shape = self.reference_shapes[0] if shape is None else shape
        grid, heads, head_dim = tuple(shape["grid"]), shape["heads"], shape["head_dim"]
        problem = Problem(
            batch=1,
            extent=Extent(grid, grid),
            q_heads=heads,
            kv_heads=shape.get("kv_heads", heads),
            head_dim=head_dim,
            value_dim=shape.get("value_dim", head_dim),
            dtype=dtype,
            device=device,
            return_lse=False,
        )
        pattern, score = composed(self.compose, grid, {**shape.get("options", {}), **options})
        pattern.validate(problem.extent)
        geometry = Geometry(pattern, problem.extent, 1, heads, problem.kv_heads)
        form = normal_form(score, head_dim, geometry)
        simple = pattern.simplify(problem.extent)
        return {
            name: module.refuses(problem, simple, form)
            for name, module in TILE_IMPLEMENTATIONS.items()
        }

    def _composed(self, grid: tuple[int, ...], options: Mapping[str, Any]) -> tuple[Pattern, Score]:
        if self.compose is None:
            raise PatternError("pattern", self.name, "a system that selects pairs is needed")
        return composed(self.compose, tuple(grid), options)


@dataclass(frozen=True)
class Check:
    """A statement about a tool, executable: `holds` with a random stream says whether it is so."""

    name: str
    statement: str
    holds: Callable[[random.Random], bool] = field(repr=False)


@dataclass(frozen=True)
class Tool:
    """A paper whose subject is no operator on tensors but a way to make or to judge kernels.

    `command` is how it is run here, `part` the public object behind it ("module:name").
    """

    name: str
    title: str
    year: int
    paper: str
    summary: str
    command: str
    part: str
    checks: tuple[Check, ...] = field(repr=False)
    family: str = "search"
    kind: str = "tool"


_COMMON = ("return_lse", "implementation")


def check_options(compose: Compose, options: Mapping[str, Any]) -> None:
    """Raises UnknownNameError for an option that the composition has not."""
    known = inspect.signature(compose).parameters.values()
    names = tuple(p.name for p in known if p.kind is p.KEYWORD_ONLY)
    for name in options:
        if name not in names:
            raise UnknownNameError("option", name, names)


def composed(
    compose: Compose, grid: tuple[int, ...], options: Mapping[str, Any]
) -> tuple[Pattern, Score]:
    """The pattern and the score of a composition, which judge the options that they get.

    OptionError where a value of the wrong kind stops it before a pattern could say so.
    """
    check_options(compose, options)
    try:
        return compose(grid, **options)
    except FovealError:
        raise
    except Exception:
        check_values(compose, options)
        raise


@contextlib.contextmanager
def naming(**options: str) -> Iterator[None]:
    """Errors inside name the option that a part was made from: naming(size="window")."""
    try:
        yield
    except PatternError as error:
        argument = options.get(error.argument, error.argument)
        raise PatternError(argument, error.got, error.needed) from None


def attending(compose: Compose) -> Callable[..., Any]:
    """The operator of a composition: `attend` with its pattern and score, and its options."""

    @functools.wraps(compose)
    def op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: bool = False,
        implementation: str | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        from foveal._attend import attend

        need_tensors(q=q, k=k, v=v)
        pattern, score = composed(compose, tuple(k.shape[1:-2]), options)
        if return_lse:
            return attend(q, k, v, pattern, score, return_lse=True, implementation=implementation)
        return attend(q, k, v, pattern, score, implementation=implementation)

    del op.__wrapped__
    own = inspect.signature(op).parameters.values()
    options = [
        p for p in inspect.signature(compose).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    fixed = [p for p in own if p.kind is not p.VAR_KEYWORD]
    op.__signature__ = inspect.Signature([*fixed, *options])  # type: ignore[attr-defined]
    return op
