"""Searches sizes of shipped Triton kernels on a CUDA device, and confirms them on shapes never timed before.

python scripts/gpu_search.py compile NAME[=SIZES]... [--seconds 90] --points P [--known F]
python scripts/gpu_search.py check NAME=SIZES... --points P [--whole]
python scripts/gpu_search.py explore NAME[=SIZES[;SIZES]]... [--seconds 90] --points P
python scripts/gpu_search.py landscape NAME... [--seconds 25] --points P --out F
python scripts/gpu_search.py search NAME... [--seconds 25] --points P --archive A [--strategy full]
python scripts/gpu_search.py confirm NAME[=SIZES]... --points P [--against SIZES] [--archive A] [--out F]
python scripts/gpu_search.py confirm all --points P [--seconds 25] [--out F]
python scripts/gpu_search.py propose RECORDS...

NAME: STAGE/DIM or STAGE/DIM/float32, such as backward_kv/64 (a portable tile kernel, timed alone), with
@PATTERN (dense, causal, window, lists, documents) for one class of patterns, or gated_delta, kimi_delta,
fixed_decay (forward and backward of a recurrence).
`compile` fills Triton's cache, compares every setting (with SIZES: these and their neighbours) with float64
in processes of its own, and writes to P what is right, but for points of F; `landscape` times all of P, for
`search_race.py` to replay strategies on; `check` compares sizes with float64 on every held-out problem, with
--whole through the whole operator, gradients and repairs with it; `confirm` times sizes (those named, else
the champion of the archive, else the shipped ones) against the shipped ones (or those of --against) on
held-out shapes, beside a control: what is compared against, twice.
`explore` compiles, times roughly beside whatever else runs, and checks the two best of each kernel, or the
sizes that are named; `confirm all` takes everything that was checked.
`propose` needs no GPU: what the lines of `confirm` say about changes of the tables, by class of patterns.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from gpu_search_kernels import CLASSES, DEVICE, Tiles, kernels

from foveal.search.acceptance import decide
from foveal.search.archive import Archive
from foveal.search.controller import Search
from foveal.search.device import DeviceEvaluator
from foveal.search.prior import guess
from foveal.search.space import Point, Space, Value
from foveal.search.strategies import strategy
from foveal.search.task import Case, Input, Task
from foveal.search.templates import tile_traits
from foveal.tuning.config import Config
from foveal.tuning.proposal import Change, Proposal, Timing, propose

Write = Callable[[dict[str, object]], None]
_DRAWN = 400
_SAMPLES = 8
_CONFIRMED = 20
_PROMISING = 0.97


def checked(job: tuple[str, dict[str, Value]]) -> dict[str, object]:
    """What is wrong with a point ("" for nothing), facts, seconds; in a process of its own."""
    name, point = job
    start = time.perf_counter()
    facts: dict[str, float] = {}
    try:
        wrong, facts = kernels(name).wrong(point)
    except Exception as error:  # compilers and drivers raise what they like
        wrong = f"{type(error).__name__}: {error}"[:300]
    seconds = time.perf_counter() - start
    return {"name": name, "point": point, "wrong": wrong, "facts": facts, "seconds": seconds}


def roughly(job: tuple[str, dict[str, Value]]) -> dict[str, object]:
    """`checked`, with the ratio to the shipped sizes as it is beside other work on the device."""
    line = checked(job)
    if not line["wrong"]:
        found = kernels(job[0])
        timer = DeviceEvaluator(
            found, found.space.first, lambda p: ("", {}, 0.0), torch.device(DEVICE)
        )
        pair = {"point": job[1], "shipped": found.space.first}
        samples = timer.samples(pair, found.shapes[0], _SAMPLES)
        ratios = [a / b for a, b in zip(samples["point"], samples["shipped"], strict=True)]
        line["ratio"] = statistics.median(ratios)
    return line


def held_out(job: tuple[str, dict[str, Value]]) -> dict[str, object]:
    """What is wrong with a point on held-out problems; compiles what `confirm` will time."""
    name, point = job
    found = kernels(name)
    wrong = ""
    start = time.perf_counter()
    try:
        for shape in found.held_out:
            wrong = wrong or found.wrong(point, shape)[0]
    except Exception as error:  # compilers and drivers raise what they like
        wrong = f"{type(error).__name__}: {error}"[:300]
    return {"name": name, "point": point, "wrong": wrong, "seconds": time.perf_counter() - start}


def explore(names: Sequence[str], seconds: float, workers: int, path: Path) -> None:
    """Compiles and roughly times points for two thirds of the time, then checks the best of every kernel."""
    start = time.monotonic()
    chosen: list[tuple[str, dict[str, Value]]] = []
    jobs: list[tuple[float, str, dict[str, Value]]] = []
    for each in names:
        name, _, sizes = each.partition("=")
        if sizes:
            chosen += [(name, _point(kernels(name), text)) for text in sizes.split(";")]
        else:
            for rank, point in enumerate(likely_first(name, coverage(name))):
                jobs.append((rank, name, point))
    jobs.sort(key=lambda job: job[0])
    rough: dict[str, list[tuple[float, dict[str, Value]]]] = {}

    def keep(line: dict[str, Any]) -> None:
        file.write(json.dumps(line) + "\n")
        file.flush()

    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a") as file:
        first = [pool.apply_async(held_out, (job,)) for job in chosen]
        rest = pool.imap_unordered(roughly, [job[1:] for job in jobs])
        until = start + seconds * (0.62 if jobs else 0.0)
        for _ in jobs:
            try:
                line: dict[str, Any] = rest.next(timeout=max(until - time.monotonic(), 0.01))
            except multiprocessing.TimeoutError:
                break
            keep(line)
            if line["wrong"]:
                print(f"{line['name']} {line['point']} {str(line['wrong'])[:160]}", flush=True)
            else:
                rough.setdefault(line["name"], []).append((line["ratio"], line["point"]))
        for job, waiting in zip(chosen, first, strict=True):
            try:
                line = waiting.get(timeout=max(start + seconds - time.monotonic(), 0.01))
            except multiprocessing.TimeoutError:
                print(f"{job[0]} {job[1]}: no time left", flush=True)
                continue
            keep(line)
            print(f"{line['name']} {line['point']} {line['wrong'] or 'right'}", flush=True)
        pool.terminate()
    best = []
    for name, found in rough.items():
        found.sort(key=lambda pair: pair[0])
        print(name, len(found), [(round(r, 3), *p.values()) for r, p in found[:5]], flush=True)
        best += [(r, name, point) for r, point in found[:2] if r < _PROMISING]
    if not best:
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a") as file:
        more = pool.imap_unordered(held_out, [job[1:] for job in sorted(best, key=lambda b: b[0])])
        for _ in best:
            try:
                line = more.next(timeout=max(start + seconds - time.monotonic(), 0.01))
            except multiprocessing.TimeoutError:
                break
            keep(line)
            print(f"{line['name']} {line['point']} {line['wrong'] or 'right'}", flush=True)
        pool.terminate()


def likely_first(name: str, points: Sequence[dict[str, Value]]) -> list[dict[str, Value]]:
    """The shipped sizes, then others by what is known of kindred kernels."""
    first, *others = points
    stage = name.split("/")[0]
    if "queries" not in first or not others:
        return list(points)
    expected = guess(tile_traits.known(), [tile_traits.traits(stage, each) for each in others])
    return [first, *(others[place] for place in expected.argsort().tolist())]


def coverage(each: str) -> list[dict[str, Value]]:
    """The shipped sizes, then all others in random order, or the neighbours of sizes that are named."""
    name, _, sizes = each.partition("=")
    space, source = kernels(name).space, random.Random(0)
    if sizes:
        point = _point(kernels(name), sizes)
        near = space.neighbours(point)
        further = [other for neighbour in near for other in space.neighbours(neighbour)]
        unique = {tuple(x.values()): x for x in (space.first, point, *near, *further)}
        return list(unique.values())
    if space.size <= _DRAWN:
        points = [point for point in space.points() if point != space.first]
        source.shuffle(points)
    else:
        points = [space.draw(source) for _ in range(_DRAWN)]
    return [space.first, *points]


def compile_points(
    names: Sequence[str], seconds: float, workers: int, path: Path, known: Path | None
) -> None:
    """Fills Triton's cache with what a search will ask for, and says what is right."""
    end = time.monotonic() + seconds
    done = set()
    if known is not None:
        for line in map(json.loads, known.read_text().splitlines()):
            if line["point"] != line.get("shipped"):
                done.add((line["name"], tuple(line["point"].values())))
    spaces = {each.partition("=")[0]: coverage(each) for each in names}
    spaces = {
        name: [point for point in points if (name, tuple(point.values())) not in done]
        for name, points in spaces.items()
    }
    names = list(spaces)
    jobs: list[tuple[str, dict[str, Value]]] = []
    for turn in range(max(map(len, spaces.values()))):
        jobs += [(name, points[turn]) for name, points in spaces.items() if turn < len(points)]
    failed = 0
    took: dict[str, list[float]] = {name: [] for name in names}
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a") as file:
        waiting = pool.imap_unordered(checked, jobs)
        for _ in jobs:
            try:
                line = waiting.next(timeout=max(end - time.monotonic(), 0.01))
            except multiprocessing.TimeoutError:
                break
            failed += bool(line["wrong"])
            took[str(line["name"])].append(float(line["seconds"]))  # type: ignore[arg-type]
            file.write(json.dumps(line) + "\n")
            file.flush()
            if line["wrong"]:
                print(f"{line['name']} {line['point']} {str(line['wrong'])[:160]}", flush=True)
        pool.terminate()
    for name, all_seconds in took.items():
        middle = statistics.median(all_seconds) if all_seconds else math.nan
        print(f"{name}: {len(all_seconds)} of {len(spaces[name])} compiled, {middle:.1f} s each")
    print(f"{failed} wrong", flush=True)


