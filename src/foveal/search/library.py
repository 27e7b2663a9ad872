"""Templates of the library as tasks: operators at some sizes, with declared parameters and switches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foveal._errors import TaskError, UnknownNameError
from foveal.search.compiling import check_target
from foveal.search.prior import Known
from foveal.search.space import Point, Space, choice, flag, powers, steps
from foveal.search.task import HIDDEN, TIMED, VERIFIED, Case, Input, Task
from foveal.search.templates import tile_traits
from foveal.tuning.tables import FORWARD

_SHARED = 227 << 10
_MODULES = "foveal.search.templates."


@dataclass(frozen=True)
class Template:
    """A kernel of ours: its module, what is fixed, what may be chosen, and the sizes it is judged at.

    `sizes` are (role, shapes of the inputs), `on_device` those on a GPU, in bfloat16; `environment` is set
    before the module is imported; `known` reads what was measured of kindred kernels on a GPU.
    """

    summary: str
    module: str
    fixed: Mapping[str, Any]
    space: Space
    sizes: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...]
    dtype: str = "float32"
    gradients: bool = True
    names: tuple[str, ...] = ("q", "k", "v")
    signature: tuple[str, ...] = ()
    interpreted: bool = field(default=False)
    known: Callable[[], Sequence[Known]] = tuple
    on_device: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = ()


def _same(role: str, *shapes: tuple[int, ...]) -> tuple[str, tuple[tuple[int, ...], ...]]:
    return role, shapes


def _thrice(role: str, *shape: int) -> tuple[str, tuple[tuple[int, ...], ...]]:
    return role, (shape,) * 3


def _fits(point: Point) -> bool:
    """Tiles of q, k and v of 128 channels of 2 bytes within the shared memory of an H100."""
    queries, keys = int(point["queries"]), int(point["keys"])
    stages, warps = int(point["stages"]), int(point["warps"])
    shared = 256 * (queries + 2 * keys * stages)
    return shared <= _SHARED and 2048 <= queries * keys * 8 // warps <= 32768


_TILES = Space(
    (
        powers("queries", 16, 128, 64),
        powers("keys", 16, 128, 32),
        powers("warps", 2, 8, 4),
        steps("stages", 1, 2, 3, 4),
    ),
    _fits,
    functools.partial(tile_traits.traits, FORWARD),
)
_TILED = Space(
    (
        powers("q_tile", 32, 1024, 64),
        powers("kv_tile", 32, 1024, 64),
        flag("skip"),
        flag("base2"),
        flag("heads_first"),
        choice("scaled", "scores", "queries"),
    )
)
_WALK = Space(
    (
        steps("calls", 1250, 2500, 5000, 10000, 20000, 40000, begins=5000),
        steps("rows", 9, 18, 36, 72, begins=18),
        powers("sweep", 512, 8192, 2048),
    )
)

TEMPLATES: dict[str, Template] = {
    "attention/causal": Template(
        "causal attention in tiles, in plain PyTorch: tile sizes and six switches",
        "attention",
        {"causal": True},
        _TILED,
        (
            _same(VERIFIED, (2, 5, 8), (2, 7, 8), (2, 7, 8)),
            _same(VERIFIED, (1, 33, 16), (1, 33, 16), (1, 33, 16)),
            _thrice(TIMED, 4, 256, 32),
            _thrice(HIDDEN, 3, 130, 24),
        ),
    ),
    "attention/dense": Template(
        "dense attention in tiles, in plain PyTorch",
        "attention",
        {"causal": False},
        _TILED,
        (
            _same(VERIFIED, (2, 5, 8), (2, 7, 8), (2, 7, 8)),
            _thrice(TIMED, 4, 256, 32),
            _thrice(HIDDEN, 3, 130, 24),
        ),
    ),
    "cpu/sliding": Template(
        "the tiled edition on a CPU, a window of 256: the numbers that it estimates tiles by",
        "cpu_walk",
        {"pattern": "sliding"},
        _WALK,
        (
            _thrice(VERIFIED, 1, 300, 2, 16),
            _thrice(TIMED, 1, 2048, 4, 64),
            _thrice(HIDDEN, 1, 1100, 3, 64),
        ),
    ),
    "cpu/neighborhood": Template(
        "the tiled edition on a CPU, a window of 9 x 9: the numbers that it estimates tiles by",
        "cpu_walk",
        {"pattern": "neighborhood"},
        _WALK,
        (
            _thrice(VERIFIED, 1, 11, 13, 2, 16),
            _thrice(TIMED, 1, 40, 44, 4, 64),
            _thrice(HIDDEN, 1, 25, 31, 3, 64),
        ),
    ),
    "tile/causal": Template(
        "the portable tile kernels, causal; in Triton's interpreter where there is no GPU",
        "tile",
        {"pattern": "causal"},
        _TILES,
        (
            _thrice(VERIFIED, 1, 9, 1, 16),
            _thrice(TIMED, 1, 17, 1, 16),
            _thrice(HIDDEN, 1, 19, 1, 16),
        ),
        gradients=False,
        interpreted=True,
        known=tile_traits.known,
        on_device=(
            _thrice(VERIFIED, 1, 130, 2, 64),
            _thrice(TIMED, 1, 2048, 8, 64),
            _thrice(HIDDEN, 1, 1500, 4, 64),
        ),
    ),
    "tile/neighborhood": Template(
        "the portable tile kernels, a window of 9 x 9; in Triton's interpreter where there is no GPU",
        "tile",
        {"pattern": "neighborhood"},
        _TILES,
        (
            _thrice(VERIFIED, 1, 9, 9, 1, 16),
            _thrice(TIMED, 1, 9, 10, 1, 16),
            _thrice(HIDDEN, 1, 10, 9, 1, 16),
        ),
        gradients=False,
        interpreted=True,
        known=tile_traits.known,
        on_device=(
            _thrice(VERIFIED, 1, 11, 13, 2, 64),
            _thrice(TIMED, 1, 48, 48, 8, 64),
            _thrice(HIDDEN, 1, 30, 41, 4, 64),
        ),
    ),
    "rows/softmax": Template(
        "a kernel on rows with a body that may be written anew; in Triton's interpreter without a GPU",
        "rows",
        {},
        Space((powers("warps", 1, 8, 4),)),
        (
            _same(VERIFIED, (3, 5), (5,)),
            _same(TIMED, (6, 130), (130,)),
            _same(HIDDEN, (5, 33), (33,)),
        ),
        gradients=False,
        names=("x", "w"),
        signature=("p_x", "p_w", "p_o", "columns", "TILE"),
        interpreted=True,
    ),
}


def template_task(
    name: str, device: str = "cpu", threads: int = 1, targets: tuple[str, ...] = ()
) -> Task:
    """The task of a template.

    targets: classes of devices that every candidate must compile for as well; on the CPU, where the
    kernels run in Triton's interpreter, nothing is timed then.  Raises UnknownNameError, and TaskError for a
    target that is not known or a template that is not written in Triton.
    """
    if name not in TEMPLATES:
        raise UnknownNameError("template", name, tuple(TEMPLATES))
    template = TEMPLATES[name]
    if targets and not template.interpreted:
        raise TaskError(
            f"compile-for: {name} is not written in Triton, so there is nothing to compile"
        )
    for target in targets:
        check_target(target)
    program: dict[str, Any] = {"kind": "template", "module": _MODULES + template.module}
    if template.interpreted and device == "cpu":
        program["environment"] = {"TRITON_INTERPRET": "1"}
    large = bool(template.on_device) and device != "cpu"
    cases = tuple(
        Case(
            " ".join("x".join(map(str, shape)) for shape in shapes),
            tuple(
                Input(label, shape, "bfloat16" if large else template.dtype)
                for label, shape in zip(template.names, shapes, strict=True)
            ),
            role,
        )
        for role, shapes in (template.on_device if large else template.sizes)
    )
    if template.signature:
        program["signature"] = list(template.signature)
    return Task(
        name,
        {**program, "options": {**template.fixed, "reference": True}},
        cases,
        {**program, "options": dict(template.fixed)},
        template.space,
        gradients=template.gradients,
        device=device,
        threads=threads,
        targets=targets,
        timed=device != "cpu" or not targets,
    )
