"""python -m examples.test_time_regression: estimators and small trained models, records and a report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from examples.test_time_regression import report
from examples.test_time_regression.estimators import judge
from examples.test_time_regression.tasks import InContext, Permutations, Recall, Task
from examples.test_time_regression.train import MIXERS, Run, train
from foveal.cli._progress import Progress


def runs(size: str, seeds: range) -> list[Run]:
    """What is trained, seed by seed, so that a run cut short has compared all models; size as _SIZES."""
    tasks, sizes = _SIZES[size]
    return [
        Run(task, name, seed=seed, **sizes) for seed in seeds for task in tasks for name in MIXERS
    ]


_SIZES: dict[str, tuple[tuple[Task, ...], dict[str, Any]]] = {
    "small": (
        (InContext(2, 6), Recall(2, 12, 4), Permutations(3, 6)),
        {"dim": 16, "heads": 1, "depth": 1, "steps": 3, "batch": 4},
    ),
    "cpu": (
        (InContext(8, 20), Recall(8, 32, 16), Permutations(3, 12)),
        {"dim": 32, "heads": 1, "depth": 1, "steps": 200, "batch": 32},
    ),
    "cuda": (
        (InContext(8, 40), Recall(16, 64, 32), Permutations(3, 16)),
        {"dim": 64, "heads": 2, "depth": 2, "steps": 600, "batch": 64},
    ),
}


def estimates(small: bool, seeds: range) -> list[dict[str, Any]]:
    """The records of all estimators, by dimension and function."""
    dims, points, draws = ((2, 4), 64, 4) if small else ((2, 3, 4, 6, 8, 12, 16), 512, 24)
    return [each for dim in dims for seed in seeds for each in judge(dim, points, draws, seed)]


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; returns its exit status."""
    parser = argparse.ArgumentParser(prog="test_time_regression", description=__doc__)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what is trained is larger on a GPU",
    )
    parser.add_argument("--small", action="store_true", help="a few seconds on one thread")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", choices=("estimators", "trained"))
    parser.add_argument("--task", help="only what is trained on the task of this name")
    parser.add_argument("--models", help="only models of these names, with commas between them")
    parser.add_argument("--steps", type=int, help="of training, in place of those of the device")
    parser.add_argument("--seconds", type=float, help="start no run after so many seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/test_time_regression"))
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="FILE", help="only the report of old records"
    )
    options = parser.parse_args(arguments)
    if options.render:
        lines = [line for path in options.render for line in path.read_text("utf-8").splitlines()]
        records = [json.loads(line) for line in lines]
    else:
        records = _run(options)
    command = "python -m examples.test_time_regression" + (" --small" if options.small else "")
    path = report.build(records, command).write(options.out / "report.html")
    print(f"the report is {path.resolve()}")
    return 0


def _run(options: argparse.Namespace) -> list[dict[str, Any]]:
    options.out.mkdir(parents=True, exist_ok=True)
    began, records = time.monotonic(), []
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    progress = Progress("test_time_regression")
    with (options.out / "records.jsonl").open("w", encoding="utf-8") as file:

        def keep(record: dict[str, Any], line: str) -> None:
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            progress.clear()
            print(line, flush=True)

        if options.only != "trained":
            for record in estimates(options.small, seeds):
                keep(record, f"{record['model']:15} dim {record['dim']:2} {record['error']:.3f}")
        size = "small" if options.small else options.device
        planned = [] if options.only == "estimators" else runs(size, seeds)
        if options.task:
            planned = [run for run in planned if run.task.name == options.task]
        if options.models:
            planned = [run for run in planned if run.model in options.models.split(",")]
        if options.steps:
            planned = [dataclasses.replace(run, steps=options.steps) for run in planned]
        for number, run in enumerate(planned):
            if options.seconds and time.monotonic() - began > options.seconds:
                print(f"{len(planned) - number} runs left out: the time is over", file=sys.stderr)
                break
            progress(f"{run.task.name}, {run.model}, seed {run.seed}", number / len(planned))
            record = train(run, options.device)
            keep(
                record,
                f"{record['task']:22} {record['model']:15} seed {record['seed']} "
                f"score {record['score']:.3f}  {record['seconds']:.1f} s",
            )
    return records


if __name__ == "__main__":
    sys.exit(main())
