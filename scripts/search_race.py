"""Replays strategies of `foveal search` on recorded landscapes: who finds the best sizes, how fast.

python scripts/search_race.py LANDSCAPES [NAME...] [--seeds 15] [--compiling] [--out F]

Needs no GPU: `gpu_search.py landscape` measured every point once, and a replay draws from those samples.  A
race of one seed is the search as it is (proposals, first timings, acceptance in two comparisons) against the
same with random points, and against Triton's autotuner on a list of all points in random order, timed as it
times; all begin with the same random point.  Times are those of the device for measuring; with --compiling
once more with those of compiling every point that is measured, one after the other.  Reached is a champion
within 0.5 %, the margin of the acceptance test, of what the other ends with.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from foveal.search.acceptance import MARGIN
from foveal.search.archive import Archive
from foveal.search.controller import Search, State
from foveal.search.landscape import Landscape, LandscapeEvaluator, autotuned, read_landscapes
from foveal.search.strategies import strategy
from foveal.search.task import Case, Input, Task

Curve = list[tuple[float, float]]
"""(device seconds, time over that of the start of what would be returned then)."""


def searched(
    landscape: Landscape, recipe: str, seed: int, seconds: float, compiling: bool
) -> tuple[Curve, int]:
    """Champions over time of a search, and how many points it judged."""
    case = Case(landscape.name, (Input("q", (1,), "bfloat16"),))
    program = {"kind": "template", "module": landscape.name, "options": {}}
    task = Task(landscape.name, program, (case,), program, landscape.space, device="cuda")
    evaluator = LandscapeEvaluator(landscape, seed, compiling)
    with tempfile.TemporaryDirectory() as folder, Archive(Path(folder) / "race.db") as store:
        run = Search(
            task, store, [evaluator], strategy(recipe), seed, clock=lambda: evaluator.clock
        )
        wanted = landscape.best.ratio * (1 + MARGIN)

        def show(state: State) -> None:
            champion = store.champion()
            if champion and landscape.at(champion.candidate.params).ratio <= wanted:
                run.stop.set()  # nothing is left to find

        run.run(seconds, show)
        curve = []
        for each in store.accepted():
            point = store.entry(each["candidate"]).candidate.params
            curve.append((float(each["spent"]), landscape.at(point).ratio))
        return curve, len(store.entries(evaluated=True))


def reached(curve: Sequence[tuple[float, float]], ratio: float) -> float | None:
    """When a curve first came within the margin of a ratio."""
    return next((clock for clock, own in curve if own <= ratio * (1 + MARGIN)), None)


def race(landscape: Landscape, seed: int, recipe: str, compiling: bool) -> dict[str, object]:
    """One seed: when each reached what the others end with."""
    places = landscape.places
    landscape = landscape.begun_at(random.Random(seed).choice(places))
    listed = list(autotuned(landscape, seed, compiling))
    budget = listed[-1][0]
    drawn, drawn_points = searched(landscape, "random", seed, budget, compiling)
    ours, judged = searched(landscape, recipe, seed, budget, compiling)
    line: dict[str, object] = {
        "what": "race",
        "name": landscape.name,
        "strategy": recipe,
        "seed": seed,
        "compiling": compiling,
        "points": len(landscape.places),
        "best": landscape.best.ratio,
        "judged": judged,
        "random_judged": drawn_points,
    }
    for who, curve in (("random", drawn), ("autotuner", listed)):
        target = min(ratio for _, ratio in curve)
        theirs = reached(curve, target)
        line[who] = {
            "best": target,
            "seconds": theirs,
            "budget": budget if who == "autotuner" else curve[-1][0],
            "ours": reached(ours, target),
        }
    line["ours"] = ours
    return line


def share(line: dict[str, object], who: str) -> float:
    """Our time over theirs, both to the same; infinite where we did not reach it."""
    found = line[who]
    assert isinstance(found, dict)
    ours, theirs = found["ours"], found["seconds"]
    return float("inf") if ours is None else float(ours) / max(float(theirs), 1e-9)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("landscapes", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--strategy", default="bayes")
    parser.add_argument("--compiling", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = " ".join(["python", "scripts/search_race.py", *sys.argv[1:]])
    landscapes = read_landscapes(options.landscapes)
    for name in options.names or landscapes:
        for compiling in (False, True) if options.compiling else (False,):
            lines = [
                race(landscapes[name], seed, options.strategy, compiling)
                for seed in range(options.seeds)
            ]
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    for line in lines:
                        file.write(json.dumps({**line, "command": command}) + "\n")
            text = []
            for who in ("random", "autotuner"):
                shares = [share(line, who) for line in lines]
                spread = f"{min(shares):.2f} to {max(shares):.2f}"
                text.append(f"{who} {statistics.median(shares):.2f} ({spread})")
            print(
                f"{name}, {len(landscapes[name].places)} points, {'with' if compiling else 'without'} "
                f"compilation: our share of the time of {'; '.join(text)}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
