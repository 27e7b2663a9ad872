"""Searches sizes of shipped Triton kernels on a CUDA device, and confirms them on shapes that it never timed.

python scripts/gpu_search.py compile NAME... [--seconds 90] --points P   every setting of every kernel
python scripts/gpu_search.py search NAME... [--seconds 25] --points P --archive A [--strategy full]
python scripts/gpu_search.py confirm NAME... --archive A [--out F]       champion against shipped sizes
python scripts/gpu_search.py race NAME... [--seconds 8] --points P [--out F]   strategies at equal time

NAME: gated_delta, kimi_delta, fixed_decay (forward and backward of a recurrence), or
STAGE/DIM such as forward/256, backward_kv/64 (a portable tile kernel).
`compile` fills Triton's cache and writes to P which settings gave right results, in processes of its own;
`search` combines settings that did, and `confirm` compares the champion with float64 once more, in a fresh
process.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import gpu_state

import foveal as fv
from foveal.search.acceptance import decide
from foveal.search.archive import Archive
from foveal.search.controller import Search
from foveal.search.device import DeviceEvaluator
from foveal.search.space import Param, Point, Space, Value, steps
from foveal.search.strategies import strategy
from foveal.search.task import Case, Input, Task
from foveal.testing.agreement import check_attend
from foveal.tuning import state as state_tuning
from foveal.tuning import tile as tile_tuning

BF16 = torch.bfloat16
DEVICE = "cuda"
_TILES_OF = {
    "additive": ("v_tile",),
    "queries": ("gradient_tile",),
    "keys": ("gradient_tile",),
    "pairs": ("pairs_k_tile",),
    "walk": ("v_tile",),
    "walk_backward": ("backward_v_tile",),
    "values_backward": ("gradient_v_tile",),
    "keys_backward": ("gradient_k_tile", "gradient_v_tile"),
}
"""Tile sizes that kernels of the state engine are compiled with."""


def _space(start: Mapping[str, Value], values: Mapping[str, Sequence[Value]], fits: Any) -> Space:
    """Ordered parameters; what is shipped belongs to the values and is the start."""
    params: list[Param] = []
    for name, known in values.items():
        every = sorted({*known, start[name]})
        params.append(steps(name, *every, begins=start[name]))
    return Space(tuple(params), fits)


@dataclasses.dataclass(frozen=True)
class Recurrences:
    """Forward and backward of `scan` with one rule and one shape of decay."""

    rule: Any
    decay: str
    kernels: tuple[str, ...]
    tiles: Mapping[str, tuple[int, ...]]
    gated: bool = True

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((1, 16384, 16, 16, 128, 128),)

    @property
    def held_out(self) -> tuple[tuple[int, ...], ...]:
        return (
            (1, 32768, 16, 16, 128, 128),
            (4, 4096, 16, 16, 128, 128),
            (2, 6000, 32, 32, 128, 128),
        )

    @property
    def shipped(self) -> state_tuning.Tuning:
        decay = {"none": 0, "fixed": 1, "token": 2, "channel": 3}[self.decay]
        return state_tuning.tuning(BF16, 128, isinstance(self.rule, fv.Delta), decay)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Parameters by the kernel that is compiled with them."""
        return tuple(
            (*_TILES_OF.get(kernel, ()), f"{kernel}_warps", f"{kernel}_stages")
            for kernel in self.kernels
        )

    @property
    def space(self) -> Space:
        values: dict[str, Sequence[Value]] = dict(self.tiles)
        for kernel in self.kernels:
            walks = kernel.startswith("walk") or kernel == "additive"
            values[f"{kernel}_warps"] = (2, 4, 8) if walks else (4, 8)
            values[f"{kernel}_stages"] = (2, 3, 4) if walks else (1, 2)
        return _space(self.point(self.shipped), values, lambda point: True)

    def point(self, found: state_tuning.Tuning) -> dict[str, Value]:
        names = [*self.tiles]
        point: dict[str, Value] = {name: getattr(found, name) for name in names}
        for kernel in self.kernels:
            sizes = getattr(found, kernel)
            point |= {
                f"{kernel}_warps": sizes["num_warps"],
                f"{kernel}_stages": sizes["num_stages"],
            }
        return point

    def tuned(self, point: Point) -> state_tuning.Tuning:
        changes: dict[str, Any] = {name: point[name] for name in self.tiles}
        for kernel in self.kernels:
            changes[kernel] = {
                "num_warps": point[f"{kernel}_warps"],
                "num_stages": point[f"{kernel}_stages"],
            }
        return dataclasses.replace(self.shipped, **changes)

    def problem(self, sizes: tuple[int, ...]) -> gpu_state.Problem:
        return gpu_state.Problem(
            self.rule,
            self.decay,
            BF16,
            sizes,
            gated=self.gated,
            initial=False,  # type: ignore[arg-type]
        )

    def call(self, point: Point, shape: tuple[int, ...]) -> Callable[[], object]:
        leaves, do = _kept(self, shape)
        tuned = self.tuned(point)

        def run() -> None:
            with state_tuning.forced(tuned):
                o = fv.scan(**leaves, rule=self.rule, implementation="triton")
                torch.autograd.grad(o, list(leaves.values()), do)

        return run

    def wrong(self, point: Point) -> str:
        """What is out of bounds on a small problem of the same kind."""
        problem = self.problem((1, 200, 2, 2, 128, 128))
        inputs = problem.draw(random.randrange(1 << 30))
        with state_tuning.forced(self.tuned(point)):
            got = problem.run(inputs, "triton")
            self.call(point, self.shapes[0])()
        bad = [str(v) for v in gpu_state.verdicts(problem, inputs, got) if not v.ok]
        return "; ".join(bad)[:300]


