"""Kernels whose sizes `gpu_search.py` searches: what they are launched on, and what their results must be."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gpu_state
import torch
from torch import Tensor

import foveal as fv
from foveal.engines.tile import launches as tile_launches
from foveal.patterns.documents import Packed
from foveal.search.artefact import facts_of
from foveal.search.space import Param, Point, Space, Value, steps
from foveal.search.templates import tile_traits
from foveal.testing.agreement import check_attend
from foveal.tuning import state as state_tuning
from foveal.tuning import tables
from foveal.tuning import tile as tile_tuning

BF16 = torch.bfloat16
DEVICE = "cuda"
_CHECKED = ("causal", (2048,), 8)
_ALLOWED = 2.0
"""Factor on the error of the shipped sizes that other sizes may have."""


def _space(
    start: Mapping[str, Value],
    values: Mapping[str, Sequence[Value]],
    fits: Any,
    means: Callable[[Point], Sequence[float]] | None = None,
) -> Space:
    """Ordered parameters; what is shipped belongs to the values and is the start."""
    params: list[Param] = []
    for name, known in values.items():
        every = sorted({*known, start[name]})
        params.append(steps(name, *every, begins=start[name]))
    return Space(tuple(params), fits, means)


Shape = tuple[str, tuple[int, ...], int]
"""Pattern, grid and heads."""

PATTERNS: Mapping[str, fv.Pattern] = {
    "causal": fv.Causal(),
    "dense": fv.Dense(),
    "window": fv.Neighborhood((17, 17)),
    "sliding": fv.Sliding(1023),
    "volume": fv.Neighborhood((5, 9, 9)),
    "sinks": fv.Sliding(1023, sink_tokens=64),
}
DOCUMENTS = "documents"

CLASSES: Mapping[str, str] = {
    "causal": tables.CAUSAL,
    "dense": tables.DENSE,
    "window": tables.WINDOW,
    "sliding": tables.WINDOW,
    "volume": tables.WINDOW,
    "sinks": tables.LISTS,
    DOCUMENTS: tables.DOCUMENTS,
}
"""The class of each pattern, by which sizes are looked up."""

_SEARCHED: Mapping[str, tuple[int, ...]] = {
    tables.CAUSAL: (8192,),
    tables.DENSE: (4096,),
    tables.WINDOW: (96, 112),
    tables.LISTS: (8192,),
    tables.DOCUMENTS: (8192,),
}


def pattern_of(name: str, grid: tuple[int, ...]) -> fv.Pattern:
    """A pattern by its name; documents of a quarter, an eighth, a half and the rest of the tokens."""
    if name != DOCUMENTS:
        return PATTERNS[name]
    (tokens,) = grid
    lengths = tokens // 4, tokens // 8, tokens // 2
    return Packed(fv.Causal(), (*lengths, tokens - sum(lengths)))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """One kernel of the portable tile edition, at one head_dim and type, timed alone.

    pattern: the class of patterns that it is searched and confirmed for; None: searched on causal ones,
    confirmed for all.
    """

    stage: str
    dim: int
    dtype: torch.dtype
    pattern: str | None = None

    @property
    def shapes(self) -> tuple[Shape, ...]:
        searched = self.pattern or tables.CAUSAL
        grid = _SEARCHED[searched]
        if self.dtype == torch.float32:
            grid = (grid[0] // 2, *grid[1:])
        return ((next(n for n, c in CLASSES.items() if c == searched), grid, 8),)

    @property
    def held_out(self) -> tuple[Shape, ...]:
        heads = 4 if self.dtype == torch.float32 else 8
        every: tuple[Shape, ...] = (
            ("causal", (2048,), 2 * heads),
            ("causal", (5008,), heads),
            ("sliding", (6144,), heads),
            ("dense", (3072,), heads),
            ("dense", (1500,), 2 * heads),
            ("window", (64, 80), heads),
            ("volume", (8, 24, 24), heads),
            ("sinks", (6144,), heads),
            ("sinks", (3000,), 2 * heads),
            (DOCUMENTS, (6144,), heads),
            (DOCUMENTS, (3000,), 2 * heads),
        )
        return tuple(each for each in every if self.pattern in (None, CLASSES[each[0]]))

    @property
    def shipped(self) -> tile_tuning.Config:
        architecture = tile_tuning.architecture(torch.device(DEVICE))
        return tile_tuning.shipped(self.stage, architecture, self.dim, self.dtype, self.pattern)

    @property
    def space(self) -> Space:
        found = self.shipped
        start = {
            "queries": found.queries,
            "keys": found.keys,
            "warps": found.warps,
            "stages": found.stages,
        }
        exact = self.dtype == torch.float32
        values: dict[str, Sequence[Value]] = {
            "queries": (16, 32, 64, 128) if exact else (32, 64, 128),
            "keys": (16, 32, 64, 128) if exact else (32, 64, 128),
            "warps": (4, 8, 16) if exact else (4, 8),
            "stages": (1, 2) if exact else (1, 2, 3, 4),
        }
        shipped = tuple(start.values())

        def fits(point: Point) -> bool:
            if tuple(point[name] for name in start) == shipped:
                return True
            q, k, w = (int(point[n]) for n in ("queries", "keys", "warps"))
            if exact:
                # Without matrix instructions a thread holds its part of a product in registers.
                part = q * k * self.dim // (32 * w * 128)
                return 4 <= part <= 8
            own, other = (k, q) if self.stage == tile_tuning.BACKWARD_KV else (q, k)
            shared = 2 * self.dim * (own * 2 + 2 * other * int(point["stages"]))
            return 1024 <= q * k * 8 // w <= 32768 and shared <= 232448 * 1.5

        return _space(start, values, fits, functools.partial(tile_traits.traits, self.stage))

    def call(self, point: Point, shape: Shape) -> Callable[[], object]:
        """The kernel alone, with everything that it is launched with."""
        key = self, tuple(sorted(point.items())), shape
        if key not in _LAUNCHES:
            _attended(
                shape, self.dim, self.dtype
            )  # its forward is none of those that are listened for
            with heard(f"tile_attend_{self.stage}") as found:
                self._run(point, shape)
            (launch,) = found
            _LAUNCHES[key] = launch
        return _LAUNCHES[key]  # type: ignore[no-any-return]

    def wrong(self, point: Point, shape: Shape | None = None) -> tuple[str, dict[str, float]]:
        """What is out of bounds beside the shipped sizes, both against float64; facts about the kernel."""
        shape = shape or _CHECKED
        exact = _exact(self, shape)
        peer, _, first = _kept((self, "peer", shape), lambda: self._first(self.space.first, shape))
        errors, launch, seconds = self._first(point, shape)
        if point == self.space.first:
            seconds = first  # compiled then
        for name, error in errors.items():
            floor = 2 * torch.finfo(self.dtype).eps * float(exact[name].abs().max())
            if not error <= _ALLOWED * peer[name] + floor:
                return f"{name}: error {error:.3g}, with shipped sizes {peer[name]:.3g}", {}
        compiled = launch.kernel.warmup(
            *launch.arguments, grid=(launch.programs,), **launch.options
        )
        facts = facts_of(compiled, tile_tuning.architecture(torch.device(DEVICE)))
        return "", facts | {"compile_seconds": seconds}

    def checked(self, point: Point, shapes: Sequence[Shape]) -> str:
        """What is wrong by the bound of the tests, through the whole operator with its repairs."""
        with tile_tuning.forced(self.stage, self.config(point)):
            for pattern, grid in {name: grid for name, grid, _ in shapes}.items():
                source = torch.Generator(DEVICE).manual_seed(random.randrange(1 << 30))
                small = {1: (300,), 2: (20, 21), 3: (5, 9, 11)}[len(grid)]
                q, k, v = (
                    torch.randn((1, *small, 2, self.dim), device=DEVICE, generator=source).to(
                        self.dtype
                    )
                    for _ in "qkv"
                )
                try:
                    seen = _small(pattern, small)
                    check_attend(q, k, v, seen, implementation="triton")
                except AssertionError as error:
                    return str(error)[:300]
        return ""

    def config(self, point: Point) -> tile_tuning.Config:
        return tile_tuning.Config(
            int(point["queries"]), int(point["keys"]), int(point["warps"]), int(point["stages"])
        )

    def _run(self, point: Point, shape: Shape) -> dict[str, Tensor]:
        (q, k, v), o, do = _attended(shape, self.dim, self.dtype)
        with tile_tuning.forced(self.stage, self.config(point)):
            if self.stage == tile_tuning.FORWARD:
                with torch.no_grad():
                    pattern = pattern_of(*shape[:2])
                    return {"o": fv.attend(q, k, v, pattern, implementation="triton")}
            names = "q" if self.stage == tile_tuning.BACKWARD_Q else "kv"
            leaves = [{"q": q, "k": k, "v": v}[name] for name in names]
            found = torch.autograd.grad(o, leaves, do, retain_graph=True)
            return dict(zip(names, found, strict=True))

    def _first(
        self, point: Point, shape: Shape
    ) -> tuple[dict[str, float], tile_launches.Launch, float]:
        """Errors against float64, the launch, and the seconds of a call that compiles the kernel."""
        exact = _exact(self, shape)
        start = time.perf_counter()
        with heard(f"tile_attend_{self.stage}") as found:
            results = self._run(point, shape)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        (launch,) = found
        return self._errors(results, exact), launch, seconds

    @staticmethod
    def _errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: float((x.double() - exact[name]).abs().max()) for name, x in found.items()}


_LAUNCHES: dict[Any, tile_launches.Launch] = {}
_KEPT: dict[Any, Any] = {}


def _kept(key: Any, make: Callable[[], Any]) -> Any:
    if key not in _KEPT:
        _KEPT[key] = make()
    return _KEPT[key]


def _small(name: str, grid: tuple[int, ...]) -> fv.Pattern:
    smaller: Mapping[str, fv.Pattern] = {
        "sliding": fv.Sliding(63),
        "volume": fv.Neighborhood((3, 5, 5)),
        "sinks": fv.Sliding(63, sink_tokens=17),
    }
    return smaller[name] if name in smaller else pattern_of(name, grid)


@contextlib.contextmanager
def heard(name: str) -> Iterator[list[tile_launches.Launch]]:
    """Launches of one kernel, listed; kernels that repair what is not finite are neither compiled nor run."""
    found: list[tile_launches.Launch] = []
    plain, together = tile_launches.Launch.__call__, tile_launches.compile_side_by_side

    def listen(launch: tile_launches.Launch) -> None:
        if launch.kernel.__name__ == name:
            found.append(launch)
        if "repair" not in launch.kernel.__name__:
            plain(launch)

    tile_launches.Launch.__call__ = listen  # type: ignore[method-assign]
    tile_launches.compile_side_by_side = lambda calls, device: None
    try:
        yield found
    finally:
        tile_launches.Launch.__call__ = plain  # type: ignore[method-assign]
        tile_launches.compile_side_by_side = together


def _attended(shape: Shape, dim: int, dtype: torch.dtype) -> Any:
    def make() -> Any:
        name, grid, heads = shape
        source = torch.Generator(DEVICE).manual_seed(0)
        q, k, v, do = (
            torch.randn((1, *grid, heads, dim), device=DEVICE, generator=source).to(dtype)
            for _ in range(4)
        )
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        with heard(""):
            o = fv.attend(q, k, v, pattern_of(name, grid), implementation="triton")
        return (q, k, v), o, do

    return _kept((shape, dim, dtype), make)


def _exact(kernel: Tiles, shape: Shape) -> dict[str, Tensor]:
    """What the kernel should give, in float64, head by head."""

    def make() -> dict[str, Tensor]:
        (q, k, v), _, do = _attended(shape, kernel.dim, kernel.dtype)
        found: dict[str, list[Tensor]] = {name: [] for name in "oqkv"}
        for head in range(shape[2]):
            leaves = [
                x[..., head : head + 1, :].detach().double().requires_grad_() for x in (q, k, v)
            ]
            o = fv.attend(*leaves, pattern_of(*shape[:2]), implementation="reference")
            gradients = torch.autograd.grad(o, leaves, do[..., head : head + 1, :].double())
            for name, x in zip("oqkv", (o.detach(), *gradients), strict=True):
                found[name].append(x)
        return {name: torch.cat(parts, -2) for name, parts in found.items()}

    return _kept((kernel.dim, kernel.dtype, shape, "exact"), make)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Recurrences:
    """Forward and backward of `scan` with one rule and one shape of decay."""

    rule: Any
    decay: str
    kernels: tuple[str, ...]
    tiles: Mapping[str, tuple[int, ...]]
    gated: bool = True

    shapes = ((1, 16384, 16, 16, 128, 128),)
    held_out = (
        (1, 32768, 16, 16, 128, 128),
        (4, 4096, 16, 16, 128, 128),
        (2, 6000, 32, 32, 128, 128),
    )

    @property
    def shipped(self) -> state_tuning.Tuning:
        decay = {"none": 0, "fixed": 1, "token": 2, "channel": 3}[self.decay]
        return state_tuning.tuning(BF16, 128, isinstance(self.rule, fv.Delta), decay)

    @property
    def space(self) -> Space:
        values: dict[str, Sequence[Value]] = dict(self.tiles)
        for kernel in self.kernels:
            walks = kernel.startswith("walk") or kernel == "additive"
            values[f"{kernel}_warps"] = (2, 4, 8) if walks else (4, 8)
            values[f"{kernel}_stages"] = (2, 3, 4) if walks else (1, 2)
        return _space(self._point(self.shipped), values, lambda point: True)

    def call(self, point: Point, shape: tuple[int, ...]) -> Callable[[], object]:
        leaves, do = self._inputs(shape)
        tuned = self._tuned(point)

        def run() -> None:
            with state_tuning.forced(tuned):
                o = fv.scan(**leaves, rule=self.rule, implementation="triton")
                torch.autograd.grad(o, list(leaves.values()), do)

        return run

    def wrong(self, point: Point, shape: Any = None) -> tuple[str, dict[str, float]]:
        """What is out of bounds on a small problem of the same kind."""
        problem = self._problem((1, 200, 2, 2, 128, 128))
        inputs = problem.draw(random.randrange(1 << 30))
        with state_tuning.forced(self._tuned(point)):
            got = problem.run(inputs, "triton")
            self.call(point, self.shapes[0])()
        bad = [str(v) for v in gpu_state.verdicts(problem, inputs, got) if not v.ok]
        return "; ".join(bad)[:300], {}

    def checked(self, point: Point, shapes: Sequence[Any]) -> str:
        return self.wrong(point)[0]

    def _point(self, found: state_tuning.Tuning) -> dict[str, Value]:
        point: dict[str, Value] = {name: getattr(found, name) for name in self.tiles}
        for kernel in self.kernels:
            sizes = getattr(found, kernel)
            point[f"{kernel}_warps"] = sizes["num_warps"]
            point[f"{kernel}_stages"] = sizes["num_stages"]
        return point

    def _tuned(self, point: Point) -> state_tuning.Tuning:
        changes: dict[str, Any] = {name: point[name] for name in self.tiles}
        for kernel in self.kernels:
            changes[kernel] = {
                **getattr(self.shipped, kernel),
                "num_warps": point[f"{kernel}_warps"],
                "num_stages": point[f"{kernel}_stages"],
            }
        return dataclasses.replace(self.shipped, **changes)

    def _problem(self, sizes: tuple[int, ...]) -> gpu_state.Problem:
        return gpu_state.Problem(
            self.rule, self.decay, BF16, sizes, gated=self.gated, initial=False
        )  # type: ignore[arg-type]

    def _inputs(self, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
        def make() -> tuple[dict[str, Tensor], Tensor]:
            inputs = self._problem(shape).draw(0)
            leaves = {name: x.requires_grad_() for name, x in inputs.items()}
            return leaves, torch.randn_like(leaves["v"])

        return _kept((self.decay, type(self.rule).__name__, shape), make)  # type: ignore[no-any-return]


_DELTA = ("pairs", "walk", "output", "walk_backward", "values_backward", "keys_backward")
_DELTA_TILES = {
    "v_tile": (16, 32),
    "backward_v_tile": (16, 32),
    "pairs_k_tile": (64, 128),
    "gradient_v_tile": (64, 128),
    "gradient_k_tile": (32, 64, 128),
}
_ADDITIVE_TILES = {"v_tile": (32, 64, 128), "gradient_tile": (32, 64, 128), "piece": (16, 32, 64)}


def kernels(name: str) -> Tiles | Recurrences:
    """What a NAME of the command line is."""
    if name == "gated_delta":
        return Recurrences(fv.Delta(), "token", _DELTA, _DELTA_TILES)
    if name == "kimi_delta":
        return Recurrences(fv.Delta(), "channel", _DELTA, _DELTA_TILES)
    if name == "fixed_decay":
        walks = ("additive", "queries", "keys")
        return Recurrences(fv.Additive(), "fixed", walks, _ADDITIVE_TILES, False)
    name, _, pattern = name.partition("@")
    stage, dim, *kind = name.split("/")
    dtype = torch.float32 if kind == ["float32"] else BF16
    return Tiles(stage, int(dim), dtype, pattern or None)
