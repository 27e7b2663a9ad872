"""Searches the numbers by which the tiled edition on a CPU chooses tiles; confirms them on held-out problems.

python scripts/cpu_search.py explore [--axes N] [--threads 2] [--seconds 40] [--out F]
python scripts/cpu_search.py confirm CALLS,ROWS,SWEEP... [--axes N] [--threads 2] [--seconds 40] [--out F]

`explore` times every number of `foveal search cpu/sliding` by itself, others as shipped, by turns with
what is shipped, forward and with gradients; numbers that lead to the same tiles and sweeps are timed once.
`confirm` does so on held-out problems, beside what is shipped twice as a control.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

import foveal as fv
from foveal.engines.tile import walk
from foveal.patterns.base import Extent
from foveal.search.acceptance import decide
from foveal.search.library import TEMPLATES
from foveal.search.templates.cpu_walk import Walk

Problem = tuple[fv.Pattern, tuple[int, ...], int, int]
"""Pattern, grid, heads and channels."""

SEARCHED: tuple[Problem, ...] = (
    (fv.Sliding(255), (4096,), 4, 64),
    (fv.Neighborhood((9, 9)), (56, 56), 4, 64),
    (fv.Neighborhood((3, 5, 5)), (8, 16, 16), 4, 64),
)
HELD_OUT: tuple[Problem, ...] = (
    (fv.Sliding(511), (3000,), 4, 64),
    (fv.Sliding(63), (6000,), 2, 128),
    (fv.Neighborhood((13, 13)), (48, 40), 4, 64),
    (fv.Neighborhood((7, 7)), (64, 64), 2, 32),
    (fv.Neighborhood((5, 7, 7)), (6, 14, 14), 4, 64),
    (fv.Neighborhood((3, 7, 7)), (8, 20, 20), 2, 64),
    (fv.Neighborhood((3, 3, 3)), (10, 16, 16), 4, 32),
)
_EXPLORED, _CONFIRMED = 6, 20


def label(problem: Problem) -> str:
    pattern, grid, heads, channels = problem
    return f"{pattern.key} {'x'.join(map(str, grid))} heads {heads} channels {channels}"


def calls_of(problem: Problem, gradients: bool) -> Callable[[Walk], float]:
    """Seconds of one call with some numbers."""
    pattern, grid, heads, channels = problem
    source = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, *grid, heads, channels, generator=source) for _ in range(4))
    leaves = [x.requires_grad_(gradients) for x in (q, k, v)]

    def call(numbers: Walk) -> float:
        with numbers.used():
            start = time.perf_counter()
            o = fv.attend(*leaves, pattern, implementation="cpu")
            if gradients:
                torch.autograd.grad(o, leaves, do)
            return time.perf_counter() - start

    return call


def shape_of(numbers: Walk, problem: Problem) -> tuple[object, ...]:
    """The tile and the sweeps that these numbers lead to."""
    pattern, grid, heads, _ = problem
    extent = Extent(grid, grid)
    with numbers.used():
        sweeps = walk.walk(pattern, extent, heads)
        bounds = pattern.bounds(extent)
        assert bounds is not None
        return walk.choose_tile(bounds, heads), len(sweeps)


def timed(
    settings: Mapping[str, Walk], problem: Problem, gradients: bool, count: int
) -> dict[str, list[float]]:
    """Seconds of calls by turns in random order, after one call of each."""
    call = calls_of(problem, gradients)
    found: dict[str, list[float]] = {name: [] for name in settings}
    order = list(settings)
    for name in order:
        call(settings[name])
    for _ in range(count):
        random.shuffle(order)
        for name in order:
            found[name].append(call(settings[name]))
    return found


def alone() -> list[Walk]:
    """Every number of the template by itself."""
    space = TEMPLATES["cpu/sliding"].space
    found = [Walk(**space.first)]
    for param in space.params:
        for value in param.values:
            if value != param.start:
                found.append(Walk(**{**space.first, param.name: value}))
    return found


def without_out(arguments: Sequence[str]) -> list[str]:
    """A command without where its records went."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [own for before, own in pairs if "--out" not in (before, own)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("explore", "confirm"))
    parser.add_argument("numbers", nargs="*", metavar="CALLS,ROWS,SWEEP")
    parser.add_argument("--axes", type=int, help="only problems on grids of so many axes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command = " ".join(["python", "scripts/cpu_search.py", *without_out(sys.argv[1:])])
    exploring = options.what == "explore"
    problems: Sequence[Problem] = SEARCHED if exploring else HELD_OUT
    problems = [each for each in problems if options.axes in (None, len(each[1]))]
    tried = alone() if exploring else [Walk(*map(int, x.split(","))) for x in options.numbers]
    shipped = Walk()
    end = time.monotonic() + options.seconds
    for problem in problems:
        for gradients in (False, True):
            settings: dict[str, Walk] = {"shipped": shipped} | (
                {} if exploring else {"control": shipped}
            )
            known = {shape_of(shipped, problem)} if exploring else set()
            for numbers in tried:
                shape = shape_of(numbers, problem)
                if shape not in known:
                    settings[",".join(map(str, astuple(numbers)))] = numbers
                    known |= {shape} if exploring else set()
            if time.monotonic() > end:
                print(f"{label(problem)}: no time left", flush=True)
                continue
            samples = timed(settings, problem, gradients, _EXPLORED if exploring else _CONFIRMED)
            base = samples["shipped"]
            print(
                f"{label(problem)}, {'with gradients' if gradients else 'forward'}: "
                f"{1e3 * statistics.median(base):.1f} ms as shipped {shape_of(shipped, problem)}"
            )
            for name in [name for name in settings if name != "shipped"]:
                logs = [math.log(a / b) for a, b in zip(samples[name], base, strict=True)]
                gain, verdict = 1 - math.exp(statistics.median(logs)), decide({"": logs}).verdict
                print(
                    f"  {gain:+.1%} {verdict} {name} {shape_of(settings[name], problem)}",
                    flush=True,
                )
                if options.out is None:
                    continue
                line = {
                    "what": options.what,
                    "problem": label(problem),
                    "gradients": gradients,
                    "held_out": not exploring,
                    "shipped": astuple(shipped),
                    "found": astuple(settings[name]),
                    "control": name == "control",
                    "gain": gain,
                    "verdict": verdict,
                    "samples": {"found": samples[name], "shipped": base},
                    "threads": options.threads,
                    "device": platform.processor() or platform.machine(),
                    "torch": torch.__version__,
                    "command": command,
                }
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