def right_points(name: str, path: Path) -> list[dict[str, Any]]:
    """Lines of points that were right."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        line for line in lines if line["name"] == name and "facts" in line and not line["wrong"]
    ]


def check(name: str, sizes: str, path: Path, whole: bool) -> None:
    """Compares sizes with float64 on every held-out problem, and compiles what `confirm` will time."""
    found = kernels(name)
    point = _point(found, sizes) if sizes else found.space.first
    shapes = (*found.shapes, *found.held_out)
    start = time.monotonic()
    wrong = ""
    for shape in found.held_out:
        wrong = wrong or found.wrong(point, shape)[0]
    if whole:
        wrong = wrong or found.checked(point, shapes)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"name": name, "point": point, "wrong": wrong}) + "\n")
    took = time.monotonic() - start
    print(f"{name} {sizes}: {wrong or 'right'}, {took:.0f} s, whole: {whole}", flush=True)


def landscape(name: str, seconds: float, path: Path, write: Write) -> None:
    """Times of all right points, each by turns with the shipped sizes."""
    from triton.testing import do_bench

    found = kernels(name)
    end = time.monotonic() + seconds
    shipped = found.space.first
    timer = DeviceEvaluator(found, shipped, lambda p: ("", {}, 0.0), torch.device(DEVICE))
    lines = right_points(name, path)
    best: list[tuple[float, dict[str, Any]]] = []
    for number, line in enumerate(lines):
        if time.monotonic() > end:
            print(f"{name}: {number} of {len(lines)} timed in time", flush=True)
            break
        point = line["point"]
        row: dict[str, Any] = {"point": point, "shipped": shipped, "facts": line["facts"]}
        start = time.perf_counter()
        try:
            for shape in found.shapes:
                pair = {"point": point, "shipped": shipped}
                samples = timer.samples(pair, shape, _SAMPLES)
                row["samples"] = samples
        except Exception as error:
            print(f"{name} {point}: {type(error).__name__}: {str(error)[:160]}", flush=True)
            continue
        row["seconds"] = time.perf_counter() - start
        row["compile_seconds"] = line["facts"].pop("compile_seconds", line["seconds"])
        if number % 16 == 0:
            start = time.perf_counter()
            row["do_bench"] = do_bench(found.call(point, found.shapes[0])) / 1e3
            row["do_bench_seconds"] = time.perf_counter() - start
        middle = {key: statistics.median(x) for key, x in samples.items()}
        best.append((middle["point"] / middle["shipped"], row))
        write({"what": "landscape", "name": name, "shape": found.shapes[0], **row})
    best.sort(key=lambda pair: pair[0])
    control = [ratio for ratio, row in best if row["point"] == shipped]
    print(f"{name}: {len(best)} timed, control {[round(x, 4) for x in control]}")
    for ratio, row in best[:6]:
        milliseconds = 1e3 * statistics.median(row["samples"]["shipped"])
        print(
            f"  {1 - ratio:+.1%} of {milliseconds:.3f} ms: {row['point']}", row["facts"], flush=True
        )


@dataclass(frozen=True)
class Known(Space):
    """The points of a space that were compiled and right."""

    known: frozenset[tuple[Value, ...]] = frozenset()

    def valid(self, point: Point) -> bool:
        return tuple(point[p.name] for p in self.params) in self.known

    def draw(self, source: random.Random) -> dict[str, Value]:
        values = source.choice(sorted(self.known))
        return dict(zip((p.name for p in self.params), values, strict=True))

    def points(self) -> Iterator[dict[str, Value]]:
        for values in sorted(self.known):
            yield dict(zip((p.name for p in self.params), values, strict=True))


def known_space(space: Space, points: Sequence[Point]) -> Known:
    """A space of these points only."""
    known = frozenset(tuple(point[p.name] for p in space.params) for point in points)
    return Known(space.params, space.allows, space.means, known)


def task_of(name: str, space: Space) -> Task:
    """A task in name: its programs are not loaded, its points are."""
    case = Case(name, (Input("q", (1,), "bfloat16"),))
    program = {"kind": "template", "module": name, "options": {}}
    return Task(name, program, (case,), program, space, device=DEVICE)


def search(name: str, seconds: float, archive: Path, recipe: str, seed: int, points: Path) -> None:
    """Searches, with the shipped sizes as the start and as the reference."""
    found = kernels(name)
    lines = right_points(name, points)
    space = known_space(found.space, [line["point"] for line in lines])
    facts = {tuple(sorted(line["point"].items())): line["facts"] for line in lines}
    with Archive(archive) as store:
        evaluator = DeviceEvaluator(
            found,
            space.first,
            lambda point: ("", facts.get(tuple(sorted(point.items())), {}), 0.0),
            torch.device(DEVICE),
            seed=seed,
        )
        known = tile_traits.known() if isinstance(found, Tiles) else []
        run = Search(task_of(name, space), store, [evaluator], strategy(recipe), seed, known=known)
        run.run(seconds)
        entries = store.entries(evaluated=True)
        print(
            f"{name}: {len(entries)} of {len(lines)} judged, {len(store.accepted())} accepted, "
            f"{len(store.elites())} niches"
        )
        for each in store.accepted():
            point = dict(store.entry(each["candidate"]).candidate.params)
            print(f"  after {each['spent']:.1f} s: {each['gain']:.2%}, {point}", flush=True)


def confirm(
    name: str,
    found_text: str,
    against: str | None,
    archive: Path | None,
    points: Path,
    write: Write,
) -> None:
    """Sizes against the shipped ones on held-out shapes; this process never searched.

    Whether they are right `check` found out and wrote to `points`, else it is found out here.
    """
    found = kernels(name)
    base = _point(found, against) if against else found.space.first
    if found_text:
        point = _point(found, found_text)
    elif archive is not None and archive.exists():
        with Archive(archive, readonly=True) as store:
            champion = store.champion()
            assert champion is not None
            point = dict(champion.candidate.params)
    else:
        point = found.space.first
    shapes = (*found.shapes, *found.held_out)
    lines = [json.loads(x) for x in points.read_text().splitlines()] if points.exists() else []
    own = [x for x in lines if x["name"] == name and x["point"] == point and "facts" not in x]
    wrong = own[-1]["wrong"] if own else found.checked(point, shapes)
    print(f"{name} {found_text}: correct: {not wrong} {wrong}", flush=True)
    timer = DeviceEvaluator(found, base, lambda p: ("", {}, 0.0), torch.device(DEVICE))
    for shape in shapes:
        named = {"found": point, "shipped": base, "control": base}
        try:
            samples = timer.samples(named, shape, _CONFIRMED)
        except Exception as error:
            print(f"  {shape}: {type(error).__name__}: {str(error)[:160]}", flush=True)
            continue
        gains, verdicts = {}, {}
        for which in ("found", "control"):
            ratios = [a / b for a, b in zip(samples[which], samples["shipped"], strict=True)]
            verdicts[which] = decide({"": [math.log(r) for r in ratios]}).verdict
            gains[which] = 1 - statistics.median(ratios)
        held = shape not in found.shapes
        print(
            f"  {shape} {'held out' if held else 'searched'}: {gains['found']:+.2%} "
            f"{verdicts['found']}, control {gains['control']:+.2%} {verdicts['control']}",
            flush=True,
        )
        write(
            {
                "what": "confirm",
                "name": name,
                "shape": shape,
                "held_out": held,
                "found": point,
                "shipped": base,
                "gain": gains["found"],
                "verdict": verdicts["found"],
                "control": gains["control"],
                "control_verdict": verdicts["control"],
                "correct": not wrong,
                "samples": samples,
            }
        )


def checked_names(path: Path) -> list[str]:
    """NAME=SIZES of what was right on held-out problems; of every kernel the first before the others."""
    found: dict[str, dict[str, None]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        if "facts" not in line and not line["wrong"]:
            point = line["point"]
            sizes = Config(point["queries"], point["keys"], point["warps"], point["stages"])
            found.setdefault(line["name"], {})[f"{line['name']}={sizes}"] = None
    columns = [list(names) for names in found.values()]
    turns = range(max(map(len, columns), default=0))
    return [names[turn] for turn in turns for names in columns if turn < len(names)]


def proposals(paths: Sequence[Path]) -> list[Proposal]:
    """Changes of the tables for which files have lines of `confirm`; the last line of a problem counts."""
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in paths:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if line.get("what") == "confirm" and "queries" in line["found"]:
                key = line["name"], json.dumps(line["found"]), json.dumps(line["shape"])
                lines[key] = line
    timings: dict[Change, list[Timing]] = {}
    for line in lines.values():
        stage, size, *kind = line["name"].split("@")[0].split("/")
        point, (pattern, grid, heads) = line["found"], line["shape"]
        sizes = Config(point["queries"], point["keys"], point["warps"], point["stages"])
        change = Change("sm_90", stage, int(size), kind[0] if kind else "half", None, sizes)
        timings.setdefault(change, []).append(
            Timing(
                f"{pattern} {'x'.join(map(str, grid))}, {heads} heads",
                CLASSES[pattern],
                line["held_out"],
                line["gain"],
                line["control"],
                line["correct"],
            )
        )
    return propose(timings)


def _point(found: Any, text: str) -> dict[str, Value]:
    assert isinstance(found, Tiles)
    sizes = Config.parse(text)
    return {
        "queries": sizes.queries,
        "keys": sizes.keys,
        "warps": sizes.warps,
        "stages": sizes.stages,
    }


def writer(path: Path | None) -> Write:
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
    parser.add_argument(
        "what",
        choices=("compile", "check", "explore", "landscape", "search", "confirm", "propose"),
    )
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 12))
    parser.add_argument("--strategy", default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--against", metavar="SIZES")
    parser.add_argument("--archive", type=Path, help="a folder")
    parser.add_argument("--points", type=Path, default=Path("points.jsonl"))
    parser.add_argument("--known", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the host computes on tiny matrices only
    if options.what == "compile":
        compile_points(
            options.names, options.seconds, options.workers, options.points, options.known
        )
        return 0
    if options.what == "propose":
        for each in proposals([Path(name) for name in options.names]):
            print(each)
        return 0
    if options.what == "explore":
        explore(options.names, options.seconds, options.workers, options.points)
        return 0
    end = time.monotonic() + options.seconds
    if options.names == ["all"]:
        options.names = checked_names(options.points)
    for number, each in enumerate(options.names):
        if time.monotonic() > end:
            print(f"{each} and what follows: no time left", flush=True)
            break
        share = (end - time.monotonic()) / (len(options.names) - number)
        name, _, sizes = each.partition("=")
        archive = None
        if options.archive is not None:
            archive = options.archive / f"{name.replace('/', '_')}.db"
        try:
            if options.what == "check":
                check(name, sizes, options.points, options.whole)
            elif options.what == "confirm":
                out = writer(options.out)
                confirm(name, sizes, options.against, archive, options.points, out)
            elif options.what == "landscape":
                landscape(name, share, options.points, writer(options.out))
            else:
                assert archive is not None
                search(name, share, archive, options.strategy, options.seed, options.points)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
