"""Replays strategies of `foveal search` on recorded landscapes: who finds the best sizes, how fast.

python scripts/search_race.py race LANDSCAPES [NAME...] [--seeds 15] [--compiling] [--knows WHAT]... [--out F]
python scripts/search_race.py known LANDSCAPES --out src/foveal/search/templates/tile_known.jsonl

Needs no GPU: `gpu_search.py landscape` measured every point once, and a replay draws from those samples.  A
race of one seed is the search as it is (proposals, first timings, acceptance in two comparisons) against the
same with random points, and against Triton's autotuner on a list of all points in random order, timed as it
times; all begin with the same random point.  Times are those of the device for measuring; with --compiling
once more with those of compiling every point that is measured, one after the other.  Reached is a champion
within 0.5 %, the margin of the acceptance test, of what the other ends with.

--knows says what a search begins with: nothing; searched: what searches of the same seed that knew nothing
judged on the other kernels of the file; recorded: all points of the other kernels.  The kernel itself is
never among them.
`known` writes the points of all kernels as the package ships them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from foveal.search.acceptance import MARGIN
from foveal.search.archive import Archive
from foveal.search.controller import Search, State
from foveal.search.landscape import Landscape, LandscapeEvaluator, autotuned, read_landscapes
from foveal.search.prior import Known, write_known
from foveal.search.space import Point
from foveal.search.strategies import strategy
from foveal.search.task import Case, Input, Task
from foveal.search.templates import tile_traits

Curve = list[tuple[float, float]]
"""(device seconds, time over that of the start of what would be returned then)."""


NOTHING, SEARCHED, RECORDED = "nothing", "searched", "recorded"


@dataclass(frozen=True)
class Run:
    """Champions over time of a search, the points that it judged, and seconds of the host per point."""

    curve: Curve
    judged: tuple[Point, ...]
    host: float


def searched(
    landscape: Landscape,
    recipe: str,
    seed: int,
    seconds: float,
    compiling: bool,
    known: Sequence[Known] = (),
) -> Run:
    case = Case(landscape.name, (Input("q", (1,), "bfloat16"),))
    program = {"kind": "template", "module": landscape.name, "options": {}}
    space = dataclasses.replace(landscape.space, means=functools.partial(traits, landscape))
    task = Task(landscape.name, program, (case,), program, space, device="cuda")
    evaluator = LandscapeEvaluator(landscape, seed, compiling)
    with tempfile.TemporaryDirectory() as folder, Archive(Path(folder) / "race.db") as store:
        run = Search(
            task,
            store,
            [evaluator],
            strategy(recipe),
            seed,
            clock=lambda: evaluator.clock,
            known=known,
        )
        wanted = landscape.best.ratio * (1 + MARGIN)

        def show(state: State) -> None:
            champion = store.champion()
            if champion and landscape.at(champion.candidate.params).ratio <= wanted:
                run.stop.set()  # nothing is left to find

        start = time.perf_counter()
        run.run(seconds, show)
        host = time.perf_counter() - start
        curve = []
        for each in store.accepted():
            point = store.entry(each["candidate"]).candidate.params
            curve.append((float(each["spent"]), landscape.at(point).ratio))
        judged = tuple(entry.candidate.params for entry in store.entries(evaluated=True))
        return Run(curve, judged, host / len(judged))


def traits(landscape: Landscape, point: Point) -> tuple[float, ...]:
    return tile_traits.traits(landscape.name.split("/")[0], point)


def known_of(landscape: Landscape, points: Sequence[Point] | None = None) -> Known:
    """All points of a landscape, or some, as another search may know them."""
    if points is None:
        points = [place.point for place in landscape.places]
    return Known(
        landscape.name,
        tuple(_rounded(traits(landscape, point)) for point in points),
        _rounded(math.log(landscape.at(point).ratio) for point in points),
    )


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)


_BUDGET = 2.0
"""Seconds of the device of a search on another kernel, before what it judged is known here."""


def knowledge(
    landscapes: Mapping[str, Landscape], name: str, what: str, recipe: str, seed: int
) -> list[Known]:
    """What a search of one kernel begins with."""
    others = [other for key, other in landscapes.items() if key != name]
    if what == NOTHING:
        return []
    if what == RECORDED:
        return [known_of(other) for other in others]
    runs = [searched(begun(other, seed), recipe, seed, _BUDGET, False) for other in others]
    return [known_of(other, run.judged) for other, run in zip(others, runs, strict=True)]


def begun(landscape: Landscape, seed: int) -> Landscape:
    return landscape.begun_at(random.Random(seed).choice(landscape.places))


def reached(curve: Sequence[tuple[float, float]], ratio: float) -> float | None:
    """When a curve first came within the margin of a ratio."""
    return next((clock for clock, own in curve if own <= ratio * (1 + MARGIN)), None)


def race(
    landscape: Landscape, seed: int, recipe: str, compiling: bool, known: Mapping[str, list[Known]]
) -> list[dict[str, object]]:
    """One seed: when each reached what the others end with; one line per knowledge."""
    landscape = begun(landscape, seed)
    listed = list(autotuned(landscape, seed, compiling))
    budget = listed[-1][0]
    drawn = searched(landscape, "random", seed, budget, compiling)
    lines = []
    for what, kernels in known.items():
        ours = searched(landscape, recipe, seed, budget, compiling, kernels)
        line: dict[str, object] = {
            "what": "race",
            "name": landscape.name,
            "strategy": recipe,
            "knows": what,
            "of": [f"{each.name}: {len(each.logs)} points" for each in kernels],
            "seed": seed,
            "compiling": compiling,
            "points": len(landscape.places),
            "best": landscape.best.ratio,
            "judged": len(ours.judged),
            "random_judged": len(drawn.judged),
            "host_seconds_per_point": round(ours.host, 4),
        }
        for who, curve in (("random", drawn.curve), ("autotuner", listed)):
            target = min(ratio for _, ratio in curve)
            line[who] = {
                "best": target,
                "seconds": reached(curve, target),
                "budget": budget if who == "autotuner" else curve[-1][0],
                "ours": reached(ours.curve, target),
            }
        line["ours"] = ours.curve
        lines.append(line)
    return lines


def share(line: dict[str, object], who: str) -> float:
    """Our time over theirs, both to the same; infinite where we did not reach it."""
    found = line[who]
    assert isinstance(found, dict)
    ours, theirs = found["ours"], found["seconds"]
    return float("inf") if ours is None else float(ours) / max(float(theirs), 1e-9)


def without_out(arguments: Sequence[str]) -> list[str]:
    """A command without where its records went."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [own for before, own in pairs if "--out" not in (before, own)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("race", "known"))
    parser.add_argument("landscapes", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--from-seed", type=int, default=0)
    parser.add_argument("--strategy", default="bayes")
    parser.add_argument("--compiling", action="store_true")
    parser.add_argument(
        "--knows", action="append", choices=(NOTHING, SEARCHED, RECORDED), default=[]
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    landscapes = read_landscapes(options.landscapes)
    if options.what == "known":
        write_known([known_of(each) for each in landscapes.values()], options.out)
        return 0
    knows = options.knows or [NOTHING, RECORDED]
    command = " ".join(["python", "scripts/search_race.py", *without_out(sys.argv[1:])])
    for name in options.names or landscapes:
        for compiling in (False, True) if options.compiling else (False,):
            lines: list[dict[str, object]] = []
            for seed in range(options.from_seed, options.from_seed + options.seeds):
                known = {
                    what: knowledge(landscapes, name, what, options.strategy, seed)
                    for what in knows
                }
                lines += race(landscapes[name], seed, options.strategy, compiling, known)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    for line in lines:
                        file.write(json.dumps({**line, "command": command}) + "\n")
            for what in knows:
                own = [line for line in lines if line["knows"] == what]
                text = []
                for who in ("random", "autotuner"):
                    shares = [share(line, who) for line in own]
                    spread = f"{min(shares):.2f} to {max(shares):.2f}"
                    text.append(f"{who} {statistics.median(shares):.2f} ({spread})")
                print(
                    f"{name}, {len(landscapes[name].places)} points, "
                    f"{'with' if compiling else 'without'} compilation, knows {what}: our share of the "
                    f"time of {'; '.join(text)}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
