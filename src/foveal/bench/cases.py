"""The problems that are timed: frozen cases, written-out suites, the shapes of the catalogue."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from foveal._errors import UnknownNameError
from foveal.bench.measure import BOTH, DEFAULT_BUDGET, FORWARD, Budget
from foveal.bench.requirements import AtMostGrows, AtMostTakes, FasterThan, Requirement
from foveal.patterns import Causal, Extent, Neighborhood, Partition, Pattern, Sliding
from foveal.scores import Score, Softmax
from foveal.scores.base import Composed

if TYPE_CHECKING:
    from foveal.bench.ops import OpCase
    from foveal.systems import System

_PLAIN = Softmax()


@dataclass(frozen=True)
class Point:
    """Where a case stands in a plot: on line `line`, at `x` tokens of length or of window side."""

    axis: Literal["length", "window"]
    line: str
    x: float


@dataclass(frozen=True)
class Case:
    """One attention problem: q [batch, *grid, q_heads, head_dim], k and v with kv_heads.

    `name` is unique in its suite and says what a reader must know.  `against` names the only
    peers that it is measured against; None: all peers of the run.  `column` is its place in the map
    of implementations and patterns; empty: it has none.
    """

    name: str
    pattern: Pattern
    grid: tuple[int, ...]
    score: Score = _PLAIN
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.float32
    backward: bool = True
    points: tuple[Point, ...] = ()
    against: tuple[str, ...] | None = None
    column: str = ""

    @property
    def extent(self) -> Extent:
        return Extent(self.grid, self.grid)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def inputs(self, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v from a standard normal distribution, the same in every run on such a device."""
        source = torch.Generator(device).manual_seed(seed)
        shapes = (
            (self.batch, *self.grid, self.q_heads, self.head_dim),
            (self.batch, *self.grid, self.kv_heads, self.head_dim),
            (self.batch, *self.grid, self.kv_heads, self.value_dim),
        )
        q, k, v = (
            torch.randn(shape, generator=source, device=device).to(self.dtype) for shape in shapes
        )
        return q, k, v

    def describe(self) -> dict[str, Any]:
        """The case as JSON data."""
        return {
            "name": self.name,
            "pattern": self.pattern.key,
            "score": self.score.key,
            "grid": list(self.grid),
            "batch": self.batch,
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "backward": self.backward,
            "points": [{"axis": p.axis, "line": p.line, "x": p.x} for p in self.points],
            "column": self.column,
        }

    def key(self, device: torch.device, threads: int) -> str:
        """The identity of a measurement across runs: the problem, and what it runs on."""
        about = self.describe()
        del about["points"], about["column"]
        values = " ".join(f"{name}={value}" for name, value in about.items())
        return f"{values} device={device.type} threads={threads}"


@dataclass(frozen=True)
class Suite:
    """Cases measured in one run, against which peers, and what is required of the result.

    `implementations` of ours are measured too, each on its own, beside the one that the plan chooses.
    """

    name: str
    summary: str
    cases: tuple[Case | OpCase, ...]
    against: tuple[str, ...]
    requirements: tuple[Requirement, ...] = ()
    budget: Budget = DEFAULT_BUDGET
    implementations: tuple[str, ...] = ()


def _image(
    side: int,
    window: int,
    *axes: Literal["length", "window"],
    backward: bool = True,
    against: tuple[str, ...] | None = None,
) -> Case:
    points = {
        "length": Point("length", "2-D neighborhood 13x13, 4 heads of 64", side * side),
        "window": Point("window", "2-D neighborhood on 96x96 tokens, 4 heads of 64", window),
    }
    return Case(
        f"image {side}x{side}, window {window}x{window}",
        Neighborhood(window=(window, window)),
        (side, side),
        backward=backward,
        points=tuple(points[axis] for axis in axes),
        against=against,
    )


def _text(length: int, window: int, backward: bool = True) -> Case:
    return Case(
        f"text {length}, causal window {window}",
        Sliding(left=window - 1),
        (length,),
        backward=backward,
        points=(Point("length", f"causal window of {window}, 4 heads of 64", length),),
    )


_IMAGE = _image(96, 13, "length", "window")
_SMALL_IMAGE = _image(48, 13, "length")
_LARGE_IMAGE = _image(192, 13, "length", against=())
_TEXT = _text(16384, 512)