_KEPT: dict[Any, Any] = {}


def _kept(kernels: Any, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    key = kernels.decay, type(kernels.rule).__name__, shape
    if key not in _KEPT:
        inputs = kernels.problem(shape).draw(0)
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        _KEPT[key] = leaves, torch.randn_like(leaves["v"])
    found: tuple[dict[str, Tensor], Tensor] = _KEPT[key]
    return found


@dataclasses.dataclass(frozen=True)
class Tiles:
    """One stage of the portable tile kernels, at one head_dim: causal and a window in the plane."""

    stage: str
    dim: int

    shapes = (("causal", (8192,), 8), ("window", (96, 96), 8))
    held_out = (
        ("causal", (4096,), 8),
        ("causal", (5008,), 8),
        ("window", (128, 80), 8),
        ("sliding", (16384,), 8),
    )
    groups = (("queries", "keys", "warps", "stages"),)

    @property
    def shipped(self) -> tile_tuning.Config:
        architecture = tile_tuning.architecture(torch.device(DEVICE))
        return tile_tuning.shipped(self.stage, architecture, self.dim, BF16)

    groups = (("queries", "keys", "warps", "stages"),)

    @property
    def space(self) -> Space:
        found = self.shipped
        start = {"queries": found.queries, "keys": found.keys, "warps": found.warps}
        values: dict[str, Sequence[Value]] = {
            "queries": (32, 64, 128),
            "keys": (32, 64, 128),
            "warps": (4, 8),
            "stages": (1, 2, 3, 4),
        }
        limit = 232448
        dim = self.dim

        def fits(point: Point) -> bool:
            q, k, w = (int(point[n]) for n in ("queries", "keys", "warps"))
            own, other = (k, q) if self.stage == tile_tuning.BACKWARD_KV else (q, k)
            shared = 2 * dim * (own * 2 + 2 * other * int(point["stages"]))
            return 1024 <= q * k * 8 // w <= 32768 and shared <= limit * 1.5

        return _space(start | {"stages": found.stages}, values, fits)

    def call(self, point: Point, shape: Any) -> Callable[[], object]:
        pattern, leaves, o, do = _attended(shape, self.dim)
        config = self._config(point)

        def run() -> None:
            with tile_tuning.forced(self.stage, config):
                if self.stage == tile_tuning.FORWARD:
                    with torch.no_grad():
                        fv.attend(*leaves, pattern, implementation="triton")
                else:
                    torch.autograd.grad(o, leaves, do, retain_graph=True)

        return run

    def wrong(self, point: Point) -> str:
        with tile_tuning.forced(self.stage, self._config(point)):
            for name, grid in (("causal", (300,)), ("window", (20, 21))):
                pattern = _PATTERNS[name]
                source = torch.Generator(DEVICE).manual_seed(random.randrange(1 << 30))
                shape = (1, *grid, 2, self.dim)
                q, k, v = (
                    torch.randn(shape, device=DEVICE, generator=source).to(BF16) for _ in "qkv"
                )
                try:
                    check_attend(q, k, v, pattern, implementation="triton")
                except AssertionError as error:
                    return str(error)[:300]
        for shape in self.shapes:
            self.call(point, shape)()
        return ""

    def _config(self, point: Point) -> tile_tuning.Config:
        return tile_tuning.Config(
            int(point["queries"]), int(point["keys"]), int(point["warps"]), int(point["stages"])
        )


_PATTERNS = {
    "causal": fv.Causal(),
    "window": fv.Neighborhood((17, 17)),
    "sliding": fv.Sliding(1023),
}


def _attended(shape: Any, dim: int) -> Any:
    key = shape, dim
    if key not in _KEPT:
        name, grid, heads = shape
        source = torch.Generator(DEVICE).manual_seed(0)
        q, k, v = (
            torch.randn((1, *grid, heads, dim), device=DEVICE, generator=source)
            .to(BF16)
            .requires_grad_()
            for _ in "qkv"
        )
        o = fv.attend(q, k, v, _PATTERNS[name], implementation="triton")
        _KEPT[key] = _PATTERNS[name], (q, k, v), o, torch.randn_like(o)
    return _KEPT[key]


_DELTA = ("pairs", "walk", "output", "walk_backward", "values_backward", "keys_backward")
_DELTA_TILES = {
    "v_tile": (16, 32),
    "backward_v_tile": (16, 32),
    "pairs_k_tile": (64, 128),
    "gradient_v_tile": (64, 128),
    "gradient_k_tile": (32, 64, 128),
}


def kernels(name: str) -> Recurrences | Tiles:
    """What a NAME of the command line is."""
    if name == "gated_delta":
        return Recurrences(fv.Delta(), "token", _DELTA, _DELTA_TILES)
    if name == "kimi_delta":
        return Recurrences(fv.Delta(), "channel", _DELTA, _DELTA_TILES)
    if name == "fixed_decay":
        tiles = {"v_tile": (32, 64, 128), "gradient_tile": (32, 64, 128), "piece": (16, 32, 64)}
        return Recurrences(fv.Additive(), "fixed", ("additive", "queries", "keys"), tiles, False)
    stage, _, dim = name.partition("/")
    return Tiles(stage, int(dim))


def checked(job: tuple[str, dict[str, Value]]) -> tuple[str, dict[str, Value], str, float]:
    """The point, what is wrong with it ("" for nothing), seconds; in a process of its own."""
    name, point = job
    start = time.perf_counter()
    try:
        wrong = kernels(name).wrong(point)
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"[:300]
    return name, point, wrong, time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Compiled(Space):
    """The part of a space in which every kernel has a setting that was compiled and right."""

    groups: tuple[tuple[str, ...], ...] = ()
    known: tuple[frozenset[tuple[Value, ...]], ...] = ()

    def valid(self, point: Point) -> bool:
        settings = zip(self.groups, self.known, strict=True)
        return super().valid(point) and all(
            tuple(point[each] for each in group) in some for group, some in settings
        )

    def draw(self, source: random.Random) -> dict[str, Value]:
        for _ in range(1000):
            point = dict(self.first)
            for group, some in zip(self.groups, self.known, strict=True):
                point.update(zip(group, source.choice(sorted(some)), strict=True))
            if self.valid(point):
                return point
        return dict(self.first)


def _coverage(name: str) -> list[dict[str, Value]]:
    """Points in which every setting of every kernel stands twice, beside others."""
    found = kernels(name)
    space, source = found.space, random.Random(0)
    values = {param.name: param.values for param in space.params}
    points = [space.first]
    for _ in range(2):
        columns = []
        for group in found.groups:
            settings = list(itertools.product(*(values[each] for each in group)))
            source.shuffle(settings)
            columns.append(settings)
        for row in range(max(map(len, columns))):
            point = dict(space.first)
            for group, settings in zip(found.groups, columns, strict=True):
                point.update(zip(group, settings[row % len(settings)], strict=True))
            if space.valid(point) and point not in points:
                points.append(point)
    return points


def compile_points(names: Sequence[str], seconds: float, workers: int, path: Path) -> None:
    """Fills Triton's cache with what a search will ask for, and says what is right."""
    end = time.monotonic() + seconds
    spaces = {name: _coverage(name) for name in names}
    jobs: list[tuple[str, dict[str, Value]]] = []
    for turn in range(max(map(len, spaces.values()))):
        jobs += [(name, points[turn]) for name, points in spaces.items() if turn < len(points)]
    done = failed = 0
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a") as file:
        waiting = pool.imap_unordered(checked, jobs)
        while done < len(jobs):
            try:
                name, point, wrong, took = waiting.next(timeout=max(end - time.monotonic(), 0.01))
            except multiprocessing.TimeoutError:
                break
            done += 1
            failed += bool(wrong)
            file.write(json.dumps([name, point, wrong]) + "\n")
            file.flush()
            if wrong:
                print(f"{took:.1f} s: {name} {wrong[:140]}", flush=True)
        pool.terminate()
    print(f"{done} of {len(jobs)} points compiled, {failed} of them wrong", flush=True)


def known_settings(name: str, path: Path) -> list[set[tuple[Value, ...]]]:
    """Settings by kernel that stood in a point with right results."""
    groups = kernels(name).groups
    found: list[set[tuple[Value, ...]]] = [set() for _ in groups]
    for line in path.read_text().splitlines():
        whose, point, wrong = json.loads(line)
        if whose == name and not wrong:
            for settings, group in zip(found, groups, strict=True):
                settings.add(tuple(point[each] for each in group))
    return found


def task_of(name: str, space: Space) -> Task:
    """A task in name: its programs are not loaded, its points are."""
    case = Case(name, (Input("q", (1,), "bfloat16"),))
    program = {"kind": "template", "module": name, "options": {}}
    return Task(name, program, (case,), program, space, device=DEVICE)


def search(
    name: str, seconds: float, archive: Path, recipe: str, seed: int, points: Path
) -> list[tuple[float, float]]:
    """Searches, with the shipped sizes as the start and as the reference; (seconds, best speed-up)."""
    found = kernels(name)
    known = tuple(frozenset(each) for each in known_settings(name, points))
    whole = found.space
    space = Compiled(whole.params, whole.allows, found.groups, known)
    print(f"{name}: settings by kernel {[len(each) for each in known]}", flush=True)
    with Archive(archive) as store:
        evaluator = DeviceEvaluator(
            found, space.first, lambda point: ("", {}, 0.0), torch.device(DEVICE), seed=seed
        )
        run = Search(task_of(name, space), store, [evaluator], strategy(recipe), seed)
        start = time.monotonic()
        shown = 0.0

        def show(state: Any) -> None:
            nonlocal shown
            if time.monotonic() - shown > 3:
                shown = time.monotonic()
                print(f"{shown - start:.0f} s: {state}", flush=True)

        run.run(seconds, show)
        entries = store.entries(evaluated=True)
        bad = [e for e in entries if e.evaluation and not e.evaluation.ok]
        champion = store.champion()
        print(f"{name}: {len(entries)} judged, {len(bad)} wrong, {len(store.accepted())} accepted")
        for e in bad[:3]:
            print("  wrong:", e.evaluation.reason[:160] if e.evaluation else "")
        for each in store.accepted():
            print(
                f"  accepted after {each['spent']:.1f} s: {each['speedup']:.4f}, {each['gain']:.2%}"
            )
        if champion is not None:
            changed = {
                k: (space.first[k], v)
                for k, v in champion.candidate.params.items()
                if v != space.first[k]
            }
            print("  champion (shipped, found):", changed, flush=True)
        clock, best, curve = 0.0, 0.0, []
        for entry in entries:
            if entry.evaluation is not None:
                clock += entry.evaluation.seconds
                best = max(best, entry.evaluation.speedup or 0.0)
                curve.append((round(clock, 3), round(best, 4)))
        return curve


def confirm(name: str, archive: Path, write: Callable[[dict[str, object]], None]) -> None:
    """The champion against the shipped sizes on held-out shapes; this process never searched."""
    found = kernels(name)
    with Archive(archive, readonly=True) as store:
        champion = store.champion()
        assert champion is not None
        point = dict(champion.candidate.params)
    _, _, wrong, _ = checked((name, point))
    print(f"{name}: held-out, correct: {not wrong} {wrong}", flush=True)
    timer = DeviceEvaluator(found, found.space.first, lambda p: ("", {}, 0.0), torch.device(DEVICE))
    for shape in (*found.shapes, *found.held_out):
        samples = timer._samples({"found": point, "shipped": found.space.first}, shape, 20)
        ratios = [a / b for a, b in zip(samples["found"], samples["shipped"], strict=True)]
        decision = decide({"": [math.log(r) for r in ratios]})
        gain = 1 - statistics.median(ratios)
        held = shape not in found.shapes
        print(
            f"  {shape} {'held out' if held else 'searched'}: {gain:+.2%} {decision.verdict}",
            flush=True,
        )
        write(
            {
                "name": name,
                "shape": shape,
                "held_out": held,
                "found": point,
                "shipped": found.space.first,
                "gain": gain,
                "verdict": decision.verdict,
                "correct": not wrong,
                "samples": samples,
            }
        )


def race(
    name: str, seconds: float, points: Path, write: Callable[[dict[str, object]], None], seeds: int
) -> None:
    """First timings over device time of strategies, with seeds by turns."""
    for seed in range(seeds):
        for recipe in ("bayes", "random", "full"):
            with tempfile.TemporaryDirectory() as folder:
                curve = search(name, seconds, Path(folder) / "race.db", recipe, seed, points)
            write({"name": name, "strategy": recipe, "seed": seed, "curve": curve})


def writer(path: Path | None) -> Callable[[dict[str, object]], None]:
    """Appends JSON lines to a file, each with the command, the device and the versions."""
    import triton

    facts = {
        "command": " ".join(["python", "scripts/gpu_search.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }

    def write(line: dict[str, object]) -> None:
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | facts) + "\n")

    return write


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("compile", "search", "confirm", "race"))
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 12))
    parser.add_argument("--strategy", default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--archive", type=Path, default=Path("search"), help="a folder")
    parser.add_argument("--points", type=Path, default=Path("points.jsonl"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the host computes on tiny matrices only
    if options.what == "compile":
        compile_points(options.names, options.seconds, options.workers, options.points)
        return 0
    for name in options.names:
        archive = options.archive / f"{name.replace('/', '_')}.db"
        try:
            if options.what == "confirm":
                confirm(name, archive, writer(options.out))
            elif options.what == "race":
                race(name, options.seconds, options.points, writer(options.out), options.seeds)
            else:
                share = options.seconds / len(options.names)
                search(name, share, archive, options.strategy, options.seed, options.points)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