CPU = Suite(
    "cpu",
    "what is required of the tiled CPU implementation, with the sweeps around it",
    (
        _IMAGE,
        _TEXT,
        _SMALL_IMAGE,
        _LARGE_IMAGE,
        _image(24, 13, "length"),
        *(_image(96, window, "window", backward=False) for window in (3, 7, 25, 49)),
        *(_text(length, 512) for length in (2048, 4096, 8192)),
        Case(
            "text 8192, look-around windows of 512",
            Partition(size=512, before=512) & Causal(),
            (8192,),
        ),
    ),
    against=("masked", "dense", "flex", "natten", "local_attention"),
    requirements=(
        FasterThan("masked", _IMAGE.name, FORWARD, at_least=10, goal=20),
        FasterThan("masked", _IMAGE.name, BOTH, at_least=10, goal=20),
        FasterThan("flex", _IMAGE.name, FORWARD, at_least=3, goal=6),
        FasterThan("flex", _IMAGE.name, BOTH, at_least=3, goal=6),
        AtMostTakes("masked", _IMAGE.name, FORWARD, share=0.1),
        AtMostTakes("masked", _IMAGE.name, BOTH, share=0.1),
        FasterThan("masked", _TEXT.name, FORWARD, at_least=20),
        FasterThan("masked", _TEXT.name, BOTH, at_least=20),
        AtMostGrows(_SMALL_IMAGE.name, _IMAGE.name, FORWARD, factor=4.6),
        AtMostGrows(_SMALL_IMAGE.name, _IMAGE.name, BOTH, factor=4.6),
        AtMostGrows(_IMAGE.name, _LARGE_IMAGE.name, FORWARD, factor=4.6),
        AtMostGrows(_IMAGE.name, _LARGE_IMAGE.name, BOTH, factor=4.6),
    ),
)

DEMO = Suite(
    "demo",
    "the shapes of the demonstration: an image and a small language model",
    (
        _image(48, 13),
        *(_image(96, window, "window", backward=False) for window in (5, 13, 25)),
        Case(
            "Gemma-3 270M sliding layer, 2048 tokens",
            Sliding(left=511),
            (2048,),
            kv_heads=1,
            head_dim=256,
            value_dim=256,
        ),
        _text(4096, 512),
        _text(8192, 512, backward=False),
    ),
    against=("masked", "dense"),
    budget=Budget(seconds=4.0),
)

SMOKE = Suite(
    "smoke",
    "tiny cases that show in seconds that everything runs",
    (
        Case("image 12x10, window 5x5", Neighborhood(window=5), (12, 10), q_heads=2, kv_heads=2,
             head_dim=16, value_dim=16, points=(Point("length", "2-D neighborhood 5x5", 120),)),
        Case("image 24x20, window 5x5", Neighborhood(window=5), (24, 20), q_heads=2, kv_heads=2,
             head_dim=16, value_dim=16, points=(Point("length", "2-D neighborhood 5x5", 480),)),
        Case("text 256, causal window 32", Sliding(left=31), (256,), q_heads=4, kv_heads=2,
             head_dim=16, value_dim=24),
    ),
    against=("masked", "dense"),
    budget=Budget(seconds=0.3, warm_up=0.02),
)  # fmt: skip

SUITES = (CPU, DEMO, SMOKE)


def suite(name: str) -> Suite:
    """The written-out suite of that name."""
    for each in SUITES:
        if each.name == name:
            return each
    raise UnknownNameError("suite", name, (*(each.name for each in SUITES), "masks", "sparse"))


def system_suite(system: System, device: torch.device) -> Suite:
    """A suite of the reference shapes of a system; on CPU with as many heads as it can bear."""
    from foveal.bench.ops import op_cases

    most = _CPU_ELEMENTS if device.type == "cpu" else None
    if system.compose is None:
        return Suite(system.name, system.title, op_cases(system, most), ())
    shapes = system.reference_shapes
    cases = tuple(_system_case(system, shape, most, device) for shape in shapes)
    against = ("masked", "dense", "flex", "natten", "local_attention")
    return Suite(system.name, system.title, cases, against)


_CPU_ELEMENTS = 2**24
"""Elements of q beyond which a reference shape made for GPUs is timed on fewer heads."""


def _system_case(
    system: System, shape: Mapping[str, Any], most: int | None, device: torch.device
) -> Case:
    grid, heads, head_dim = tuple(shape["grid"]), shape["heads"], shape["head_dim"]
    kv_heads = shape.get("kv_heads", heads)
    per_group = math.prod(grid) * head_dim * (heads // kv_heads)
    groups = kv_heads if most is None else min(kv_heads, max(most // per_group, 1))
    timed = heads // kv_heads * groups
    share = f"{timed} of its {heads}" if timed < heads else f"{heads}"
    options = dict(shape.get("options", {}))
    said = "".join(f", {name} {value}" for name, value in options.items())
    return Case(
        f"{system.name} on {'x'.join(str(n) for n in grid)}, {share} heads{said}",
        system.pattern(grid, **options),
        grid,
        score=score_on(system.score(grid, **options), device),
        q_heads=timed,
        kv_heads=groups,
        head_dim=head_dim,
        value_dim=shape.get("value_dim", head_dim),
    )


def score_on(score: Score, device: torch.device) -> Score:
    """The score with its tensors on the device."""
    if isinstance(score, Composed):
        return Composed(tuple(score_on(member, device) for member in score.members))
    if not is_dataclass(score):
        return score
    held = {entry.name: getattr(score, entry.name) for entry in fields(score)}
    moved = {name: x.to(device) for name, x in held.items() if isinstance(x, Tensor)}
    return replace(score, **moved) if moved else score


def with_dtype(
    cases: tuple[Case | OpCase, ...], dtype: torch.dtype | None
) -> tuple[Case | OpCase, ...]:
    """The same cases in another precision."""
    return cases if dtype is None else tuple(replace(case, dtype=dtype) for case in cases)
